"""Find out which process listens on a port, for an error message. From /proc, see proc(5)."""

from __future__ import annotations

import ipaddress
import os
import struct
from typing import Any

from gtcpserver.networks import IPAddress, as_ip, unmapped

THIS_PROCESS = "by this process"

TCP_LISTEN = "0A"


def describe_holder(sockaddr: tuple[Any, ...]) -> str:
    """Say which process has the port after a failed bind to this TCP address, to follow "is already in use"."""
    inodes = _listening_inodes(sockaddr)
    if not inodes:
        return "(no server was found to listen there: it may be a connection's own port; see `ss -tanp`)"
    for pid in _processes():
        if _holds(pid, inodes):
            return THIS_PROCESS if pid == os.getpid() else f"by another server (pid {pid} {_name(pid)})"
    return "by another server (`ss -ltnp` run as root says which)"


def _listening_inodes(sockaddr: tuple[Any, ...]) -> set[str]:
    wanted = as_ip(sockaddr[0])
    inodes = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path) as file:
                lines = file.readlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            host, port = columns[1].split(":")
            if columns[3] == TCP_LISTEN and int(port, 16) == sockaddr[1]:
                held = unmapped(_address(host))
                # An address conflicts with itself and with "every address" on either side; an IPv6 "every" may include
                # IPv4.
                if held == wanted or held.is_unspecified or wanted.is_unspecified:
                    inodes.add(f"socket:[{columns[9]}]")
    return inodes


def _address(text: str) -> IPAddress:
    # Each 32 bits are a number printed in the byte order of the machine.
    words = [int(text[index : index + 8], 16) for index in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return ipaddress.ip_address(packed)


def _processes() -> list[int]:
    try:
        # Newest first: a server that was started twice is among them.
        return sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True)
    except OSError:
        return []


def _holds(pid: int, inodes: set[str]) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_link(entry.path) in inodes for entry in entries)
    except OSError:
        return False  # of another user, or gone meanwhile


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
