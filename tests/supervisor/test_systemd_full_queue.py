"""What systemd is told is not lost while its queue is full: a bound datagram socket that nobody reads for a while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.patience import SOON
from kit.supervised import COMMAND, wait_until

pytestmark = pytest.mark.slow

PROGRAM = """
import gtcpserver
def handler(conn):
    while data := conn.recv(100):
        conn.sendall(data)
{run}
"""

WAYS = {
    "serve": [*COMMAND, "serve", "app.py:handler", "--bind", "127.0.0.1:PORT"],
    "workers": [*COMMAND, "serve", "app.py:handler", "--bind", "127.0.0.1:PORT", "--workers", "1"],
    "run": [sys.executable, "app.py"],
}


class Service:
    """A server as a unit with Type=notify starts it, and the manager that it tells."""

    def __init__(self, way: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        run = f"gtcpserver.run(handler, {self.port})" if way == "run" else ""
        (folder / "app.py").write_text(PROGRAM.format(run=run))
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "notify"))
        self.manager.settimeout(SOON)
        self.filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.filler.connect(str(folder / "notify"))
        self.filler.setblocking(False)
        self.fill()
        self.process = subprocess.Popen(
            [word.replace("PORT", str(self.port)) for word in WAYS[way]],
            cwd=folder,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def fill(self) -> None:
        """As many datagrams as the queue takes (net.unix.max_dgram_qlen)."""
        while True:
            try:
                self.filler.send(b"another's")
            except BlockingIOError:
                return

    def client(self) -> socket.socket:
        """One that was served, so that the server has had its turn."""

        def connect() -> socket.socket | None:
            try:
                return socket.create_connection(("127.0.0.1", self.port), SOON)
            except ConnectionRefusedError:
                return None

        client: socket.socket = wait_until(connect)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        return client

    def refuses(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 0.1).close()
        except OSError:
            return True
        return False

    def wait_told(self, word: str) -> None:
        while word not in self.manager.recv(4096).decode():
            pass

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.manager.close()
        self.filler.close()


@pytest.fixture(params=WAYS)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    service = Service(request.param, tmp_path)
    yield service
    service.end()


def test_systemd_hears_of_start_and_stop_when_its_queue_has_room_again(service: Service) -> None:
    with service.client() as client:
        service.wait_told("READY=1")
        service.fill()
        service.process.send_signal(signal.SIGTERM)
        wait_until(service.refuses)
        # When the stop begins, and not when it is over: the client's handler still runs.
        service.wait_told("STOPPING=1")
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert service.process.wait(SOON) == 0


def test_a_service_manager_that_reads_nothing_does_not_keep_the_process(tmp_path: Path) -> None:
    service = Service("serve", tmp_path)
    try:
        service.client().close()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(SOON) == 0
    finally:
        service.end()


def test_the_watchdog_of_a_single_process_is_fed_during_a_long_stop_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    service = Service("serve", tmp_path)
    try:
        with service.client():
            service.wait_told("READY=1")
            service.wait_told("WATCHDOG=1")
            service.process.send_signal(signal.SIGTERM)
            service.wait_told("STOPPING=1")
            service.wait_told("WATCHDOG=1")
        assert service.process.wait(SOON) == 0
    finally:
        service.end()
