"""Machines that share limits: masters with workers, as operators start them."""

import os
import signal
import socket
from contextlib import ExitStack

import pytest

from kit.patience import SOON
from kit.programs import needs
from kit.supervised import children, masters, wait_until

pytest.importorskip("redis")
pytestmark = [needs("redis-server", "redis-cli"), pytest.mark.slow]

#: For tests of what is counted: a Redis on a busy machine is not away.
PATIENT = ("--store-timeout", "10")

APP = """
def handler(conn):
    conn.sendall(b"+")
    while conn.recv(100):
        pass
"""


@pytest.fixture
def machine(tmp_path):
    """`machine(*arguments)` starts a master in a folder of its own."""
    with ExitStack() as stack:
        numbers = iter(range(100))

        def start(*arguments, app=APP):
            folder = tmp_path / f"machine{next(numbers)}"
            folder.mkdir()
            return stack.enter_context(masters(folder))("--workers", "2", *arguments, app=app)

        yield start


def come(port):
    """Connect; return the socket if it was served, None if it was refused."""
    sock = socket.socket()
    sock.settimeout(SOON)
    try:
        sock.connect(("127.0.0.1", port))
        if sock.recv(1) == b"+":
            return sock
    except ConnectionResetError:
        pass
    sock.close()
    return None


def come_until_refused(*ports):
    """Connect to one machine after the other, until all of them refuse; return the connections."""
    held = []
    while len(more := [sock for port in ports if (sock := come(port)) is not None]):
        held += more
        assert len(held) < 100
    return held


def test_two_machines_share_a_limit_and_one_that_is_killed_gives_back_its_counts(redis_server, machine):
    redis = redis_server()
    options = ("--shared-limits", redis.url, *PATIENT, "--client-connections", "6")
    one, two = machine(*options), machine(*options)
    wait_until(lambda: redis.ask("ZCARD", "gtcpserver:members") == "4")
    held = [come(one.port) for _ in range(4)]
    assert None not in held
    held += come_until_refused(two.port)
    assert len(held) == 6  # exactly, in two workers on each of two machines
    assert come(one.port) is None
    # A machine that is gone: not even its workers end in their own way.
    for pid in [one.pid, *children(one.pid)]:
        os.kill(pid, signal.SIGSTOP)
    for pid in [*children(one.pid), one.pid]:
        os.kill(pid, signal.SIGKILL)
    more = [wait_until(lambda: come(two.port)) for _ in range(4)]  # within the lease of 5 s
    assert come(two.port) is None
    assert two.ask("status")["stats"]["clients_refused"]["client_connections"] >= 1
    for sock in held + more:
        sock.close()
    assert two.stop() == 0


def test_counts_survive_a_reload_and_one_line_is_logged_while_redis_is_away(redis_server, machine):
    redis = redis_server()
    options = ("--shared-limits", redis.url, *PATIENT, "--client-connections", "3", "--probation", "0")
    one, two = machine(*options), machine(*options)
    wait_until(lambda: redis.ask("ZCARD", "gtcpserver:members") == "4")
    held = come_until_refused(two.port)
    assert len(held) == 3
    assert one.ask("reload") == {"ok": True}
    one.wait_for("reload 1 is done")
    assert come(one.port) is None
    redis.kill()
    for master in (one, two):
        master.wait_for("shared limits: Redis at .* is away .*; the limits of this machine hold alone")
    held += come_until_refused(one.port)
    assert len(held) in (6, 7)  # its own limit; one too many where two workers are asked at once
    assert wait_until(lambda: two.ask("status")["stats"]["store_away"] == 2)
    redis.start()
    two.wait_for("shared limits: Redis at .* is back after")
    wait_until(lambda: two.ask("status")["stats"]["store_away"] == 0)
    failures = two.ask("status")["stats"]["store_failures"]
    assert 0 < two.log().count("is away") < failures  # one of two workers said it
    for sock in held:
        sock.close()
    wait_until(lambda: redis.ask("--scan", "--pattern", "gtcpserver:open:*") == "")
    for master in (one, two):
        assert master.stop() == 0
    assert redis.ask("KEYS", "*") == ""  # they have left
