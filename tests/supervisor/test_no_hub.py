"""A master has no event loop of gevent's: a fork would share it, and a close would wait for a loop that never runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kit.supervised import Master, wait_until

# Loaded in the master (--preload), which then tells what it has when it gets a signal that it does not know.
APP = r"""
import os, signal
from gevent import _hub_local

def tell(number, frame):
    with open(f"hub.{os.getpid()}.new", "w") as file:
        file.write(repr(_hub_local.get_hub_if_exists()))
    os.rename(f"hub.{os.getpid()}.new", f"hub.{os.getpid()}")

signal.signal(signal.SIGWINCH, tell)

def handler(conn):
    conn.sendall(conn.recv(100))
"""


@pytest.mark.slow
@pytest.mark.parametrize("patched", [True, False])
def test_the_master_makes_no_event_loop_whatever_it_does(tmp_path: Path, patched: bool) -> None:
    (tmp_path / "app.py").write_text(APP)
    files = ("--log-file", "app.log", "--pid-file", "app.pid", "--control", str(tmp_path / "ctl"))
    more = ("--metrics", "0", "--bind", "127.0.0.1:0", "--bind", "unix:app.sock")
    patch = "--monkey-patch" if patched else "--no-monkey-patch"
    master = Master(tmp_path, ("serve", "app:handler", "--workers", "1", "--preload", patch, *files, *more))
    log = tmp_path / "app.log"
    try:
        wait_until(lambda: log.exists() and "listening on" in log.read_text())
        master.settled(1)
        master.ask("reload")
        master.ask("scale", workers=2)
        master.ask("reopen")
        master.settled(2)
        told = tmp_path / f"hub.{master.pid}"
        master.send_signal(signal.SIGWINCH)
        wait_until(told.exists)
        assert told.read_text() == "None"
        # Nothing that was closed is still open: sockets of workers that are gone, of ctl, of the monitor's line.
        known = len(os.listdir(f"/proc/{master.pid}/fd"))
        for _ in range(3):
            master.ask("reload")
        master.settled(2)
        wait_until(lambda: len(os.listdir(f"/proc/{master.pid}/fd")) <= known + 1)
        assert master.stop() == 0
    finally:
        master.kill_all()
