"""What tests of request smuggling share: a client of the proxy, an origin that notes every byte, an exchange."""

from __future__ import annotations

import http.client
import socket
from contextlib import suppress

from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.http_session import HttpSession
from gtcpserver.proxy.visitor import admit
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE


def serve_http(conn, records):
    """A client of a proxy that lets everybody go everywhere; its records go to `records`."""
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    HttpSession(conn, admit(gate, conn), b"me", records.append).serve()


class Recorder:
    """An origin that notes every byte, of each connection apart, and answers nothing."""

    def __init__(self, serve):
        self.heard = []
        self.ended = 0
        self.server = serve(self)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, conn):
        number = len(self.heard)
        self.heard.append(b"")
        with suppress(OSError):
            while more := conn.recv(65536):
                self.heard[number] += more
        self.ended += 1


def exchange(address, *pieces):
    """The first answer's status, and whether there was more than this one answer; the pieces are sent in turn.

    A piece may be a function that waits for something.
    """
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), SOON) as sock, sock.makefile("rb") as file:
        for piece in pieces:
            if callable(piece):
                piece()
            else:
                sock.sendall(piece)
        line = file.readline()
        fields = http.client.parse_headers(file)
        file.read(int(fields["content-length"]))
        return int(line.split()[1]), file.read()
