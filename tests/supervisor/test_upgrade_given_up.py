"""What becomes of a new master when the old one is stopped before it is ready, with real processes."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from kit.supervised import Master, alive, wait_until

APP = """
import os, time

if os.path.exists("slow"):
    open("importing", "w").close()
    time.sleep(1.5)

def handler(conn):
    conn.sendall(b"hello\\n")
"""


def test_when_a_stop_has_ended_nothing_holds_the_listening_sockets(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    bind = ("--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"))
    master = Master(tmp_path, ("serve", "app:handler", "--workers", "1", *bind))
    try:
        master.wait_listening()
        (tmp_path / "slow").touch()
        master.send_signal(signal.SIGUSR2)
        new = int(master.wait_for(r"a new master was started \(pid (\d+)\)"))
        wait_until((tmp_path / "importing").exists)
        assert master.stop() == 0
        assert not alive(new)
        workers = map(int, re.findall(r"worker \d+ \(pid (\d+)\)", master.log()))
        assert not any(map(alive, workers))
    finally:
        master.kill_all()
