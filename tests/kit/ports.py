"""Ports for programs that must be told theirs."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_random = random.SystemRandom()  # hypothesis seeds the other one, in each process alike


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens.

    It is below those that the kernel gives to clients, so that it stays free while servers come and go.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = _random.randint(first // 2, first - 1)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
