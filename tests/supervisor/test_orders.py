"""An order of the master that a worker could not obey at once, for lack of memory, is obeyed later."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.supervised import APP, Master, alive, wait_until

pytestmark = pytest.mark.slow

#: What begins to obey cannot be started the first time: gevent.spawn raises, or its greenlet ends before it has begun.
NO_MEMORY = """
spawn = gevent.spawn
refused = []

def refuse_once(function, *arguments, **options):
    if getattr(function, "__name__", "") not in ("stop", "halt") or refused:
        return spawn(function, *arguments, **options)
    refused.append(function)
    if {raises}:
        raise MemoryError
    greenlet = spawn(function, *arguments, **options)
    greenlet.kill()
    return greenlet

gevent.spawn = refuse_once
"""


@pytest.fixture(params=[True, False], ids=["spawn raises", "greenlet is dead"])
def master(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Master]:
    (tmp_path / "app.py").write_text(APP + NO_MEMORY.format(raises=request.param))
    arguments = ("serve", "app:handler", "--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"), "--workers", "1")
    master = Master(tmp_path, arguments)
    yield master.wait_listening()
    master.kill_all()


def test_a_worker_retires_although_it_could_not_begin_to(master: Master) -> None:
    (before,) = master.pids()
    os.kill(master.pid, signal.SIGHUP)
    wait_until(lambda: not alive(before))
    assert master.request()[1] == "more"


def test_a_worker_stops_although_it_could_not_begin_to(master: Master) -> None:
    (worker,) = master.pids()
    assert master.stop() == 0
    assert not alive(worker)
