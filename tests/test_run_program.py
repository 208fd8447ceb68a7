"""run() in programs as a user writes them: what they say of themselves, and of what stops everybody."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import gevent
import pytest

from gtcpserver import BlockDetector, ConfigError, GtcpServerError, run
from gtcpserver.diagnostics import block_detector
from gtcpserver.diagnostics.block_detector import PLACES, _Holder, _ThreadClock, _Times, start_detector
from kit.patience import SOON
from kit.waiting import wait_until

#: `line` is what the handler does with each byte; HEAD comes first, OPTIONS is what run() is called with.
PROGRAM = """
{head}
from gtcpserver import run

def handle(conn):
    while byte := conn.recv(1):
        {line}
        conn.sendall(byte)

if __name__ == "__main__":
    run({handler}, "127.0.0.1:0"{options})
"""

COMPUTE = """
import time
def compute():
    until = time.thread_time() + 0.4
    while time.thread_time() < until: pass
"""

FETCH = """
import http.client
def fetch():
    connection = http.client.HTTPConnection("127.0.0.1", {port})
    connection.request("GET", "/")
    connection.getresponse().read()  # line 7 of the program
"""

SLEEP_IN_C = """
from gevent import monkey
def sleep_in_c():
    monkey.get_original("time", "sleep")(0.3)
"""

OWN_DETECTOR = """
import time
from gtcpserver import BlockDetector
BlockDetector(0.05).start()
"""

PARTLY_PATCHED = """
from gevent import monkey; monkey.patch_all(thread=False)
from time import sleep
import threading
lock = threading.Lock()
"""

OWN_HANDLER = """
import logging
logging.getLogger("gtcpserver").addHandler(logging.StreamHandler())
logging.getLogger("gtcpserver").setLevel("INFO")
"""

BLOCKED = "the event loop was blocked for"
LATE = "monkey_patch=True comes too late"


class Program:
    """A program that runs, and what it has said."""

    def __init__(self, folder, head, line, options, handler, source):
        path = folder / "app.py"
        path.write_text(source or PROGRAM.format(head=head, line=line, options=options, handler=handler))
        self.process = subprocess.Popen(
            [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        self._said, self._news, self._ended = "", threading.Condition(), False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self._said += line
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern):
        """Wait for a line; returns the match."""

        def find():
            return re.search(pattern, self._said)

        with self._news:
            assert self._news.wait_for(lambda: find() or self._ended, SOON), self._said
            found = find()
            assert found, self._said
            return found

    def connect(self):
        port = int(self.wait_for(r"listening on 127\.0\.0\.1:(\d+)")[1])
        return socket.create_connection(("127.0.0.1", port), SOON)

    def ask(self, times=1):
        with self.connect() as client:
            for _ in range(times):
                client.sendall(b"x")
                assert client.recv(1) == b"x"

    def stop(self):
        """SIGTERM ends it in order; returns all that it has said."""
        self.process.send_signal(signal.SIGTERM)
        self._reader.join(SOON)
        assert self.process.wait(SOON) == 0, self._said
        return self._said

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def start(tmp_path):
    programs = []

    def start(line="pass", options="", head="", handler="handle", source=""):
        programs.append(Program(tmp_path, head, line, options, handler, source))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


# -- what stops everybody ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_call_that_blocks_is_reported_once_with_its_line_and_monkey_patching(start):
    program = start("time.sleep(0.4)", head="import time")
    program.ask()
    program.wait_for("not monkey-patched")
    program.ask(2)
    said = program.stop()
    (report,) = re.findall(f"{BLOCKED} .*", said)
    assert re.fullmatch(rf"{BLOCKED} 0\.\d\d s by \S+/app\.py:7 in handle", report)
    assert "        time.sleep(0.4)\n" in said
    assert "Pass monkey_patch=True to run(), or begin the program with 'from gevent import monkey; " in said


@pytest.mark.slow
def test_computation_is_reported_with_threads_and_processes(start):
    program = start("compute()", head=COMPUTE)
    program.ask()
    program.wait_for("This is computation. Run it in a thread, .* or in a process")
    assert re.search(r"app\.py:\d+ in compute", program.stop())


@pytest.mark.slow
def test_a_library_that_blocks_is_reported_with_the_program_s_own_line(start):
    listener = socket.create_server(("127.0.0.1", 0))
    program = start("fetch()", head=FETCH.format(port=listener.getsockname()[1]))
    with listener, program.connect() as client:
        client.sendall(b"x")
        peer, _ = listener.accept()
        with peer:
            # It is told while it blocks: it may never end.
            found = program.wait_for(
                rf"{BLOCKED} .* by \S+/socket\.py:\d+ in readinto, called at \S+/app\.py:(\d+) in fetch"
            )
            assert int(found[1]) == 7
            program.wait_for("Pass monkey_patch=True")
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert client.recv(1) == b"x"


@pytest.mark.slow
def test_worker_processes_report_a_place_once_for_all(start):
    program = start("time.sleep(0.3)", ", workers=2", head="import time")
    # While one of them is blocked, the kernel gives connections to the other as well.
    clients = [program.connect() for _ in range(8)]
    for client in clients:
        client.sendall(b"x")
    for client in clients:
        assert client.recv(1) == b"x"
        client.close()
    program.wait_for("Pass monkey_patch=True")
    said = program.stop()
    assert said.count(BLOCKED) == 1
    assert said.count("listening on") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "head"),
    [(", block_detector=None", ""), (", monkey_patch=True", ""), ("", "from gevent import monkey; monkey.patch_all()")],
)
def test_nothing_watches_where_it_is_switched_off_or_the_program_is_patched(start, options, head):
    line = "conn.sendall(b'%d' % (block_detector._latest is not None))"
    program = start(line, options, head=f"{head}\nfrom gtcpserver.diagnostics import block_detector")
    with program.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"0"


@pytest.mark.slow
def test_a_patched_program_may_ask_for_it(start):
    program = start("sleep_in_c()", ", monkey_patch=True, block_detector=0.05", head=SLEEP_IN_C)
    program.ask()
    program.wait_for("in spite of monkey patching: .* Run it in a thread")


@pytest.mark.slow
def test_a_detector_of_the_program_s_own_stays_the_only_one(start):
    program = start("time.sleep(0.3)", head=OWN_DETECTOR)
    program.ask(2)
    program.wait_for(f"{BLOCKED}(.|\n)*{BLOCKED}")  # it does not hold back what it has reported


def test_a_detector_that_cannot_start_leaves_the_server_alone(monkeypatch, caplog):
    def refuse(*_args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(block_detector, "_start_thread", refuse)
    assert start_detector(0.1, bytearray(PLACES)) is None
    assert not block_detector.is_watched()
    assert "what blocks the event loop will not be reported: can't start new thread" in caplog.text


def test_time_in_which_others_had_the_cpu_does_not_count():
    holder = _Holder([], 10.0, 10.1, _Times(1.0, 5.0))
    assert holder.seconds(11.0, _Times(1.2, 5.75)) == pytest.approx(0.25)
    assert holder.seconds(11.0, _Times(1.2, 0.0)) == 1.0  # /proc could be read before, and cannot now


def test_a_detector_leaves_no_descriptor_behind(monkeypatch):
    before = set(os.listdir("/proc/self/fd"))
    with BlockDetector(0.05):
        gevent.sleep(0.06)
    wait_until(lambda: set(os.listdir("/proc/self/fd")) <= before)
    monkeypatch.setattr(block_detector, "_start_thread", lambda *_args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BlockDetector(0.05).start()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_thread_clock_without_proc_tells_of_computation_alone():
    clock = _ThreadClock()
    clock.close()
    before = clock.read()
    sum(range(1_000_000))
    after = clock.read()
    assert after.computing > before.computing
    assert after.starved == 0.0


# -- monkey_patch=True -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "options"), [("handle", ""), ("'app:handle'", ""), ("'app:handle'", ", workers=1")]
)
@pytest.mark.parametrize(
    "sleep", ["import time; sleep = lambda seconds: time.sleep(seconds)", "from time import sleep"]
)
def test_monkey_patch_lets_blocking_calls_wait(start, handler, options, sleep):
    head = f"{sleep}\nnow = set()"
    # "a" waits until "b" is here.
    line = "now.add(byte)\n        while b'b' not in now: sleep(0.01)"
    program = start(line, f", monkey_patch=True{options}", head, handler)
    with program.connect() as first, program.connect() as second:
        first.sendall(b"a")
        second.sendall(b"b")
        assert (first.recv(1), second.recv(1)) == (b"a", b"b")
    assert LATE not in program.stop()


@pytest.mark.slow
def test_monkey_patch_complains_of_what_came_before_it(start):
    head = """
import queue, socket, threading, ssl
from time import sleep
lock = threading.Lock()
waiting = queue.Queue()
context = ssl.create_default_context()
class MySocket(socket.socket): pass
"""
    program = start(head=head, options=", monkey_patch=True")
    line = program.wait_for(f"{LATE} .*")[0]
    for name in (
        "__main__.lock (a lock)",
        "__main__.waiting (a Queue)",
        "__main__.MySocket (a subclass)",
        "__main__.context (a SSLContext)",
    ):
        assert name in line
    assert "sleep" not in line
    assert "run('module:handler')" in line
    program.ask()
    assert "gevent.monkey" not in program.stop()  # nor another warning of the same


@pytest.mark.slow
def test_monkey_patch_of_a_patched_program_says_nothing(start):
    program = start(head=PARTLY_PATCHED, options=", monkey_patch=True")
    program.ask()
    assert "WARNING" not in program.stop()


# -- log lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_without_logging_says_where_it_listens_and_how_it_stopped(start):
    program = start()
    program.ask()
    said = program.stop()
    assert re.match(
        r"\S+Z INFO gtcpserver: listening on 127\.0\.0\.1:\d+ \(pid \d+, 1 accept loop, pool 10000\)\n", said
    )
    assert re.search(r"Z INFO gtcpserver: stopped: [01] connections? finished, 0 cut\n$", said)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ", workers=1"])
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("import logging; logging.basicConfig(format='MINE %(message)s', level='INFO')", "MINE listening on"),
        (OWN_HANDLER, "listening on"),
    ],
)
def test_logging_that_the_program_has_set_up_stays(start, head, expected, options):
    program = start(head=head, options=options)
    program.ask()
    said = program.stop()
    assert len(re.findall(f"^{expected}", said, re.MULTILINE)) == 1
    assert "INFO gtcpserver" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [
        "logging.getLogger('gtcpserver').setLevel('WARNING')",
        "logging.lastResort = None",
        "logging.getLogger('gtcpserver').propagate = False",
    ],
)
def test_a_program_can_have_it_silent(start, tmp_path, head):
    path = tmp_path / "socket"
    source = PROGRAM.format(head=f"import logging; {head}", line="pass", handler="handle", options="")
    program = start(source=source.replace("127.0.0.1:0", f"unix:{path}"))
    while not path.exists():
        assert program.process.poll() is None
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(str(path)):
            pass
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    assert program.stop() == ""


def test_logging_is_not_touched_in_a_process_that_has_handlers():
    before = list(logging.getLogger().handlers)
    assert before  # pytest's
    with pytest.raises(GtcpServerError):
        run(lambda _conn: None, "127.0.0.1:70000")
    assert logging.getLogger().handlers == before


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [None, 1])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_detector": 0.001}, r"block_detector must be a number, 0\.01 or more, or None .*, got 0\.001"),
        ({"block_detector": "yes"}, r"block_detector must be a number, .*, got 'yes'"),
        ({"stop_timeout": -1}, r"stop_timeout must be a number, 0 or more, or None to wait forever, got -1"),
    ],
)
def test_options_that_cannot_be(option, message, workers):
    with pytest.raises(ConfigError, match=message):
        run(lambda _conn: None, "127.0.0.1:0", workers=workers, **option)


@pytest.mark.slow
@pytest.mark.parametrize("options", [", stop_timeout=0", ", stop_timeout=0, workers=1"])
def test_stop_timeout_cuts_what_has_not_finished(start, options):
    program = start("gevent.sleep(1000)", options, head="import gevent")
    with program.connect() as client:
        client.sendall(b"x")
        with program.connect() as later:  # the handler of the first has begun when the second is accepted
            later.sendall(b"y")
            said = program.stop()
    assert re.search(r"stopped: \d connections? finished, [12] cut", said)
