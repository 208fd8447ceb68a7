"""The servers under test, started as a user starts them, with what they offer to their clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtcpserver.supervisor import ControlError, ask
from kit.patience import SOON
from kit.ports import free_port

from . import clients
from .clients import Origin

STOP_TIMEOUT = 2.0

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT", re.MULTILINE)


class Zygote:
    """Forks servers, see zygote.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Server:
    """One server process.

    Attributes:
        pid: of the process that was started: with workers, the master.
        port: where it listens, once it does.
    """

    def __init__(self, zygote: Zygote, arguments: list[str], folder: Path) -> None:
        self._zygote = zygote
        self.folder = folder
        self._log = folder / "log"
        self._log.unlink(missing_ok=True)
        self.control = folder / "control"
        self._status: int | None = None
        # Chosen here: what a server logs may be what fails.
        self.port = free_port()
        run = [argument.replace(":0", f":{self.port}") for argument in arguments]
        self.pid: int = zygote.ask(run=run, folder=str(folder), log=str(self._log))

    def go(self) -> None:
        """Let it begin."""
        os.kill(self.pid, signal.SIGUSR1)

    def listens(self) -> bool:
        """Whether it has said so. A master listens before its workers serve."""
        return "listening on " in self.log()

    def is_connectable(self) -> bool:
        """As the kernel knows it: for one that cannot log."""
        end = f":{self.port:04X} 00000000:0000 0A"
        return end in Path("/proc/net/tcp").read_text()

    def log(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def status(self) -> int | None:
        """The exit status, negative for a signal; None: it runs."""
        if self._status is None:
            self._status = self._zygote.ask(poll=self.pid)
        return self._status

    def wait(self, seconds: float) -> int | None:
        wait_until(lambda: self.status() is not None, seconds)
        return self._status

    def ready_workers(self) -> list[int]:
        """Process ids of the workers, if all of them serve."""
        try:
            found = ask(str(self.control), {"command": "status"}, SOON)["workers"]
        except (OSError, ValueError, KeyError, EOFError, ControlError):
            return []
        return [one["pid"] for one in found] if all(one["state"] == "ready" for one in found) else []

    def worker(self) -> int:
        """Process id of a worker that serves."""
        found: list[int] = []
        assert wait_until(lambda: found.extend(self.ready_workers()) or found), self.log()
        return found[-1]

    def kill(self) -> None:
        """It and all it has started: they are one session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(SOON)


def descriptors(pid: int) -> dict[str, int]:
    """The open descriptors by kind."""
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                kind = os.readlink(f"/proc/{pid}/fd/{name}").partition(":[")[0]
                found[kind] = found.get(kind, 0) + 1
    return found


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], Any], seconds: float = SOON) -> bool:
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


@dataclass(frozen=True)
class Subject:
    """A kind of server.

    Attributes:
        arguments: of the gtcpserver command.
        conversations: what its clients do: names and functions of the port.
        workers: it has a master. "master", "worker": in which process calls fail.
        reloads: what its log says after SIGHUP.
        answers_pieces: each piece that comes is a request of its own, so that a stop ends the connection between two of
            them: less than all is no sign of a fault then.
    """

    name: str
    arguments: tuple[str, ...]
    conversations: dict[str, Callable[[int], None]]
    reloads: str
    workers: str = ""
    answers_pieces: bool = False


def make_subjects(folder: Path, origin: Origin) -> dict[str, Subject]:
    """All of them. ``folder`` is for their files."""
    certificate, key = _certificate(folder)
    public = folder / "public"
    public.mkdir()
    (public / "big").write_bytes(clients.pattern(clients.BIG))
    (public / "small").write_bytes(clients.pattern(clients.SMALL))
    tls = clients.tls_context(certificate)
    stop = ("--stop-timeout", str(STOP_TIMEOUT))
    echo = ("echo", "--no-monkey-patch", "--bind", "127.0.0.1:0", *stop)
    echoes = {"small": clients.echo_small, "half-close": clients.echo_half_close}
    found = [
        Subject("echo", echo, echoes, "nothing was done", answers_pieces=True),
        Subject(
            "TLS",
            (*echo, "--tls-cert", certificate, "--tls-key", key),
            {"small": _with(clients.tls_small, tls), "big": _with(clients.tls_big, tls)},
            "files reloaded",
            answers_pieces=True,
        ),
        Subject(
            "forward",
            ("forward", "127.0.0.1:0", f"127.0.0.1:{origin.port}", *stop),
            {"download": clients.download, "upload": clients.upload},
            "nothing was done",
        ),
        Subject(
            "files",
            ("files", str(public), "--bind", "127.0.0.1:0", *stop),
            {"big": clients.files_big, "HTTP/1.0": clients.files_old, "keep-alive": clients.files_keep_alive},
            "nothing was done",
        ),
        Subject(
            "proxy",
            ("proxy", "--mixed", "127.0.0.1:0", "--allow-destination", "127.0.0.1/32", *stop),
            {
                "HTTP": _with(clients.proxy_forward, origin.port),
                "CONNECT": _with(clients.proxy_connect, origin.port),
                "SOCKS5": _with(clients.proxy_socks, origin.port),
            },
            "nothing was done",
        ),
        Subject(
            "master", (*echo, "--workers", "2", "--control", "control"), echoes, "reload .* is done", "master", True
        ),
        Subject(
            "worker", (*echo, "--workers", "1", "--control", "control"), echoes, "reload .* is done", "worker", True
        ),
    ]
    return {subject.name: subject for subject in found}


def _with(conversation: Callable[..., None], more: Any) -> Callable[[int], None]:
    return lambda port: conversation(port, more)


def _certificate(folder: Path) -> tuple[str, str]:
    """A certificate for localhost that is its own authority, and its key."""
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -days 2"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    ssl.create_default_context(cafile=certificate)
    return certificate, key
