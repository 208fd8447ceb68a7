"""The working directory was removed: a command that needs it says so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kit.paths import ROOT

TOLD = "gtcpserver: the working directory does not exist any more: change to one that does\n"


def in_removed_folder(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inside = folder / "gone"
    inside.mkdir()
    program = f"import os, sys; os.rmdir({str(inside)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
    program += f"sys.argv[1:] = {list(arguments)!r}\nfrom gtcpserver.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=inside, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "app:handle"],
        ["serve", "app.py:handle", "--reload"],
        ["ctl", "--control", "control", "status"],
        ["files", "-b", "127.0.0.1:0"],
        ["echo", "-b", "127.0.0.1:0", "--access-log-file", "access.log"],
    ],
)
def test_the_message_says_what_is_gone(tmp_path: Path, arguments: list[str]) -> None:
    done = in_removed_folder(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (1, TOLD)


def test_what_needs_no_folder_works_there(tmp_path: Path) -> None:
    done = in_removed_folder(tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
