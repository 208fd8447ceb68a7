"""What is started when memory or descriptors have run out: a clear error, nothing stays behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gevent
import greenlet
import pytest

from gtcpserver import BlockDetector
from gtcpserver.supervisor import systemd
from kit.patience import SOON

SECOND_HUB = """
import os, resource, threading
from gtcpserver import run_coroutine

async def five():
    return 5

results = [run_coroutine(five())]
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass

def call():
    try:
        results.append(run_coroutine(five()))
    except OSError as error:
        results.append(error.errno)

for _ in range(2):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    while held:
        os.close(held.pop())
print(results)
"""


@pytest.mark.slow
def test_run_coroutine_in_a_thread_without_an_event_loop_fails_where_descriptors_have_run_out() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_HUB], capture_output=True, text=True, timeout=SOON, check=False)
    assert done.stdout == "[5, 24, 5]\n", done.stderr[-500:]


class _LoopWithoutMemory:
    def __init__(self, loop: Any, fails_at_start: bool) -> None:
        self._loop = loop
        self._fails_at_start = fails_at_start

    def timer(self, *arguments: Any, **options: Any) -> Any:
        if not self._fails_at_start:
            raise MemoryError
        return _TimerWithoutMemory()


class _TimerWithoutMemory:
    def start(self, *_: Any) -> None:
        raise MemoryError

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fails_at_start", [False, True])
def test_a_block_detector_that_cannot_start_counts_no_switches(fails_at_start: bool) -> None:
    before = greenlet.gettrace()
    hub = gevent.get_hub()
    loop = hub.loop
    detector = BlockDetector()
    hub.loop = _LoopWithoutMemory(loop, fails_at_start)
    try:
        with pytest.raises(MemoryError):
            detector.start()
    finally:
        hub.loop = loop
    assert greenlet.gettrace() is before
    with detector:
        pass
    assert greenlet.gettrace() is before


def test_a_notification_for_which_there_is_no_memory_is_said_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)

    def no_memory(*_: Any) -> Any:
        raise MemoryError

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(SOON)
        notifier = systemd.Notifier()
        with monkeypatch.context() as patch:
            patch.setattr(systemd, "_socket_class", no_memory)
            notifier.say("READY=1")
        assert notifier.flush()
        assert manager.recv(100) == b"READY=1"
