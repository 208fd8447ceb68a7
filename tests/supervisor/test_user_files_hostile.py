"""Workers that are no more root by their program's doing, and what a program does to a lent access log."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.patience import SOON
from kit.supervised import COMMAND, Start, masters, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can have workers of another user"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with masters(folder) as start:
        yield lambda app, *arguments: start(*arguments, app=app)


def ask(port: int, line: bytes = b"\n") -> bytes:
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(line)
        return client.makefile("rb").read()


DROPS = """
import os, pwd
from gtcpserver.files import lent as lent_files
from gtcpserver.supervisor import current_worker

def drop(worker):
    entry = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)

def handler(conn):
    # What a worker that was taken over would do.
    import gc
    gc.unfreeze()
    from gtcpserver.supervisor.lending import Borrower
    from gtcpserver.supervisor.worker import _Life
    (life,) = [one for one in gc.get_objects() if type(one) is _Life]
    path = conn.recv_until(b"\\n").decode().strip()
    borrower = life.borrower or Borrower(life.channel)
    life.borrower = borrower
    borrower._names.add(path)
    life.channel.send("names", read=[path], append=[])
    try:
        with open(borrower(path), "rb") as file:
            conn.sendall(b"lent " + file.read())
    except OSError as error:
        conn.sendall(repr(error).encode())
"""


def test_a_program_that_gives_up_root_by_itself_gets_no_files_of_root_s(start, folder):
    secret = folder / "secret"
    secret.touch(0o600)
    secret.write_bytes(b"the secret")
    master = start(DROPS, "--workers", "1", "--worker-start", "app:drop")
    answer = ask(master.port, f"{secret}\n".encode())
    assert answer.startswith(b"PermissionError"), answer


LOGGING = """
import logging.config

def handler(conn):
    line = conn.recv_until(b"\\n")
    if line == b"configure\\n":
        logging.config.dictConfig({"version": 1})
    conn.sendall(line)
"""


def test_a_lent_access_log_goes_on_after_the_program_sets_up_logging(start, folder):
    secret = folder / "secret"
    secret.mkdir(mode=0o700)
    log = secret / "access.log"
    master = start(LOGGING, "--workers", "1", "--preload", "--user", "nobody", "--access-log-file", str(log))
    for line in (b"configure\n", b"a\n", b"b\n", b"c\n"):
        assert ask(master.port, line) == line
        time.sleep(0.2)
    wait_until(lambda: len(log.read_text().splitlines()) >= 3, 3)
    log.rename(secret / "old")
    wait_until(log.exists, 3)
    wait_until(lambda: ask(master.port) and log.read_text(), 3)


@pytest.mark.parametrize("command", ["echo", "proxy"])
@pytest.mark.parametrize("writable", ["file", "folder", "mode"])
def test_a_settings_file_that_another_user_may_change_names_no_files_of_root_s(folder, command, writable):
    (folder / "secret").mkdir(mode=0o700)
    (folder / "settings").mkdir()
    log, settings = folder / "secret" / "log", folder / "settings" / "settings.toml"
    if command == "echo":
        settings.write_text(f'access_log_file = "{log}"\n')
        arguments = ["echo", "--config", str(settings), "--bind", "127.0.0.1:0"]
    else:
        settings.write_text(f'[[listener]]\nlisten = "127.0.0.1:0"\n[log]\nfile = "{log}"\n')
        arguments = ["proxy", "--config", str(settings)]
    nobody = pwd.getpwnam("nobody").pw_uid
    if writable == "mode":
        settings.chmod(0o666)
    else:
        os.chown(settings if writable == "file" else settings.parent, nobody, -1)
    done = subprocess.run(
        [*COMMAND, *arguments, "--workers", "1", "--user" if command == "echo" else "--worker-user", "nobody"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert done.returncode in (2, 3), done.stderr
    assert "Permission denied" in done.stderr
    assert "not lent" in done.stderr
    assert not log.exists()
