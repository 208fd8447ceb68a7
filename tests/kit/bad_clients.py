"""A program with one server of each kind, and what bad clients send to them.

    python bad_clients.py CERTIFICATE DIRECTORY CLOSED_PORT

Prints a JSON object of addresses and, when its standard input ends, a list of what was logged.
"""

from __future__ import annotations

import http.server
import json
import logging
import socketserver
import sys
from contextlib import ExitStack

import gevent
from gevent.os import tp_read

from gtcpserver import Server, TLSConfig, from_socketserver, from_wsgi
from gtcpserver.diagnostics.logs import configure_logging
from gtcpserver.forwarder import Forwarder
from gtcpserver.monitoring import Monitor
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.static_files import StaticFiles


class Count(logging.Handler):
    """Notes what is logged, whether it is written or not."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        if record.levelno > logging.DEBUG:
            self.said.append(f"{record.levelname} {record.name}: {record.getMessage()}")


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def lines(conn):
    while True:
        size = int.from_bytes(conn.recv_exactly(1), "big")
        conn.sendall(conn.recv_exactly(size) + conn.recv_until(b"\n", limit=4096))


def secure_later(conn):
    conn.recv_until(b"\n")
    conn.start_tls()
    echo(conn)


def application(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(204)
        self.end_headers()


def main(certificate: str, directory: str, closed_port: str) -> None:
    count = Count()
    configure_logging("INFO")
    logging.getLogger().addHandler(count)
    for log_of_requests in ("gtcpserver.access", "gtcpserver.http"):
        logging.getLogger(log_of_requests).setLevel(logging.WARNING)
    tls = TLSConfig(certificate)
    anybody, anywhere = parse_client_rule("allow any"), parse_destination_rule("allow any")
    loopback = parse_destination_rule("allow loopback")

    def proxy(**options):
        return ProxyHandler(Gate(client_rules=[anybody], destination_rules=[loopback, anywhere]), **options)

    with ExitStack() as stack:

        def serve(handler, **options):
            return stack.enter_context(Server("127.0.0.1:0", handler, timeout=5, **options)).address

        addresses = {
            "echo": serve(echo),
            "lines": serve(lines),
            "tls": serve(echo, tls=tls),
            "start_tls": serve(secure_later, tls=tls),
            "proxy_protocol": serve(echo, proxy_protocol=ProxyProtocol(["127.0.0.0/8"])),
            "wsgi": serve(from_wsgi(application)),
            "wsgi_tls": serve(from_wsgi(application), tls=tls),
            "files": serve(StaticFiles(directory, listing=True)),
            "socketserver": serve(from_socketserver(Upper)),
            "http.server": serve(from_socketserver(Hello)),
            "proxy": serve(proxy()),
            "proxy_tls": serve(proxy(tls=tls)),
        }
        addresses["forward"] = serve(Forwarder([addresses["echo"]]))
        addresses["forward_nowhere"] = serve(Forwarder([f"127.0.0.1:{closed_port}"]))
        watched = stack.enter_context(Server("127.0.0.1:0", echo))
        addresses["metrics"] = stack.enter_context(Monitor(watched, 0)).address
        count.said.clear()
        print(json.dumps(addresses), flush=True)
        while tp_read(0, 100):
            pass
        gevent.sleep(0.1)
    print(json.dumps(count.said), flush=True)


# -- what bad clients send ---------------------------------------------------------------------------------------------

TLS_RECORDS = [
    b"\x16\x03\x01\x00\x05hello",
    b"\x16\x03\x01\x40\x01" + bytes(100),
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"\x14\x03\x03\x00\x01\x01",
    b"\x17\x03\x03\x00\x10" + bytes(16),
    b"\x80\x2e\x01\x00\x02" + bytes(40),
]
SOCKS = [
    b"\x05\x00",
    b"\x05\x01\xff",
    b"\x05\x01\x00\x05\x09\x00\x01" + bytes(6),
    b"\x05\x01\x00\x05\x01\x00\x09" + bytes(6),
    b"\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50",
    b"\x05\x01\x00\x05\x01\x00\x03\x05a\x00b/ \x00\x50",
    b"\x05\x01\x02\x01\xff" + bytes(20),
    b"\x04\x09\x00\x50" + bytes(5),
    b"\x04\x01\x00\x50\x00\x00\x00\x01\x00" + b"n" * 300,
]
PROXY_HEADERS = [
    b"PROXY TCP4 1.2.3.4\r\n",
    b"PROXY TCP4 300.2.3.4 1.2.3.4 1 2\r\n",
    b"PROXY UNKNOWN " + b"x" * 200 + b"\r\n",
    b"\r\n\r\n\x00\r\nQUIT\n\x31\x11\x00\x0c" + bytes(12),
    b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff" + bytes(100),
    b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x01\x00",
]
HTTP = [
    b"nonsense\r\n\r\n",
    b"\xff\xfe\x00 \x1b[31m\r\nINFO forged: line\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    b"GET /%ff%00%2e%2e/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\r\nCookie: \xff\r\n\r\n",
    b"GET /none HTTP/1.0\r\nRange: bytes=9-1,x\r\nIf-Modified-Since: x\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"get / http/1.1\r\n\r\n",
    b"GET /\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nExpect: nothing\r\nContent-Length: 1\r\n\r\n",
    b"CONNECT x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1%25lo]:99999/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic !!\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\xff\xff",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
JUNK = [
    b"",
    b"\x00",
    b"\xff" * 1000,
    b"\n" * 100,
    b"\r\n" * 100,
    b"\x1b]0;x\x07\n",
    b"x" * 100_000,
    b"{}\n",
    b"[" * 5000,
]
CONTROL = [
    b'{"command": "none"}\n',
    b'{"command": 5}\n',
    b"[]\n",
    b"null\n",
    b'"x"\n',
    b'{"command": "scale"}\n',
    b"{" * 100,
]

EVERYTHING = [*TLS_RECORDS, *SOCKS, *PROXY_HEADERS, *HTTP, *JUNK, *CONTROL]

if __name__ == "__main__":
    main(*sys.argv[1:])
