"""Whose fault it is in the proxy: a client that leaves, a destination that breaks off, an authenticator that fails."""

import logging
import socket
import struct

import pytest

from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.testing import connect
from kit.waiting import wait_until

ANYWHERE = [parse_destination_rule("allow loopback"), parse_destination_rule("allow any")]
RESET = struct.pack("ii", 1, 0)
HTTP = b"GET http://192.0.2.1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic QWRhOnB3\r\n\r\n"
SOCKS5 = b"\x05\x01\x02\x01\x03Ada\x02pw"


class Unreachable:
    """An authenticator that asks a directory, which is down."""

    def check(self, user, password, client):
        raise ConnectionRefusedError("the directory is down")


@pytest.mark.parametrize("said", [HTTP, SOCKS5], ids=["http", "socks5"])
def test_an_authenticator_that_fails_is_logged_and_no_reset_of_the_client(serve, lines, caplog, said):
    rules = [parse_client_rule("allow from any to any with auth staff")]
    gate = Gate(client_rules=rules, destination_rules=ANYWHERE, authenticators={"staff": Unreachable()})
    server = serve(ProxyHandler(gate))
    with connect(server) as client:
        client.sendall(said)
        try:
            client.recv_all()
        except ConnectionResetError:
            pass
    wait_until(lambda: server.stats().handler_errors == 1)
    assert "the directory is down" in caplog.text
    assert "Traceback" in caplog.text
    (line,) = lines()
    assert line["result"] == "failed"


@pytest.mark.parametrize("leaves", ["client", "origin"])
def test_who_breaks_off_an_answer_is_told_in_the_access_log_alone(serve, lines, caplog, leaves):
    def origin(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(1000))
        if leaves == "origin":
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            conn.close()
        else:
            while True:
                conn.sendall(bytes(65536))

    behind = serve(origin)
    gate = Gate(client_rules=[parse_client_rule("allow from any to any")], destination_rules=ANYWHERE)
    server = serve(ProxyHandler(gate, "http"))
    with connect(server) as client:
        client.sendall(b"GET http://%b/ HTTP/1.1\r\nHost: x\r\n\r\n" % behind.address.encode())
        client.recv_until(b"\r\n\r\n")
        if leaves == "client":
            client.reset()
        else:
            with pytest.raises(ConnectionResetError):
                client.recv_all()
    (line,) = lines()
    assert line["result"] == ("reset" if leaves == "client" else "failed")
    assert server.stats().handler_errors == 0
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
