"""TCP Fast Open (RFC 7413) on a link with a delay: milliseconds until the answer to a request on a new connection.

    python -m loadtests.bench.fast_open [--rounds N]

Needs root. The client and the server are in network namespaces of their own. What links them is this program, which
carries each packet from one TUN device to the other some milliseconds later: the kernel's own way of delaying packets
(tc-netem(8)) is a module that many systems lack. Prints JSON: for each of "without" and "with" a list of figures for
each round; the second one is the share of the connections that the server's kernel counts as opened by Fast Open.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import json
import os
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

CLIENT, SERVER = "10.9.0.1", "10.9.0.2"
PORT = 5000

#: Seconds that a packet takes, each way; and connections in a round.
DELAY = 0.005
REQUESTS = 20

MSG_FASTOPEN = 0x20000000  # sendto(2)
CLONE_NEWNET = 0x40000000  # unshare(2)
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # Documentation/networking/tuntap.rst of Linux


def enter_namespace() -> None:
    """Give this process a network of its own, with Fast Open for clients and servers.

    Raises:
        OSError: not root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace needs root")
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text("3")


def open_device(own: str, other: str) -> int:
    """A TUN device with these addresses on its ends, in this process's network."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"slow", IFF_TUN | IFF_NO_PI))
    for command in (f"ip address add {own} peer {other} dev slow", "ip link set slow up"):
        subprocess.run(command.split(), check=True)
    return device


def carry(one: int, other: int) -> None:
    """Carry packets between two devices, forever."""
    on_the_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        for device in select.select([one, other], [], [], wait)[0]:
            number += 1
            packet = os.read(device, 65536)
            to = other if device == one else one
            heapq.heappush(on_the_way, (time.monotonic() + DELAY, number, to, packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(on_the_way)
            os.write(to, packet)


def serve(parent: socket.socket) -> None:
    """The server's process: its device goes to the parent, then it answers."""
    enter_namespace()
    device = open_device(SERVER, CLIENT)
    from gtcpserver import Connection, ListenConfig, Server

    def answer(conn: Connection) -> None:
        conn.recv(1000)
        conn.sendall(b"x")

    server = Server(f"{SERVER}:{PORT}", answer, listen=ListenConfig(fast_open=64))
    server.start()
    socket.send_fds(parent, [b"ready"], [device])
    server.serve_forever()


def ask(fast: bool) -> float:
    """Milliseconds until the answer."""
    began = time.perf_counter()
    with socket.socket() as sock:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # Python's own timeout makes the socket non-blocking
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", 10, 0))
        if fast:
            sock.sendto(b"GET", MSG_FASTOPEN, (SERVER, PORT))
        else:
            sock.connect((SERVER, PORT))
            sock.sendall(b"GET")
        sock.recv(1)
    return (time.perf_counter() - began) * 1000


def opened_fast(pid: int) -> int:
    """Connections that the kernel took with data in their first packet, in the network of a process."""
    text = Path(f"/proc/{pid}/net/netstat").read_text()
    names, values = re.findall(r"^TcpExt: (.*)$", text, re.MULTILINE)
    return int(dict(zip(names.split(), values.split(), strict=True))["TCPFastOpenPassive"])


def measure(rounds: int) -> dict[str, list[list[float]]]:
    """
    Raises:
        OSError, subprocess.CalledProcessError: no root, or no TUN device.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        try:
            here.close()
            serve(there)
        finally:
            os._exit(1)
    there.close()
    try:
        enter_namespace()
        device = open_device(CLIENT, SERVER)
        said, devices, _, _ = socket.recv_fds(here, 100, 1)
        if not devices:
            raise OSError(f"the server did not start: {said!r}")
        threading.Thread(target=carry, args=(device, devices[0]), daemon=True).start()
        ask(True)  # which gets the cookie
        found: dict[str, list[list[float]]] = {"without": [], "with": []}
        for _ in range(rounds):
            for name, figures in found.items():
                before = opened_fast(child)
                times = [ask(name == "with") for _ in range(REQUESTS)]
                figures.append([statistics.median(times), (opened_fast(child) - before) / REQUESTS])
        return found
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench.fast_open", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(measure(options.rounds)))
    except (OSError, subprocess.CalledProcessError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
