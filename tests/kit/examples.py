"""Examples as programs, and clients that speak lines to them."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from kit.paths import ROOT
from kit.patience import SOON

EXAMPLES = ROOT / "examples"


#: Runs an example with other constants: program, name=value ..., --, arguments.
WITH_CONSTANTS = r"""
import re, sys
program, *rest = sys.argv[1:]
split = rest.index("--")
sys.argv = [program, *rest[split + 1 :]]
source = open(program).read()
for constant in rest[:split]:
    name, value = constant.split("=")
    source, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", source)
    assert found == 1, constant
exec(compile(source, program, "exec"))
"""


class Example:
    """An example that runs."""

    def __init__(self, process: subprocess.Popen[str], address: Any) -> None:
        self.process = process
        self.address = address

    def stop(self) -> str:
        """SIGTERM must end it with exit status 0; returns what it has logged since it listens, without fault."""
        self.process.send_signal(signal.SIGTERM)
        log = self.wait()
        assert self.process.returncode == 0, log
        assert not re.search(r" (ERROR|CRITICAL) |Traceback", log), log
        return log

    def wait(self) -> str:
        """Wait for its end; returns what it has logged since it listens."""
        output, log = self.process.communicate(timeout=SOON)
        assert output == ""
        return log


Start = Callable[..., Example]


class Client:
    """A client that speaks lines."""

    def __init__(self, address: Any, receive_buffer: int = 0) -> None:
        self.sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(SOON)
        self.sock.connect(address)
        self.file = self.sock.makefile("rb")

    def send(self, *lines: str) -> None:
        self.sock.sendall("".join(f"{line}\n" for line in lines).encode())

    def read(self) -> str:
        return self.file.readline().decode().rstrip("\n")

    def read_until(self, wanted: str) -> list[str]:
        """Read lines up to the wanted one; returns those before it."""
        before = []
        while (line := self.read()) != wanted:
            assert line, f"the server has closed after {before[-3:]}"
            before.append(line)
        return before

    def rest(self) -> bytes:
        """End the sending side, and read until the server closes."""
        self.sock.shutdown(socket.SHUT_WR)
        return self.file.read()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def run_example(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False, env={**os.environ, **env})
