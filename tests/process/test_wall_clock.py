"""The wall clock may be set at any time: nothing but what people read goes by it."""

import ast
import contextlib
import signal
import socket
import time
from pathlib import Path

import pytest

import gtcpserver
from gtcpserver.process import clock
from gtcpserver.process.clock import wall_time
from kit.patience import SOON
from kit.waiting import wait_until

HOUR = 3600.0

PACKAGE = Path(gtcpserver.__file__).parent

#: Where the wall clock is read, and why it must be that one.
WALL_CLOCK = {
    ("process/clock.py", "time"): "turns a moment of the monotonic clock into what people read",
    ("cli/ctl.py", "time.time"): "the day or month of a quota",
    ("adapters/wsgi.py", "time.time"): "gevent's attributes time_start and time_finish, whose difference is monotonic",
    ("monitoring/metrics.py", "time.time"): "process_start_time_seconds is since the epoch by definition",
    ("proxy/authenticate.py", "time.time"): "compared with a file's modification time, which is of the wall clock",
    ("proxy/http_session.py", "time"): "Retry-After, until the end of a quota's day or month",
    ("proxy/quota.py", "time"): "the day or month of a quota",
    ("proxy/record.py", "time"): "the time of a line in the access log",
    ("proxy/quota_file.py", "time.gmtime"): "the name of a damaged file that is set aside",
    ("static_files/handler.py", "time"): "the header Date (RFC 9110 section 6.6.1)",
    ("tls/acme/authority.py", "time.time"): "compared with the authority's clock, which is a wall clock",
    ("tls/acme/helper.py", "time.time"): "the next look, which outlives this process and this boot",
    ("tls/acme/keeper.py", "time.time"): "the same",
    ("tls/acme/ordering.py", "datetime.now"): "the validity of certificates",
    ("tls/acme/ordering.py", "time.time"): "compared with a file's modification time",
    ("tls/contexts.py", "time.time"): "the validity of certificates (RFC 5280 section 4.1.2.5)",
    ("tls/self_signed.py", "datetime.now"): "the validity of certificates",
}

#: Names that read it, and those that do without the seconds to print.
READERS = {"time", "time_ns", "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}
WITHOUT_ARGUMENTS = {"time.gmtime", "time.localtime", "time.ctime", "gmtime", "localtime", "ctime", "formatdate"}

#: libev's own idea of the time is the wall clock's (ev_now, ev(3)).
OF_THE_LOOP = ("loop.now", "loop.update_now")


def reads_of_the_wall_clock(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in READERS or name.endswith(OF_THE_LOOP) or (name in WITHOUT_ARGUMENTS and not node.args):
                yield name


@pytest.mark.slow
def test_the_package_reads_the_wall_clock_only_where_it_says_why():
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in reads_of_the_wall_clock(path)
    }
    assert found == set(WALL_CLOCK)


# A server whose wall clock is set by signals, an hour back (USR1) or forward (USR2).
APP = """
import signal, sys, time
usual, shift = time.time, [0.0]
time.time = lambda: usual() + shift[0]
for number, step in ((signal.SIGUSR1, -3600), (signal.SIGUSR2, 3600)):
    signal.signal(number, lambda _number, _frame, step=step: (shift.__setitem__(0, shift[0] + step), say("set")))

import gevent, logging
from gtcpserver import Server
from gtcpserver.diagnostics.logs import configure_logging

def say(*words):
    print(*words, flush=True)

def handler(conn):
    say("accepted")
    while True:
        with conn.idle():
            line = conn.recv(100)
        if not line:
            return
        if line == b"wait":
            gevent.sleep(3600)
        conn.sendall(line)

configure_logging()
server = Server("127.0.0.1:0", handler, access_log="text", handler_timeout=float(sys.argv[1]))
server.start()
gevent.spawn(say, server.port)
begun = time.monotonic()
report = server.serve_forever(stop_timeout=float(sys.argv[2]))
say(report.finished, report.ended, *(round(cut.age) for cut in report.cut))
"""


@pytest.fixture
def start(python):
    def start_with(*arguments):
        process = python(APP, *arguments)
        return process, int(process.stdout.readline())

    return start_with


def set_clock(process, number):
    process.send_signal(number)
    assert process.stdout.readline() == b"set\n"


@contextlib.contextmanager
def client_of_stopping(start, step):
    process, port = start(HOUR, HOUR)
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        assert process.stdout.readline() == b"accepted\n"
        set_clock(process, step)
        process.terminate()
        yield process, client


STEPS = pytest.mark.parametrize("step", [signal.SIGUSR1, signal.SIGUSR2], ids=["back", "forward"])


@pytest.mark.slow
@STEPS
def test_a_stop_takes_as_long_as_ever(start, step):
    with client_of_stopping(start, step) as (process, client):
        # It has a second for its first request, and has it whole.
        client.settimeout(SOON)
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        assert client.recv(100) == b""
    output, errors = process.communicate(timeout=SOON)
    assert output == b"1 0\n", errors
    assert float(errors.split(b"duration=")[1].split()[0]) < SOON


@pytest.mark.slow
@STEPS
def test_a_silent_client_holds_up_a_stop_no_longer_and_is_not_cut(start, step):
    with client_of_stopping(start, step) as (process, client):
        assert client.recv(100) == b""
    output, errors = process.communicate(timeout=SOON)
    assert output == b"1 0\n", errors


@pytest.mark.slow
@STEPS
def test_what_is_cut_has_its_true_age(start, step):
    process, port = start(HOUR, 0.1)
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(b"wait")
        assert process.stdout.readline() == b"accepted\n"
        set_clock(process, step)
        process.terminate()
        output, errors = process.communicate(timeout=SOON)
    assert output.startswith(b"0 1 "), errors
    assert 0 <= int(output.split()[2]) < SOON


@pytest.mark.slow
@STEPS
def test_a_handler_has_its_time(start, step):
    process, port = start(0.3, HOUR)
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        begun = time.monotonic()
        client.sendall(b"wait")
        assert process.stdout.readline() == b"accepted\n"
        set_clock(process, step)
        assert client.recv(100) == b""
        assert 0.2 < time.monotonic() - begun < SOON


def test_the_time_of_a_connection_is_that_of_the_clock_as_it_is_set(monkeypatch):
    moment = time.monotonic() - 60
    first = wall_time(moment)
    assert abs(time.time() - 60 - first) < 1
    assert wall_time(moment) == first  # and the same at each call
    usual = time.time
    monkeypatch.setattr(clock, "time", lambda: usual() + HOUR)
    assert abs(wall_time(moment) - first - HOUR) < 1
    monkeypatch.undo()
    assert abs(wall_time(moment) - first) < 1


def test_started_at_is_when_it_was_accepted(serve, connect):
    seen = []
    server = serve(lambda conn: seen.append((conn.started_at, conn.started_at)))
    connect(server)
    wait_until(lambda: seen)
    assert abs(seen[0][0] - time.time()) < SOON
    assert seen[0][0] == seen[0][1]
