"""Ports for programs that must be told theirs."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

_random = random.SystemRandom()  # hypothesis seeds the other one, in each process alike

# A port is often used some time after it was found, and by some tests again and again: each of the processes that run
# tests at the same time has ports of its own, and gives each of them once.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_OURS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_given: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens.

    It is below those that the kernel gives to clients, so that it stays free while servers come and go.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = _random.randint(first // 2, first - 1)
        if port % _WORKERS != _OURS or port in _given:
            continue
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given.add(port)
            return port
