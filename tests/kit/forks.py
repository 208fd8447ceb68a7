"""What the tests of forks share: the program whose handlers fork, and what is asked of it."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

from kit.patience import SOON

#: The program: `python FILE patched|plain server|stream|tls|stream-tls|wsgi`.
FILE = Path(__file__).with_name("forking.py")


class Program:
    """The program, running."""

    def __init__(self, process, tls: bool = False) -> None:
        self.process = process
        self.port = int(process.stdout.readline())
        self.pid = process.pid
        self._tls = tls

    def ask(self, request: str) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=SOON)
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            client = context.wrap_socket(client, suppress_ragged_eofs=False)
        client.sendall(request.encode() + b"\n")
        return client

    def answer(self, request: str) -> str:
        return read_all(self.ask(request))


def read_all(client: socket.socket) -> str:
    with client:
        data = b""
        while more := client.recv(65536):
            data += more
    return data.decode()


def sockets_of(pid: int) -> set[str]:
    """The TCP sockets that a process has, as the kernel numbers them."""
    tcp = {f"socket:[{line.split()[9]}]" for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target in tcp:
            found.add(target)
    return found
