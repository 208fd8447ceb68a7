"""A single process in a terminal that is closed."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from kit.patience import SOON
from kit.supervised import APP, COMMAND, wait_until


@pytest.mark.slow
def test_a_single_process_that_hears_twice_that_its_terminal_is_closed_cuts_nobody(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    ours, theirs = pty.openpty()
    with (tmp_path / "log").open("wb") as log:
        command = [*COMMAND, "serve", "app:handler", "--bind", "127.0.0.1:0"]
        process = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stderr=log)
    text = (tmp_path / "log").read_text
    try:
        port = int(wait_until(lambda: re.search(r"listening on \S*:(\d+)", text()))[1])
        with socket.create_connection(("127.0.0.1", port), SOON) as held, held.makefile("rb") as lines:
            held.sendall(b"hold 60\n")
            lines.readline()
            with socket.create_connection(("127.0.0.1", port), SOON) as busy, busy.makefile("rb") as more:
                busy.sendall(b"sleep 0.5\n")
                process.send_signal(signal.SIGHUP)
                assert lines.readline().endswith(b" last\n"), text()
                process.send_signal(signal.SIGHUP)
                assert more.readline().endswith(b" last\n"), text()
        assert process.wait(SOON) == 0
        assert "0 cut" in text()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
