"""Debian's OpenSSH server on a port of its own, and how its client logs in."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_for_port

#: What the tests need of Debian.
PROGRAMS = ("ncat", "ssh", "sshd", "ssh-keygen")

_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""


@contextmanager
def sshd(folder: Path) -> Iterator[list[str]]:
    """Start it; give the client's command, without the way to the server and what to run there."""
    for name in ("host", "user"):
        command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        subprocess.run(command, check=True, capture_output=True, timeout=SOON)
    port = free_port()
    (folder / "config").write_text(_CONFIG.format(folder=folder, port=port))
    os.makedirs("/run/sshd", exist_ok=True)
    program = shutil.which("sshd")
    assert program is not None
    server = subprocess.Popen([program, "-D", "-e", "-f", folder / "config"], stderr=subprocess.DEVNULL)
    client = ["ssh", "-F", "none", "-i", str(folder / "user"), "-p", str(port)]
    for option in ("StrictHostKeyChecking=no", f"UserKnownHostsFile={folder}/known", "BatchMode=yes"):
        client += ["-o", option]
    try:
        wait_for_port(port, server)
        yield client
    finally:
        server.kill()
        server.wait()


def through(proxy: str, kind: str) -> list[str]:
    """Return the client's options for a proxy.

    Args:
        proxy: its address.
        kind: "socks5", "socks4" or "http".
    """
    return ["-o", f"ProxyCommand=ncat --proxy {proxy} --proxy-type {kind} %h %p"]
