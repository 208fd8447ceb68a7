"""Titles of processes: what ps and the kernel's log show of them."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtcpserver.process import title
from kit.supervised import Start, children, masters, wait_until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with masters(tmp_path, control=False) as start:
        yield start


def names_of(pid: int) -> tuple[str, str]:
    """comm and the command line, as ps shows them."""
    comm = Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return comm, b" ".join(words).decode()


def run(code: str, *arguments: str, **more: str) -> str:
    program = f"import os, sys\nfrom gtcpserver.process import title\n{code}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_children_of_a_master_have_titles_and_the_master_keeps_its_command_line(start) -> None:
    master = start("-w", "2", "--metrics", "127.0.0.1:0", "--reload")
    master.wait_for("worker 1 .* is ready")
    found = wait_until(
        lambda: (names := sorted(names_of(pid) for pid in children(master.pid))) and len(names) == 4 and names
    )
    assert found == [
        ("gtcp:file watch", "gtcpserver: file watcher [app:handler]"),
        ("gtcp:monitor", "gtcpserver: monitor [app:handler]"),
        ("gtcp:worker 0", "gtcpserver: worker 0 [app:handler]"),
        ("gtcp:worker 1", "gtcpserver: worker 1 [app:handler]"),
    ]
    assert names_of(master.pid)[1].startswith(f"{sys.executable} -m gtcpserver serve app:handler")
    assert master.stop() == 0


CODE = """
title.set_title("worker 0", "app:" + "x" * 50)
for name in ("cmdline", "comm"):
    print(open("/proc/self/" + name, "rb").read().rstrip(bytes(1)).decode().strip())
print(os.environ["MARK"], sys.argv[1:], flush=True)
os.execv("/bin/sh", ["sh", "-c", "echo $MARK"])
"""


def test_the_environment_and_the_arguments_stay() -> None:
    cmdline, comm, python, child = run(CODE, "one", "two", MARK="kept").splitlines()
    assert (cmdline, comm) == (f"gtcpserver: worker 0 [app:{'x' * 50}]", "gtcp:worker 0")
    assert python == "kept ['one', 'two']"
    assert child == "kept"


@pytest.mark.parametrize(
    ("room", "shown"), [(60, "gtcpserver: worker 0 [app:handle]"), (30, "gtcpserver: worker 0"), (10, "x" * 9)]
)
def test_a_title_is_as_long_as_there_is_room(monkeypatch, room, shown) -> None:
    memory = ctypes.create_string_buffer(b"x" * (room - 1) + b"\0", room)
    around = bytes(memory)
    files = {"/proc/self/stat": _stat(ctypes.addressof(memory), room), "/proc/self/cmdline": around}
    monkeypatch.setattr(title, "open", lambda path, mode: io.BytesIO(files[path]), raising=False)
    monkeypatch.setattr(title, "name_process", lambda name: None)
    title.set_title("worker 0", "app:handle")
    assert bytes(memory).rstrip(b"\0").decode() == shown


def _stat(start: int, size: int) -> bytes:
    fields = ["0"] * 50
    fields[45], fields[46] = str(start), str(start + size)
    return f"1 (a) b) {' '.join(fields)}".encode()


@pytest.mark.parametrize("stat", [b"", b"1 (a) S 0", b"1 (a) " + b"0 " * 50, _stat(4096, 10), b"1 (a) " + b"x " * 50])
def test_bounds_that_cannot_be_right_change_nothing(monkeypatch, stat) -> None:
    files = {"/proc/self/stat": stat, "/proc/self/cmdline": b"x\0"}
    monkeypatch.setattr(title, "open", lambda path, mode: io.BytesIO(files[path]), raising=False)
    monkeypatch.setattr(title, "name_process", lambda name: None)
    monkeypatch.setattr(title.ctypes, "memmove", lambda *_: pytest.fail("it wrote"))
    title.set_title("worker 0", "app:handle")
