"""redis-cli stays connected to the tutorial's server over reloads, and in the database that it has chosen."""

from __future__ import annotations

import select
import subprocess

import pytest

from kit.doc_blocks import find_blocks
from kit.paths import ROOT
from kit.patience import SOON
from kit.programs import needs
from kit.supervised import alive, wait_until

TUTORIAL = ROOT / "docs" / "learn" / "tutorial.md"

#: The tutorial's handler, with what a store that has databases adds. WHERE tells of the connection: redis-cli connects
#: again without a word where one is lost, and then sends its SELECT itself.
APP = """
import os

import commands
import store
from gtcpserver import EarlyEOF
from resp import LONGEST_LINE, error, number, read_words, string, text


def handler(conn):
    conn.session.setdefault("database", 0)
    try:
        while True:
            with conn.idle():
                line = conn.recv_until(b"\\n", LONGEST_LINE)
            with conn.deadline(store.COMMAND_SECONDS):
                conn.sendall(answer(conn, read_words(conn, line)))
    except EarlyEOF:
        pass


def answer(conn, words):
    match [words[0].upper(), *words[1:]]:
        case [b"SELECT", database] if database.isdigit():
            conn.session["database"] = int(database)
            return text("OK")
        case [b"WHERE"]:
            return string(f"{conn.session['database']} {conn.client_address[1]} {os.getpid()}".encode())
        case _:
            return commands.execute(words)
"""


class RedisCli:
    """A redis-cli that is given its commands one by one."""

    def __init__(self, port):
        self.process = subprocess.Popen(
            ["redis-cli", "-p", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def ask(self, command):
        self.process.stdin.write(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            assert select.select([self.process.stdout], [], [], SOON)[0], f"{command}: {answer!r}"
            more = self.process.stdout.read(1000)
            assert more, "redis-cli has ended"
            answer += more
        return answer.decode().strip()

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(SOON)


@pytest.mark.slow
@needs("redis-cli")
def test_redis_cli_stays_connected_and_in_its_database(start, tmp_path):
    for block in find_blocks(TUTORIAL):
        if (name := block.marks.get("file", "")).endswith(".py"):
            (tmp_path / name).write_text(block.code)
    master = start("--workers", "1", "--handover", "--probation", "0", app=APP)
    (old,) = master.settled(1)
    redis = RedisCli(master.port)
    try:
        assert redis.ask("SELECT 7") == "OK"
        database, peer, worker = redis.ask("WHERE").split()
        assert (database, worker) == ("7", str(old))
        for _ in range(3):
            assert master.ask("reload") == {"ok": True, "moved": 1, "staying": {}}
            wait_until(lambda pid=old: not alive(pid))
            (old,) = master.settled(1)
            assert redis.ask("WHERE").split() == ["7", peer, str(old)]
        assert redis.ask("SET name Ada") == "OK"
        assert redis.ask("GET name") == "Ada"
    finally:
        redis.end()
    assert "Traceback" not in master.log()
