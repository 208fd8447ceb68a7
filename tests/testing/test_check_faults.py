"""gtcpserver.testing.check_faults: it finds what bad handlers do, and nothing in good ones."""

import os
import re
import sys
import threading

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from gevent.lock import Semaphore

from gtcpserver import ConfigError, ProxyProtocol
from gtcpserver.testing import FAULTS, certificates, check_faults, serving
from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import children
from kit.waiting import wait_until

sys.path.append(str(ROOT / "examples"))

import echo
import line_protocol

#: For good ones: nothing is waited for, unless the machine is busy.
PATIENT = {"patience": SOON}

#: For bad ones: it has to be waited for.
QUICK = {"patience": 2.0}


def lines(conn):
    """A good one: answers each line with itself."""
    while True:
        line = b""
        while not line.endswith(b"\n"):
            data = conn.recv(1)
            if not data:
                return
            line += data
            if len(line) > 100:
                return
        conn.sendall(line)


LINES = [(b"one\n", b"one\n"), (b"two\n", re.compile(rb"t.o\n"))]


def found(report):
    print(report)
    return {problem.kind for problem in report.problems}


# -- good ones ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "conversation"),
    [
        (echo.echo, [(b"hello", b"hello"), (b"x" * 5000, b"x" * 5000)]),
        (lines, LINES),
        (line_protocol.handle, [(b"SET a 1\nx\n", b"OK\n"), (b"GET a\n", b"VALUE 1\nx\n"), (b"QUIT\n", b"")]),
        (lambda conn: conn.sendall(b"hello\n"), [(b"", b"hello\n")]),
    ],
    ids=["echo", "lines", "line_protocol", "greeter"],
)
def test_a_good_handler_passes(handler, conversation):
    report = check_faults(handler, conversation, **PATIENT)
    assert report.ok, report
    assert set(report.played) == {*FAULTS, "many connections"}
    assert report.connections > 300
    assert str(report).startswith("nothing found: 13 faults, ")


@pytest.mark.slow
def test_time_outs_are_waited_for():
    report = check_faults(lines, LINES, timeout=1, stall_timeout=1, **PATIENT)
    assert report.ok, report


@pytest.mark.slow
def test_a_server_with_tls_and_a_balancer_in_front_passes():

    def handler(conn):
        assert conn.client_address == ("192.0.2.7", 4000)
        assert conn.tls.version == "TLSv1.3"
        lines(conn)

    with certificates() as made:
        report = check_faults(
            handler,
            LINES,
            tls=made.server,
            proxy_protocol=ProxyProtocol(["127.0.0.0/8"]),
            client_tls=made.client,
            client_proxy="192.0.2.7:4000",
            **PATIENT,
        )
    assert report.ok, report


# -- bad ones ----------------------------------------------------------------------------------------------------------

kept = []


def leaks_a_descriptor(conn):
    os.open("/dev/null", os.O_RDONLY)
    lines(conn)


def leaks_a_descriptor_at_a_reset(conn):
    fd = os.open("/dev/null", os.O_RDONLY)
    lines(conn)
    os.close(fd)


def keeps_the_socket(conn):
    kept.append(conn.dup())
    lines(conn)


def leaves_a_greenlet(conn):
    gevent.spawn(Event().wait)
    lines(conn)


def keeps_an_object(conn):
    kept.append(object())
    lines(conn)


def keeps_a_buffer(conn):
    kept.append(b"x" * 200_000)  # more in all than what a process that has run for long has free
    lines(conn)


def reads_without_a_limit(conn):
    data = bytearray()
    while more := conn.recv(65536):
        data += more
        if b"\n" in more:
            conn.sendall(data)
            data.clear()


def raises_at_half_a_line(conn):
    while data := conn.recv(1000):
        if not data.endswith(b"\n"):
            raise RuntimeError("half a line")
        conn.sendall(data)


def takes_a_segment_for_a_line(conn):
    while data := conn.recv(1000):
        conn.sendall(data.split(b"\n")[0] + b"\n")


def spins_at_the_end(conn):
    while True:
        data = conn.recv(1000)
        conn.sendall(data)


def spins_and_lets_others_run(conn):
    while True:
        conn.sendall(conn.recv(1000))
        gevent.sleep(0)


def computes_at_the_end(conn):
    lines(conn)
    while True:
        pass


def spins_whatever_happens(conn):
    while True:
        try:
            conn.sendall(conn.recv(1000))
        except OSError:
            pass


def swallows_its_end(conn):
    while True:
        try:
            data = conn.recv(1000)
        except gevent.GreenletExit:
            continue
        if not data:
            return
        conn.sendall(data)


def waits_for_what_never_comes(conn):
    lines(conn)
    Event().wait()


lock = Semaphore()


def holds_a_lock_after_a_reset(conn):
    while data := conn.recv(1000):
        lock.acquire()
        conn.sendall(data)
        conn.recv(1, 2)  # MSG_PEEK: the client reads before the next comes
        lock.release()


native_lock = monkey.get_original("threading", "Lock")()


def holds_the_whole_process(conn):
    native_lock.acquire()
    lines(conn)
    native_lock.release()


def ends_the_process(conn):
    try:
        lines(conn)
    except ConnectionResetError:
        os._exit(7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "kind", "says"),
    [
        (leaks_a_descriptor, "descriptors", r"^- as given: descriptors stay: 1 more each time this is done$"),
        (leaks_a_descriptor_at_a_reset, "descriptors", r"^- (cut|reset): descriptors stay: "),
        (keeps_the_socket, "descriptors", r"descriptors stay: "),
        (leaves_a_greenlet, "greenlets", r"^- as given: greenlets stay: 1 more"),
        (keeps_an_object, "memory", r"^- many connections: each connection leaves about 1 objects behind"),
        (keeps_a_buffer, "memory", r"memory grew by \d+\.\d MiB in all"),
        (reads_without_a_limit, "memory", r"^- rubbish: one client that sent .* made memory grow by \d+\.\d MiB"),
        (
            raises_at_half_a_line,
            "handler error",
            r"(?s)^- byte by byte: the handler raised .*RuntimeError: half a line",
        ),
        (
            takes_a_segment_for_a_line,
            "conversation",
            r"^- one segment: expected what matches b't.o..n' after b'two.n', ",
        ),
        # The event loop runs on if the connection has waited before: each read at its end goes round once.
        (spins_at_the_end, ("blocked", "endless handler"), r" in spins_at_the_end$"),
        (
            spins_and_lets_others_run,
            "endless handler",
            r"3 handlers still running 2.0 s after the client left:\n(.*\n)*.* in spins_and_lets_others_run$",
        ),
        (spins_whatever_happens, ("blocked", "endless handler"), r" in spins_whatever_happens$"),
        (computes_at_the_end, "blocked", r"stands still, for all clients, here:\n.* in computes_at_the_end$"),
        (swallows_its_end, "endless handler", r"^- end: 4 handlers still running when told to end at a stop"),
        (waits_for_what_never_comes, "endless handler", r"in waits_for_what_never_comes$"),
        (holds_a_lock_after_a_reset, "not served", r"a good client is not served"),
        (holds_the_whole_process, "blocked", r"in holds_the_whole_process$"),
        (ends_the_process, "died", r"^- (cut|reset): it has ended: exit status 7"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_handler_is_found_out(handler, kind, says):
    report = check_faults(handler, LINES, **QUICK)
    assert not report.ok
    assert found(report) & ({kind} if isinstance(kind, str) else set(kind))
    assert re.search(says, str(report), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("handler", [keeps_a_buffer, reads_without_a_limit])
def test_memory_is_found_although_the_process_has_much_of_it_free(handler):
    del kept[:]
    bytearray(30 << 20)  # glibc maps nothing smaller apart once that is freed: mallopt(3), M_MMAP_THRESHOLD
    pieces = [bytearray(100_000) for _ in range(3000)]
    last = pieces.pop()
    del pieces[:]
    report = check_faults(handler, LINES, **QUICK)
    assert "memory" in found(report)
    assert last


@pytest.mark.slow
def test_clients_that_stop_must_lose_their_connection_where_that_is_asked_for():
    report = check_faults(lines, LINES, stall_timeout=0.1, **QUICK, leave_out=["many connections"])
    assert found(report) == {"stall"}
    assert "stall: a client that stopped after 0 of 8 bytes still has its connection" in str(report)


@pytest.mark.slow
def test_silent_clients_that_take_all_places_are_told():
    report = check_faults(lines, LINES, pool=3, **QUICK)
    assert "silence: a good client is not served while 6 others say nothing" in str(report)


@pytest.mark.slow
def test_a_conversation_that_does_not_work_is_told_and_nothing_is_played():
    report = check_faults(lines, [(b"one\n", b"two\n")], **QUICK)
    assert [problem.text for problem in report.problems] == [r"expected b'two\n' after b'one\n', got b'one\n'"]
    assert report.played == ()


@pytest.mark.slow
def test_clients_that_get_no_tls_are_told():
    with certificates() as made:
        report = check_faults(lines, LINES, client_tls=made.client, **QUICK)
    assert [problem.kind for problem in report.problems] == ["conversation"], report
    assert "as given: the connection failed: " in str(report)


@pytest.mark.slow
def test_an_error_is_told_once():
    def handler(conn):
        conn.recv(1)  # otherwise the client may find its connection closed before it has said anything
        raise KeyError("always")

    report = check_faults(handler, [(b"x", b"")], **QUICK)
    assert [problem.kind for problem in report.problems] == ["handler error"]


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_test_s_greenlets_and_servers_do_not_run_in_the_other_process():
    here = os.getpid()

    def stray():
        while True:
            gevent.sleep(0)
            if os.getpid() != here:
                os.write(1, b"a greenlet of the test ran in the child\n")
                os._exit(9)

    busy = gevent.spawn(stray)
    with serving(lines) as server:
        report = gevent.spawn(check_faults, lines, LINES, leave_out=["many connections"]).get(timeout=SOON)
        assert server.stats().accepted == 0
    busy.kill()
    assert report.ok, report


@pytest.mark.slow
def test_a_handler_s_upstream_may_be_served_by_the_test():
    from gtcpserver import connect, relay

    with serving(lines) as upstream:

        def forward(conn):
            with connect(upstream.address) as other:
                relay(conn, other)

        report = check_faults(forward, LINES, **PATIENT)
    assert report.ok, report


@pytest.mark.slow
def test_a_lock_that_was_waited_for_in_the_test_works_in_the_other_process():
    shared = Semaphore()

    def handler(conn):
        with shared:
            data = conn.recv(100)
        conn.sendall(data)

    with shared:
        waiting = gevent.spawn(shared.acquire)
        gevent.sleep(0)
    waiting.join()
    shared.release()
    # A client that says nothing keeps the others out, until its time is over.
    report = check_faults(handler, [(b"x", b"x")], timeout=0.3, leave_out=["many connections"], **PATIENT)
    assert report.ok, report


@pytest.mark.slow
def test_it_leaves_nothing_in_the_test_s_process():
    def state():
        tasks = len(os.listdir("/proc/self/task"))
        return len(os.listdir("/proc/self/fd")), tasks, threading.active_count(), set(children(os.getpid()))

    check_faults(lines, LINES)
    before = state()
    check_faults(lines, LINES)
    check_faults(computes_at_the_end, LINES, **QUICK)
    wait_until(lambda: state() == before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"conversation": []}, "conversation must send or expect something, got nothing"),
        ({"conversation": [("x", b"")]}, r"conversation must be \(bytes to send, bytes or pattern.* got \('x', b''\)"),
        ({"conversation": [(b"x", re.compile("x"))]}, "conversation must be"),
        ({"patience": 0}, "patience must be"),
        ({"leave_out": ["cuts"]}, "leave_out must be a list of as given, one segment, .*; got 'cuts'"),
        ({"leave_out": "cut"}, "leave_out must be a list"),
        ({"timeout": -1}, "timeout must be"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(arguments, says):
    with pytest.raises(ConfigError, match=says):
        check_faults(lines, **{"conversation": LINES, **arguments})
