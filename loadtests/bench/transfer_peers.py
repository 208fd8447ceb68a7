"""What the benchmarks of transfers and proxies stand between: relays and file servers, and the bytes behind them."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .measure import SERVER_CPU, BenchError, Listening
from .results import OURS
from .starting import PYTHON, drain, started, wait_until_it_accepts

GIB = 1 << 30
CHUNK = 1 << 20
MEDIUM, SMALL = 64 << 20, 16 << 10

HAPROXY = """
global
    nbthread 1
    maxconn 5000
defaults
    mode tcp
    option splice-request
    option splice-response
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen relay
    bind 127.0.0.1:{port}
    server target 127.0.0.1:{target}
"""

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def running(command: list[str], port: int, cpu: int = SERVER_CPU) -> Iterator[Listening]:
    """Run a server that listens on a port it was told."""
    name = " ".join(command)
    with started(name, command, {cpu}, stderr=subprocess.PIPE) as process:
        wait_until_it_accepts(name, process, port)
        assert process.stderr is not None
        drain(process.stderr)
        yield Listening(process.pid, "127.0.0.1", port)


class Target:
    """Behind the relays: sends as many bytes as the first 8 bytes it gets say."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            threading.Thread(target=self._send, args=(sock,), daemon=True).start()

    def _send(self, sock: socket.socket) -> None:
        data = memoryview(bytes(CHUNK))
        with sock:
            try:
                left = struct.unpack("!Q", sock.recv(8, socket.MSG_WAITALL))[0]
                while left:
                    left -= sock.send(data[: min(left, CHUNK)])
            except (OSError, struct.error):
                return


def discard(sock: socket.socket, count: int) -> None:
    """Read and throw away, without the cost of copying (MSG_TRUNC, tcp(7))."""
    room = bytearray(CHUNK)
    while count:
        got = sock.recv_into(room, min(count, CHUNK), socket.MSG_TRUNC)
        if not got:
            raise BenchError(f"the connection ended {count} bytes early")
        count -= got


Relay = Callable[[int, int, str], list[str]]


def _haproxy(port: int, target: int, folder: str) -> list[str]:
    config = Path(folder, f"haproxy-{port}.cfg")
    config.write_text(HAPROXY.format(port=port, target=target))
    return ["haproxy", "-db", "-f", str(config)]


RELAYS: dict[str, Relay] = {
    OURS: lambda port, target, _: [PYTHON, "-m", "gtcpserver", "forward", f"127.0.0.1:{port}", f"127.0.0.1:{target}"],
    "haproxy, splice forced": _haproxy,
    "recv/sendall on gevent": lambda port, target, _: [
        PYTHON,
        "loadtests/bench/peers/copy_relay.py",
        str(port),
        str(target),
    ],
}


def _nginx(port: int, root: str, folder: str) -> list[str]:
    config = Path(folder, f"nginx-{port}.conf")
    config.write_text(NGINX.format(port=port, root=root, folder=folder))
    return ["nginx", "-c", str(config), "-e", f"{folder}/error.log"]


FILE_SERVERS: dict[str, Callable[[int, str, str], list[str]]] = {
    OURS: lambda port, root, _: [PYTHON, "-m", "gtcpserver", "files", root, "--bind", f"127.0.0.1:{port}"],
    "nginx, sendfile on": _nginx,
}
