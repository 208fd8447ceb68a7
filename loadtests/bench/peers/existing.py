"""Existing code, served by each of those who can: one socketserver handler class, and one WSGI application.

    python loadtests/bench/peers/existing.py KIND [--listen HOST:PORT]

KIND is threads (the handler class on socketserver.ThreadingTCPServer), adapter (the same by from_socketserver),
wsgiref (the application on wsgiref's server with threads), pywsgi (on gevent.pywsgi.WSGIServer) or from_wsgi.
"""
# ruff: noqa: E402

from __future__ import annotations

import sys

KIND = sys.argv[1] if len(sys.argv) > 1 else ""
if KIND in ("adapter", "pywsgi", "from_wsgi"):
    from gevent import monkey

    monkey.patch_all()

import argparse
import socketserver
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from loadtests.bench.peers.common import announce, host_and_port, response

BODY = b"x" * 1024
ANSWER = response(BODY, True)


class Handler(socketserver.StreamRequestHandler):
    """Answers each request of a keep-alive connection, read line by line as such classes do."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            while self.rfile.readline(8192).startswith(b"GET /"):
                while self.rfile.readline(8192) not in (b"\r\n", b""):
                    pass
                self.wfile.write(ANSWER)
        except OSError:
            return  # wrk leaves by a reset


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(BODY)))])
    return [BODY]


class Threads(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096


class Wsgiref(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are no news."""


class Quiet(WSGIRequestHandler):
    """wsgiref's own serves one request a connection, and names each client by a look-up of its address."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the others write no line either."""

    def address_string(self) -> str:
        return str(self.client_address[0])


def threads(address: tuple[str, int]) -> None:
    with Threads(address, Handler) as server:
        announce(server.server_address)
        server.serve_forever()


def wsgiref(address: tuple[str, int]) -> None:
    with Wsgiref(address, Quiet) as server:
        server.set_app(application)
        announce(server.server_address)
        server.serve_forever()


def pywsgi(address: tuple[str, int]) -> None:
    from gevent import get_hub
    from gevent.pywsgi import WSGIServer

    server = WSGIServer(address, application, log=None, backlog=4096)
    server.start()
    get_hub().loop.run_callback(announce, server.address)
    server.serve_forever()


def ours(handler: Callable[[Any], Any], address: tuple[str, int]) -> None:
    from gtcpserver import Server

    server = Server(address, handler)
    server.start()
    announce((address[0], server.port))
    server.serve_forever()


def adapter(address: tuple[str, int]) -> None:
    from gtcpserver import from_socketserver

    ours(from_socketserver(Handler), address)


def from_wsgi(address: tuple[str, int]) -> None:
    from gtcpserver import from_wsgi

    ours(from_wsgi(application), address)


KINDS = {function.__name__: function for function in (threads, adapter, wsgiref, pywsgi, from_wsgi)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Existing code on one of several servers.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--listen", default="127.0.0.1:0")
    given = parser.parse_args()
    KINDS[given.kind](host_and_port(given.listen))
