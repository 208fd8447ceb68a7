"""Commands that a listener does not have are refused, in the words of the protocol, and nothing is done for them."""

import socket
import struct
import subprocess
import sys

import pytest

from gtcpserver import Server
from gtcpserver.errors import ConfigError
from gtcpserver.proxy.config import make_proxy, parse_config
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import http
from kit.waiting import wait_for_port

COMMANDS = ("connect", "bind", "udp", "forward")


@pytest.fixture
def proxy(proxy):
    """`proxy(commands, speaks="mixed")`: one whose listener has these."""
    return lambda commands, speaks="mixed": proxy(listener=f'speaks = "{speaks}"\ncommands = {list(commands)!r}')


@pytest.fixture
def origin(serve):
    def answer(conn):
        conn.recv(1000)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    return serve(answer)


def socks5(port, command):
    return b"\x05\x01\x00\x05" + bytes([command]) + b"\x00\x01\x7f\0\0\x01" + struct.pack("!H", port)


def socks4(port, command):
    return b"\x04" + bytes([command]) + struct.pack("!H", port) + b"\x7f\0\0\x01\0"


def requests(port):
    """By command: what a client sends, how many bytes of the answer count, and how it begins if it is refused."""
    return {
        "socks5 connect": ("connect", socks5(port, 1), 4, b"\x05\x00\x05\x07"),
        "socks5 bind": ("bind", socks5(port, 2), 4, b"\x05\x00\x05\x07"),
        "socks5 udp": ("udp", socks5(0, 3), 4, b"\x05\x00\x05\x07"),
        "socks4 connect": ("connect", socks4(port, 1), 2, b"\0\x5b"),
        "socks4 bind": ("bind", socks4(port, 2), 2, b"\0\x5b"),
        "http connect": ("connect", b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port, 12, b"HTTP/1.1 405"),
        "http forward": (
            "forward",
            b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % port,
            12,
            b"HTTP/1.1 405",
        ),
    }


@pytest.mark.parametrize("off", COMMANDS)
@pytest.mark.parametrize("way", requests(0))
def test_each_can_be_turned_off(proxy, connect, in_thread, lines, origin, off, way):
    server = proxy([one for one in COMMANDS if one != off])
    command, request, size, refusal = requests(origin.port)[way]
    client = connect(server)
    client.sendall(request)
    refused = in_thread(read, client, size) == refusal
    assert refused is (command == off)
    client.close()
    if refused:
        line = lines()[0]
        assert (line["result"], line["detail"]) == ("command_denied", f"{command} is not among the commands")
        assert line["connected"] is None
        assert origin.accepted_connections == 0


@pytest.mark.parametrize("way", requests(0))
def test_what_a_client_sends_behind_it_is_not_read_as_another_request(proxy, connect, in_thread, origin, way):
    server = proxy(["bind"] if "bind" not in way else ["udp"])
    _, request, _, refusal = requests(origin.port)[way]
    client = connect(server)
    client.sendall(request + request)

    def everything():
        data = b""
        while more := client.recv(65536):
            data += more
        return data

    answer = in_thread(everything)
    assert answer.startswith(refusal)
    assert answer.count(b"HTTP/1.1") <= 1


def test_http_clients_are_told_what_there_is(proxy, connect, in_thread, origin):
    answer = in_thread(http, connect(proxy(["forward"])), b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"\r\nAllow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE\r\n" in answer
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.endswith(b"This proxy has no CONNECT.\n")
    answer = in_thread(http, connect(proxy(["connect"])), b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"\r\nAllow: CONNECT\r\n" in answer
    assert answer.endswith(b"This proxy forwards no requests: it only supports CONNECT.\n")


@pytest.mark.slow
def test_a_password_comes_first(connect, in_thread, serve):
    """Strangers do not learn what a listener has."""
    text = '[[listener]]\nlisten = "127.0.0.1:0"\ncommands = ["udp"]\n[auth.staff.users]\nada = "HASH"\n'
    text += '[rules]\nclients = ["allow from any to any with auth staff"]\n'
    made = make_proxy(parse_config(text.replace("HASH", "$2b$04$" + "." * 53)))
    with Server("127.0.0.1:0", made.handler) as server:
        answer = in_thread(http, connect(server), b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 407 ")
        client = connect(server)
        client.sendall(socks4(1, 1))
        assert in_thread(read, client, 8)[1] == 0x5B


@pytest.mark.parametrize(
    ("listener", "told"),
    [
        ('commands = ["tcp"]', "line 2"),
        ("commands = []", "commands must have one of connect, bind, udp, forward .* got none"),
        ('speaks = "http"\ncommands = ["bind", "udp"]', "commands must have one of connect, forward .* got bind, udp"),
        ('speaks = "socks"\ncommands = ["forward"]', "commands must have one of connect, bind, udp for"),
        ('commands = "connect"', "line 2"),
    ],
)
def test_lists_that_leave_nothing(listener, told):
    with pytest.raises(ConfigError, match=told):
        parse_config(f"[[listener]]\n{listener}")


def test_one_list_may_serve_listeners_of_several_protocols():
    commands = 'commands = ["connect", "udp"]'
    text = f'[[listener]]\nname = "a"\nspeaks = "socks"\n{commands}\n[[listener]]\nname = "b"\nlisten = ":1"\n'
    made = make_proxy(parse_config(f'{text}speaks = "http"\n{commands}'.replace('":1"', '"127.0.0.1:1"')))
    made.handler.server_stopped()


@pytest.mark.slow
def test_on_the_command_line(in_thread, serve):
    """With the listener that is there when none is named, too."""
    target, port = serve(echo), free_port()
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--mixed", f"127.0.0.1:{port}"]
    command += ["--allow-command", "connect", "--allow-command", "forward", "--allow-destination", "loopback"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            wait_for_port(port, process)

            def ask(request):
                with socket.create_connection(("127.0.0.1", port), SOON) as client:
                    client.sendall(request)
                    return read(client, 4)

            assert in_thread(ask, socks5(target.port, 1)) == b"\x05\x00\x05\x00"
            assert in_thread(ask, socks5(target.port, 2)) == b"\x05\x00\x05\x07"
            assert in_thread(ask, socks5(0, 3)) == b"\x05\x00\x05\x07"
        finally:
            process.kill()
            process.stderr.close()


def test_the_default_listener_has_what_the_command_line_says():
    from gtcpserver.cli.proxy import _from_options, _with_secrets, proxy

    context = proxy.make_context("proxy", ["--allow-command", "bind", "--external", "127.0.0.9"])
    made = _from_options(_with_secrets(context.params))
    assert [(one.name, one.listen, one.speaks) for one in made.listener] == [("default", "127.0.0.1:1080", "mixed")]
    assert made.listener[0].commands == ["bind"]
    assert made.listener[0].external == "127.0.0.9"
