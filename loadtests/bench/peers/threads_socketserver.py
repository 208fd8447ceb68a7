"""The standard library's ThreadingTCPServer: a native thread a connection."""

import socketserver
from typing import Any

from loadtests.bench.peers.common import announce, blocking_handler, host_and_port, options, tls_context

given = options("socketserver.ThreadingTCPServer")
handle = blocking_handler(given)
context = tls_context(given)


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        if context is None:
            handle(self.request)
            return
        # Here and not around the listening socket: the handshake belongs in the connection's own thread.
        with context.wrap_socket(self.request, server_side=True) as sock:
            handle(sock)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4096

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Failed handshakes of clients that leave are no news."""


with Server(host_and_port(given.listen), Handler) as server:
    announce(server.server_address)
    server.serve_forever()
