"""What blocks the event loop is found and named; what waits, and load, is not."""

import inspect
import re
import socket
import subprocess
import sys
import time
from itertools import pairwise

import gevent
import pytest

from gtcpserver import BlockDetector, ConfigError, GtcpServerError
from kit.patience import SOON
from kit.waiting import wait_until

native_sleep = gevent.monkey.get_original("time", "sleep")


def sleep_natively():
    native_sleep(0.6)


def compute():
    # CPU time: what others take of the CPU meanwhile does not count.
    until = time.thread_time() + 0.6
    while time.thread_time() < until:
        pass


def hold_the_interpreter():
    # One call into C, which gives no other thread a turn.
    until = time.thread_time() + 0.6
    while time.thread_time() < until:
        sum(range(3_000_000))


@pytest.fixture
def detector(request):
    # High: a process that is kept waiting for a CPU stands still, too.
    with BlockDetector(getattr(request, "param", 0.3)) as running:
        yield running


@pytest.fixture
def reports(caplog):
    return lambda: [record for record in caplog.records if "the event loop was blocked" in record.getMessage()]


def work(function):
    def handle(conn):
        while conn.recv(1):
            function()
            conn.sendall(b"x")

    return handle


def threads():
    look = BlockDetector._look_until.__code__  # noqa: SLF001  what its thread runs
    return sum(frame.f_code is look for frame in sys._current_frames().values())  # noqa: SLF001  documented


def ask(client):
    client.sendall(b"x")
    return client.recv(1)


@pytest.mark.slow
@pytest.mark.parametrize("function", [sleep_natively, compute, hold_the_interpreter])
def test_what_blocks_is_counted_and_named(serve, connect, in_thread, detector, reports, function):
    server = serve(work(function))
    began = time.monotonic()
    in_thread(ask, connect(server))
    # On a slow machine there is one while it lasts, too.
    (record,) = wait_until(
        lambda: [
            one
            for one in reports()
            if f"in {function.__name__}" in one.getMessage() and "still is" not in one.getMessage()
        ]
    )
    took = time.monotonic() - began
    lines, first = inspect.getsourcelines(function)
    assert record.pathname == __file__
    assert record.funcName == function.__name__
    assert first < record.lineno < first + len(lines)
    assert f"{__file__}:{record.lineno} in {function.__name__}" in record.getMessage()
    # The whole way: the handler is in it as well.
    assert re.search(rf'File "{re.escape(__file__)}", line \d+, in handle\n    function\(\)', record.stack_info)
    assert 0.3 <= record.blocked_seconds <= took
    stats = server.stats()
    assert (stats.blocked, stats.blocked_seconds) == (detector.blocked, detector.blocked_seconds)
    ended = [one.blocked_seconds for one in reports() if "still is" not in one.getMessage()]
    assert stats.blocked == len(ended)
    assert stats.blocked_seconds == pytest.approx(sum(ended), abs=0.001)


@pytest.mark.slow
def test_what_waits_is_not_found_however_long(serve, connect, in_thread, detector, reports):
    server = serve(work(lambda: gevent.sleep(0.9)))
    in_thread(ask, connect(server))
    assert (detector.blocked, reports()) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("detector", [0.5], indirect=True)
def test_load_is_not_found(serve, connect, detector, reports):
    """A hundred handlers that compute for 20 ms each, one after another: nobody of them blocks."""
    behind = []

    def little():
        began = time.monotonic()
        while time.monotonic() < began + 0.02:
            pass

    server = serve(work(little))
    clients = [connect(server) for _ in range(100)]
    wait_until(lambda: server.active_connections == 100)
    gevent.sleep(0.01)
    timer = gevent.get_hub().loop.timer(0.001, 0.001)
    behind.append(time.monotonic())
    timer.start(lambda: behind.append(time.monotonic()))
    for client in clients:
        client.sendall(b"x")
    wait_until(lambda: server.stats().bytes_sent == 100)
    timer.close()
    # The loop has stood still for longer than the threshold all the same.
    assert max(after - before for before, after in pairwise(behind)) > 0.55
    assert (detector.blocked, reports()) == (0, [])


@pytest.mark.slow
def test_one_that_may_never_end_is_told_while_it_blocks(serve, connect, in_thread, reports):
    with BlockDetector(0.05) as detector:
        in_thread(ask, connect(serve(work(lambda: native_sleep(0.7)))))
        wait_until(lambda: detector.blocked)
        mine = lambda: [one for one in reports() if "in <lambda>" in one.getMessage()]  # noqa: E731
        first, second = wait_until(lambda: len(mine()) == 2 and mine())
    assert first.getMessage().endswith("in <lambda>, and still is")
    assert second.getMessage().endswith("in <lambda>")
    assert 0.5 <= first.blocked_seconds < second.blocked_seconds
    assert second.created - first.created > 0.05


@pytest.mark.slow
def test_a_flood_from_one_place_is_counted_and_thinned_out(reports):
    with BlockDetector(0.05) as detector:
        for _ in range(12):
            native_sleep(0.08)
            gevent.sleep(0.03)
        wait_until(lambda: detector.blocked >= 9)
    here = test_a_flood_from_one_place_is_counted_and_thinned_out.__name__
    assert 5 <= len([one for one in reports() if one.getMessage().endswith(f"in {here}")]) <= 6


@pytest.mark.slow
def test_it_ends_when_it_is_stopped_and_its_counters_stay(reports):
    detector = BlockDetector(0.3)
    wait_until(lambda: threads() == 0)  # those of other tests
    detector.start()
    with pytest.raises(GtcpServerError, match="started already"):
        detector.start()
    wait_until(lambda: threads() == 1)
    native_sleep(0.5)
    wait_until(lambda: detector.blocked)
    detector.stop()
    detector.stop()
    wait_until(lambda: threads() == 0)
    counted = detector.blocked
    native_sleep(0.5)
    gevent.sleep(0.1)
    assert detector.blocked == counted
    with detector:
        native_sleep(0.5)
        wait_until(lambda: detector.blocked > counted)


@pytest.mark.parametrize("threshold", [0, 0.009, -1, float("nan"), "1", None])
def test_a_threshold_that_cannot_be(threshold):
    with pytest.raises(ConfigError, match=r"threshold must be a number, 0\.01 or more, got"):
        BlockDetector(threshold)


# -- the command -------------------------------------------------------------------------------------------------------

APP = """
from gevent import monkey

def handle(conn):
    conn.recv(1)
    monkey.get_original("time", "sleep")(0.3)
    conn.sendall(b"x")
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--block-detector=0.05"], ["--workers", "1", "--block-detector"]])
def test_the_command_reports(tmp_path, in_thread, more):
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "gtcpserver", "serve", "app.py:handle", "--bind", "127.0.0.1:0"]
    command += ["--stats-interval", "0.3", *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:

        def talk():
            said = ""
            while line := process.stderr.readline():
                said += line
                if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                    with socket.create_connection(("127.0.0.1", int(found[1])), SOON) as client:
                        assert ask(client) == b"x"
                if re.search("blocked=[1-9]", line) and "in handle" in said:
                    return said
            raise AssertionError(said)

        try:
            said = in_thread(talk)
        finally:
            process.terminate()
            in_thread(process.communicate)
        found = re.search(r"the event loop was blocked for (\S+) s by \S+app\.py:6 in handle\n", said)
        assert found
        assert float(found[1]) >= 0.2
        assert '    monkey.get_original("time", "sleep")(0.3)\n' in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block-detector", "0"], "--block-detector: must be 0.01 or more or \"none\", got '0'"),
        (["--block-detector", "echo"], "without a number the option must come last, or as --block-detector=0.1"),
    ],
)
def test_the_command_says_what_cannot_be(words, message):
    done = subprocess.run(
        [sys.executable, "-m", "gtcpserver", "echo", *words], capture_output=True, text=True, timeout=SOON
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
