"""Stopping: nothing that was begun is lost, and the stop ends when the last handler does."""

import errno
import json
import os
import re
import select
import socket
import time

import gevent
import pytest
from gevent.event import Event

from gtcpserver import GtcpServerError, HandlerPool, ListenConfig, Server, State, StopReport
from gtcpserver.listening import draining
from gtcpserver.server import stopping as stopping_module
from kit.clients import ask
from kit.handlers import echo, idle_echo
from kit.patience import SOON
from kit.waiting import wait_until

LONG = 3600.0


def answer_one(conn):
    conn.sendall(conn.recv(1))


@pytest.fixture
def go():
    """Handlers of a test wait on it; set in the end, so that a failed test does not leave them waiting."""
    event = Event()
    yield event
    event.set()


def outcome(client):
    """How a connection ended that has sent its request: the answer, "cut" for a close without one, or the error."""
    try:
        return client.recv(100).decode() or "cut"
    except OSError as error:
        return type(error).__name__
    finally:
        client.close()


# -- what is queued --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("loops", "pool"), [(1, None), (2, None), (2, 10)])
def test_stop_serves_connections_already_queued(serve, connect, spawn_thread, loops, pool):
    server = serve(answer_one, accept_loops=loops, pool=pool)
    clients = [connect(server) for _ in range(400)]
    for client in clients:
        client.sendall(b"x")
    assert server.accepted_connections == 0  # the event loop has not run since
    outcomes = spawn_thread(lambda: [outcome(client) for client in clients])
    report = server.stop(SOON)
    assert outcomes.get(timeout=SOON) == ["x"] * 400
    assert report == StopReport(finished=400, ended=0)
    assert server.accepted_connections == 400
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_stop_serves_connections_queued_because_the_pool_is_full(serve, connect, spawn_thread, go):
    def handler(conn):
        conn.sendall(conn.recv(1))
        go.wait()

    server = serve(handler, pool=2, accept_loops=2)
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.sendall(b"x")
    wait_until(lambda: server.active_connections == 2)
    stopping = gevent.spawn(server.stop, SOON)
    outcomes = spawn_thread(lambda: [outcome(client) for client in clients])
    wait_until(lambda: all(acceptor.closed for acceptor in server._state.acceptors))
    assert server.active_connections == 2
    go.set()
    assert outcomes.get(timeout=SOON) == ["x"] * 20
    assert stopping.get(timeout=SOON) == StopReport(20, 0)
    assert server.stats().peak == 2
    assert server.pool.places.taken == 0


def test_stop_reports_queued_connections_it_could_not_serve_in_time(serve, connect, go):
    server = serve(lambda conn: go.wait(), pool=2)
    clients = [connect(server) for _ in range(5)]
    wait_until(lambda: server.active_connections == 2)
    report = server.stop(0.1)
    assert (report.finished, report.ended) == (0, 5)
    assert sorted(bool(cut.where) for cut in report.cut) == [False] * 3 + [True] * 2
    assert {cut.peer for cut in report.cut} == {f"127.0.0.1:{client.getsockname()[1]}" for client in clients}


# Connects `count` times at once for each line it reads, sends a byte on each connection and waits for it to come back.
# Writes how they ended.
BURSTS = """
    import collections, json, selectors, socket, sys

    for line in sys.stdin:
        port, count = map(int, line.split())
        ends = collections.Counter()
        selector = selectors.DefaultSelector()
        for number in range(count):
            if number == count // 10:
                print("connecting", flush=True)
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            selector.register(sock, selectors.EVENT_WRITE)
        while selector.get_map():
            events = selector.select(timeout=10)
            if not events:
                ends["no answer"] += len(selector.get_map())
                break
            for key, mask in events:
                sock = key.fileobj
                try:
                    if mask & selectors.EVENT_WRITE:
                        sock.send(b"x")
                        selector.modify(sock, selectors.EVENT_READ)
                        continue
                    ends["served" if sock.recv(1) else "cut"] += 1
                except OSError as error:
                    ends[type(error).__name__] += 1
                selector.unregister(sock)
                sock.close()
        print(json.dumps(ends), flush=True)
"""


@pytest.mark.slow
def test_closing_one_accept_loop_of_two_under_bursts_loses_nothing(serve, python, in_thread):
    process = python(BURSTS)
    for _ in range(20):
        server = serve(answer_one, accept_loops=2)
        process.stdin.write(f"{server.port} 500\n".encode())
        process.stdin.flush()
        assert in_thread(process.stdout.readline) == b"connecting\n"
        server.close_accept_loop(0)
        assert json.loads(in_thread(process.stdout.readline)) == {"served": 500}
        assert server.accepted_connections == 500
        server.halt()


def test_connection_that_comes_after_the_last_accept_of_one_loop_goes_to_the_other(
    serve, connect, spawn_thread, monkeypatch
):
    server = serve(answer_one, accept_loops=2)
    late = []

    def close(close=server._state.acceptors[0].close):
        late.extend(connect(server) for _ in range(50))
        close()

    monkeypatch.setattr(server._state.acceptors[0], "close", close)
    server.close_accept_loop(0)
    for client in late:
        client.sendall(b"x")
    outcomes = spawn_thread(lambda: [outcome(client) for client in late])
    assert outcomes.get(timeout=SOON) == ["x"] * 50


@pytest.fixture(params=["whatever this system has", "ttl"])
def way(request, monkeypatch):
    """How the stop of a server leaves new connections unanswered; an ordinary user may have the "ttl" only."""
    if request.param == "ttl":
        monkeypatch.setattr(draining, "_drop_by_filter", lambda listening: False)
    return request.param


@pytest.mark.slow
def test_connection_that_comes_after_the_last_accept_of_a_stop_is_not_begun(serve, monkeypatch, way):
    server = serve(answer_one)
    with socket.socket() as late:
        late.setblocking(False)

        def close(close=server._state.acceptors[0].close):
            assert late.connect_ex(("127.0.0.1", server.port)) == errno.EINPROGRESS
            assert select.select([], [late], [], 0.05) == ([], [], [])
            close()

        monkeypatch.setattr(server._state.acceptors[0], "close", close)
        server.stop(SOON)
        assert select.select([], [late], [], SOON) == ([], [late], [])
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


@pytest.mark.slow
def test_connection_whose_handshake_is_under_way_when_a_stop_begins_is_served(serve, connect, in_thread, way):
    def answer_two(conn):
        with conn.idle():  # which a stop would end at once if the request had not come with the connection
            conn.sendall(conn.recv(1))
        conn.sendall(conn.recv(1))

    # defer_accept: its last ACK is not taken, as if it were still on its way.
    server = serve(answer_two, listen=ListenConfig(defer_accept=60))
    client = connect(server)
    stop = gevent.spawn(server.stop, SOON)
    server.stopping_event.wait()
    assert server.accepted_connections == 0
    for _ in range(2):
        client.sendall(b"x")
        assert in_thread(client.recv, 1) == b"x"
    client.close()
    assert stop.get(timeout=SOON) == StopReport(finished=1, ended=0)


# Serves as an ordinary user: for each line it reads, an address, it starts a server, and stops it at the next line.
ORDINARY_USER = """
    import json, os, sys
    import gevent
    from gtcpserver import Server

    def answer_one(conn):
        conn.sendall(conn.recv(1))

    # Python may be where an ordinary user may not read: all that a server imports late comes now.
    warm = Server("127.0.0.1:0", answer_one)
    warm.start()
    warm.stop(15)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)

    def read():
        return gevent.get_hub().threadpool.apply(sys.stdin.readline).strip()

    while address := read():
        server = Server(address, answer_one)
        server.start()
        print(server.port, flush=True)
        read()
        report = server.stop(15)
        print(json.dumps([server.accepted_connections, report.ended]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become an ordinary user")
@pytest.mark.parametrize("address", ["127.0.0.1:0", "*:0"])
def test_stop_of_an_ordinary_users_server_under_bursts_resets_nobody(python, in_thread, address):
    server, bursts = python(ORDINARY_USER), python(BURSTS)

    def tell(process, line):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        return in_thread(process.stdout.readline)

    for _ in range(3):
        port = int(tell(server, address))
        assert tell(bursts, f"{port} 400") == b"connecting\n"
        accepted, ended = json.loads(tell(server, "stop"))
        ends = json.loads(in_thread(bursts.stdout.readline))
        assert set(ends) <= {"served", "ConnectionRefusedError"}
        assert sum(ends.values()) == 400
        assert ends.get("served", 0) == accepted
        assert ended == 0


# Clients in several threads connect, send and wait for the answer, again and again, until there is nobody to connect
# to. Writes how all connections ended.
CLIENTS = """
    import collections, json, socket, sys, threading

    address, threads = sys.argv[1], int(sys.argv[2])
    ends = collections.Counter()
    lock = threading.Lock()
    begun = threading.Semaphore(0)

    def connect():
        if address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            target = address[5:]
        else:
            sock = socket.socket()
            target = ("127.0.0.1", int(address.rpartition(":")[2]))
        sock.settimeout(60)
        try:
            sock.connect(target)
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            return None
        return sock

    def run():
        while (sock := connect()) is not None:
            try:
                sock.sendall(b"x")
                end = "served" if sock.recv(1) else "cut"
            except OSError as error:
                end = type(error).__name__
            sock.close()
            with lock:
                ends[end] += 1
            begun.release()

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for _ in range(100):
        begun.acquire()
    print("under load", flush=True)
    for worker in workers:
        worker.join()
    print(json.dumps(ends), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "tcp with 2 accept loops", "unix"])
def test_stop_under_load_resets_nobody(serve, python, in_thread, tmp_path, kind):
    address = f"unix:{tmp_path}/s.sock" if kind == "unix" else "127.0.0.1:0"
    server = serve(answer_one, address, accept_loops=2 if "2" in kind else 1)
    process = python(CLIENTS, server.address, 20)
    assert in_thread(process.stdout.readline) == b"under load\n"
    report = server.stop(SOON)
    ends = json.loads(in_thread(process.stdout.readline))
    assert ends == {"served": server.accepted_connections}
    assert report.ended == 0


@pytest.mark.slow
def test_port_can_be_used_again_at_once(serve, connect, in_thread):
    server = serve(echo)
    address = server.address
    for _ in range(5):
        # Closed by the server first: its side stays in TIME-WAIT.
        clients = [connect(server) for _ in range(5)]
        for client in clients:
            assert in_thread(ask, client) == b"hello"
        assert server.stop(0).ended == 5
        server = serve(echo, address)


def test_closing_the_last_accept_loop_or_an_unknown_one_is_refused(serve):
    server = serve(echo, accept_loops=2)
    with pytest.raises(GtcpServerError, match="accept loop must be 0 to 1, got 2"):
        server.close_accept_loop(2)
    server.close_accept_loop(1)
    with pytest.raises(GtcpServerError, match=re.escape(f"{server.address} has one accept loop; use stop()")):
        server.close_accept_loop(0)


def test_accept_loops_closed_at_the_same_time(serve, connect, in_thread):
    server = serve(echo, accept_loops=4)
    closing = [gevent.spawn(server.close_accept_loop, index) for index in (0, 1, 2)]
    gevent.joinall(closing, timeout=SOON, raise_error=True)
    for _ in range(20):
        client = connect(server)
        assert in_thread(ask, client) == b"hello"
    assert server.accepted_connections == 20
    assert len(server._state.acceptors) == 1


def test_stop_while_an_accept_loop_is_being_closed(serve, connect, spawn_thread):
    server = serve(answer_one, accept_loops=3)
    clients = [connect(server) for _ in range(30)]
    for client in clients:
        client.sendall(b"x")
    outcomes = spawn_thread(lambda: [outcome(client) for client in clients])
    closing = gevent.spawn(server.close_accept_loop, 1)
    gevent.sleep(0)
    report = server.stop(SOON)
    closing.get(timeout=SOON)
    assert outcomes.get(timeout=SOON) == ["x"] * 30
    assert report.ended == 0
    assert server.active_connections == 0


# -- handlers --------------------------------------------------------------------------------------------------------


def start_busy(serve, connect, handler, count=50, **options):
    server = serve(handler, **options)
    clients = [connect(server) for _ in range(count)]
    for client in clients:
        client.sendall(b"x")
    wait_until(lambda: server.stats().bytes_received == count)
    return server, clients


def test_stop_waits_for_handlers_and_returns_when_the_last_one_does(serve, connect, spawn_thread, go):
    left = []

    def handler(conn):
        conn.recv(1)
        try:
            go.wait()
            conn.sendall(b"done")
        finally:
            left.append(conn)

    server, clients = start_busy(serve, connect, handler)
    stopping = gevent.spawn(server.stop, LONG)
    wait_until(lambda: server._state.acceptors[0].closed)
    assert server.state is State.STOPPING
    assert server.stopping
    assert not stopping.ready()
    assert server.active_connections == 50
    go.set()
    outcomes = spawn_thread(lambda: [outcome(client) for client in clients])
    assert stopping.get(timeout=SOON) == StopReport(finished=50, ended=0)
    assert len(left) == 50
    assert outcomes.get(timeout=SOON) == ["done"] * 50


@pytest.mark.slow
def test_stop_without_time_out_waits_as_long_as_it_takes(serve, connect, spawn_thread, go):
    def handler(conn):
        conn.recv(1)
        go.wait()
        conn.sendall(b"done")

    server, clients = start_busy(serve, connect, handler, count=1)
    stopping = gevent.spawn(server.stop, None)
    assert not server.wait_stopped(0.3)
    go.set()
    assert spawn_thread(outcome, clients[0]).get(timeout=SOON) == "done"
    assert stopping.get(timeout=SOON) == StopReport(1, 0)
    assert server.wait_stopped(0)


@pytest.mark.slow
def test_stop_ends_handlers_at_its_time_out_and_says_what_they_did(serve, connect, go):
    finished, ended = [], []

    def handler(conn):
        number = conn.recv(2)
        conn.sendall(b"three")
        try:
            if number == b"xa":
                conn.server.stopping_event.wait()
                finished.append(conn)
            else:
                wait_here()
        finally:
            ended.append(conn)

    def wait_here():
        go.wait()

    server = serve(handler)
    clients = [connect(server) for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(b"xa" if number < 20 else b"xb")
    wait_until(lambda: server.stats().bytes_sent == 250)
    report = server.stop(1)
    assert (report.finished, report.ended, len(report.cut)) == (20, 30, 30)
    assert (len(finished), len(ended)) == (20, 50)
    assert {cut.peer for cut in report.cut} == {f"127.0.0.1:{client.getsockname()[1]}" for client in clients[20:]}
    for cut in report.cut:
        assert (cut.bytes_received, cut.bytes_sent, cut.ended) == (2, 5, True)
        assert 0.15 < cut.age < SOON
        assert any(re.fullmatch(r"test_stop\.py:\d+ in wait_here", frame) for frame in cut.where)
        assert "2 bytes in, 5 out" in str(cut)
        assert cut.peer in str(cut)
    assert server.active_connections == server.stats().handlers == 0
    assert server.stats().handler_errors == 0


def test_age_and_peer_of_a_cut_unix_connection(serve, connect, go, tmp_path):
    server = serve(lambda conn: go.wait(), f"unix:{tmp_path}/s.sock")
    connect(server)
    wait_until(lambda: server.active_connections == 1)
    (cut,) = server.stop(0).cut
    assert cut.peer == "unix:"


@pytest.mark.slow
def test_handler_that_swallows_greenlet_exit_once_is_told_again(serve, connect, go):
    swallowed = []

    def handler(conn):
        conn.recv(1)
        for _ in range(2):
            try:
                go.wait()
            except BaseException as error:
                swallowed.append(type(error).__name__)
        go.wait()

    server, _ = start_busy(serve, connect, handler, count=5)
    report = server.stop(0)
    assert (report.finished, report.ended) == (0, 5)
    assert all(cut.ended for cut in report.cut)
    assert swallowed == ["GreenletExit"] * 10
    assert server.active_connections == 0


@pytest.mark.slow
def test_handler_that_will_not_end_is_reported_and_its_socket_shut(serve, connect, in_thread, go, caplog):
    def handler(conn):
        conn.recv(1)
        while not go.is_set():
            try:
                go.wait()
            except BaseException:
                pass

    server, (client,) = start_busy(serve, connect, handler, count=1)
    report = server.stop(0)
    assert report.ended == 1
    assert not report.cut[0].ended
    assert "would not end" in str(report.cut[0])
    assert "a handler would not end: 127.0.0.1:" in caplog.text
    assert in_thread(client.recv, 1) == b""
    assert server.state is State.STOPPED
    go.set()
    wait_until(lambda: server.active_connections == server.stats().handlers == 0)


def test_halt_ends_everything_now(serve, connect, in_thread, go):
    ended = []

    def handler(conn):
        conn.recv(1)
        try:
            go.wait()
        finally:
            ended.append(conn)

    server, clients = start_busy(serve, connect, handler, count=10)
    report = server.halt()
    assert (report.finished, report.ended) == (0, 10)
    assert len(ended) == 10
    assert [in_thread(client.recv, 1) for client in clients] == [b""] * 10
    assert server.halt() is server.stop() is report
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_halt_cuts_a_stop_short(serve, connect, go):
    server, _ = start_busy(serve, connect, lambda conn: (conn.recv(1), go.wait()), count=3)
    stopping = gevent.spawn(server.stop, None)
    wait_until(lambda: server.state is State.STOPPING)
    report = server.halt()
    assert (report.finished, report.ended) == (0, 3)
    assert stopping.get(timeout=SOON) is report


def test_halt_cuts_the_wait_for_lingering_peers_short(serve, connect):
    server, _ = start_busy(serve, connect, lambda conn: conn.recv(1), count=1, linger=LONG)
    wait_until(lambda: server.stats().lingering == 1)
    stopping = gevent.spawn(server.stop, None)
    assert not server.wait_stopped(0.1)
    server.halt()
    assert stopping.get(timeout=SOON) == StopReport(0, 0)
    assert server.stats().lingering == 0


def test_stop_twice_and_at_the_same_time_is_one_stop(serve, connect, go):
    server, _ = start_busy(serve, connect, lambda conn: (conn.recv(1), go.wait(), conn.close()), count=3, linger=0)
    stops = [gevent.spawn(server.stop, LONG) for _ in range(3)]
    wait_until(lambda: server.state is State.STOPPING)
    go.set()
    reports = [stop.get(timeout=SOON) for stop in stops]
    assert reports[0] == StopReport(3, 0)
    assert all(report is reports[0] for report in [*reports, server.stop(), server.halt()])


def test_stop_before_the_start():
    server = Server("127.0.0.1:0", echo)
    assert server.stop(5) == StopReport(0, 0)
    assert server.state is State.STOPPED
    assert server.stopping_event.is_set()
    server = Server("127.0.0.1:0", echo)
    assert server.halt() == StopReport(0, 0)
    assert server.serve_forever() == StopReport(0, 0)


@pytest.mark.parametrize("method", ["stop", "halt"])
def test_stop_from_a_handler_begins_the_stop(serve, connect, in_thread, method):
    reports = []

    def handler(conn):
        conn.recv(1)
        reports.append(getattr(conn.server, method)())
        conn.sendall(b"bye")

    server = serve(handler)
    client = connect(server)
    client.sendall(b"x")
    assert in_thread(client.recv, 10) == b"bye"
    client.close()
    assert server.wait_stopped(SOON)
    assert reports == [StopReport(0, 0)]
    assert server.stop() == StopReport(finished=1, ended=0)


def test_stop_goes_on_when_its_caller_gives_up(serve, connect, go):
    server, _ = start_busy(serve, connect, lambda conn: (conn.recv(1), go.wait()), count=3, linger=0)
    with gevent.Timeout(0.1, False):
        server.stop(None)
    assert server.state is State.STOPPING
    killed = gevent.spawn(server.stop, None)
    gevent.sleep(0)
    killed.kill()
    go.set()
    assert server.wait_stopped(SOON)
    assert server.stop() == StopReport(3, 0)


@pytest.mark.parametrize("timeout", [-1, "5", float("nan")])
def test_wrong_stop_timeout_is_an_error_and_no_stop(serve, timeout):
    server = serve(echo)
    with pytest.raises(ValueError, match="timeout must be a number, 0 or more, or None to wait forever"):
        server.stop(timeout)
    assert server.state is State.SERVING


def test_handlers_with_work_of_their_own_hear_of_the_stop(serve, connect, in_thread):
    def handler(conn):
        conn.server.stopping_event.wait()
        assert conn.server.stopping
        conn.sendall(b"bye")

    server = serve(handler)
    client = connect(server)
    wait_until(lambda: server.active_connections == 1)
    stopping = gevent.spawn(server.stop, None)
    assert in_thread(outcome, client) == "bye"
    assert stopping.get(timeout=SOON) == StopReport(1, 0)


def test_pool_shared_by_two_servers_survives_the_stop_of_one(serve, connect, in_thread):
    pool = HandlerPool(4)
    one, two = serve(echo, pool=pool), serve(echo, pool=pool)
    first, second = connect(one), connect(two)
    assert in_thread(ask, first) == in_thread(ask, second) == b"hello"
    assert one.stop(0).ended == 1
    assert in_thread(ask, second) == b"hello"
    assert in_thread(ask, connect(two)) == b"hello"
    assert pool.places.taken == 2


# -- idle connections ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_idle_connections_do_not_hold_up_a_stop(serve, connect):
    # The clients never look at their connections, as those in a client's pool.
    server = serve(idle_echo, linger=LONG)
    clients = [connect(server) for _ in range(50)]
    wait_until(lambda: server.stats().idle == 50)
    assert server.stop(None) == StopReport(finished=50, ended=0)
    assert server.stats().idle_closed == 50
    assert [client.recv(1) for client in clients] == [b""] * 50


@pytest.mark.slow
def test_idle_connection_ends_at_once_although_the_pool_is_full(serve, connect, in_thread, go):
    def handler(conn):
        with conn.idle():
            request = conn.recv(10)
        if request:
            go.wait()
            conn.sendall(request)

    server = serve(handler, pool=1)
    busy, idle = connect(server), connect(server)
    wait_until(lambda: server.stats().idle == 2)
    busy.sendall(b"busy")
    wait_until(lambda: server.stats().idle == 1)
    stopping = gevent.spawn(server.stop, None)
    assert in_thread(outcome, idle) == "cut"
    assert server.active_connections == 1
    go.set()
    assert in_thread(outcome, busy) == "busy"
    assert stopping.get(timeout=SOON) == StopReport(2, 0)


@pytest.mark.slow
def test_request_that_has_arrived_when_the_stop_begins_is_served(serve, connect, spawn_thread):
    server = serve(idle_echo)
    clients = [connect(server) for _ in range(20)]
    wait_until(lambda: server.stats().idle == 20)
    for client in clients:
        client.sendall(b"x")  # the event loop has not seen it yet
    outcomes = spawn_thread(lambda: [outcome(client) for client in clients])
    report = server.stop(SOON)
    assert outcomes.get(timeout=SOON) == ["x"] * 20
    assert report == StopReport(20, 0)


@pytest.mark.slow
def test_request_in_progress_is_finished_and_the_connection_then_ends(serve, connect, in_thread, go):
    def handler(conn):
        while True:
            with conn.idle():
                first = conn.recv(1)
            if not first:
                return
            rest = conn.recv_until(b"\n")
            go.wait()
            conn.sendall(first + rest)

    server = serve(handler)
    client = connect(server)
    client.sendall(b"ab")
    wait_until(lambda: server.stats().bytes_received == 2)
    stopping = gevent.spawn(server.stop, None)
    wait_until(lambda: server._state.acceptors[0].closed)
    client.sendall(b"c\n")
    go.set()
    assert in_thread(client.recv, 100) == b"abc\n"
    assert in_thread(client.recv, 100) == b""
    assert stopping.get(timeout=SOON) == StopReport(1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("read", [lambda conn: conn.recv_until(b"\n"), lambda conn: conn.recv_exactly(12)])
def test_request_that_has_come_in_part_is_not_cut(serve, connect, in_thread, read):
    def handler(conn):
        with conn.idle():
            line = read(conn)
        conn.sendall(line)

    server = serve(handler)
    client = connect(server)
    client.sendall(b"half a ")
    wait_until(lambda: server.stats().bytes_received == 7)
    stopping = gevent.spawn(server.stop, None)
    wait_until(lambda: server._state.acceptors[0].closed)
    assert server.active_connections == 1
    client.sendall(b"line\n")
    assert in_thread(outcome, client) == "half a line\n"
    assert stopping.get(timeout=SOON) == StopReport(1, 0)


@pytest.mark.slow
def test_peer_that_does_not_close_holds_up_a_stop_for_the_linger_time_at_most(serve, connect):
    server, (client,) = start_busy(serve, connect, lambda conn: conn.recv(1), count=1, linger=0.2)
    begun = time.monotonic()
    assert server.stop(None) == StopReport(0, 0)
    assert time.monotonic() - begun < SOON / 2
    assert client.recv(1) == b""


@pytest.mark.slow
def test_lingering_answer_reaches_its_peer_before_the_stop_ends(serve, connect, spawn_thread):
    answer = b"x" * (1 << 20)

    def handler(conn):
        conn.recv(1)  # the rest stays unread
        conn.sendall(answer)

    server = serve(handler, linger=SOON)
    client = connect(server)
    client.sendall(b"request" * 100)

    def read_all():
        time.sleep(0.1)
        size = 0
        while more := client.recv(65536):
            size += len(more)
        client.close()
        return size

    size = spawn_thread(read_all)
    wait_until(lambda: server.accepted_connections == 1)
    server.stop(SOON)
    assert size.get(timeout=SOON) == len(answer)


def test_stop_does_not_wait_for_sockets_of_clients_that_were_reset(serve, connect):
    server, (client,) = start_busy(serve, connect, lambda conn: conn.recv(1), count=1, linger=LONG)
    wait_until(lambda: server.stats().lingering == 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert server.stop(None) == StopReport(0, 0)


@pytest.mark.slow
def test_a_stop_that_leaves_listening_leaves_the_queue_to_whoever_has_the_socket_too():
    with socket.create_server(("127.0.0.1", 0)) as held:
        first = Server(held.dup(), lambda conn: conn.sendall(b"first"))
        first.start()
        address = held.getsockname()
        first.stop(5, leave_listening=True)
        assert first.listening_ended.is_set()
        with gevent.socket.create_connection(address) as client:  # queued: nobody accepts now
            second = Server(held.dup(), lambda conn: conn.sendall(b"second"))
            with second:
                assert client.recv(100) == b"second"


# -- the first request -------------------------------------------------------------------------------------------------


def test_a_request_on_its_way_over_a_new_connection_is_served_by_a_stop(serve, connect, in_thread):
    server = serve(idle_echo)
    client = connect(server)
    wait_until(lambda: server.stats().idle == 1)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.listening_ended.is_set())
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    assert in_thread(client.recv, 10) == b""  # now it is idle, and has had its request
    assert stopping.get(timeout=SOON).ended == 0


def test_a_connection_that_comes_with_the_stop_has_time_for_its_request_too(serve, connect, in_thread):
    begin = Event()

    def handle(conn):
        begin.wait()  # it becomes idle only when the stop is under way
        idle_echo(conn)

    server = serve(handle)
    client = connect(server)
    wait_until(lambda: server.active_connections == 1)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.listening_ended.is_set())
    begin.set()
    gevent.sleep(0)
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    assert stopping.get(timeout=SOON).ended == 0


@pytest.mark.slow
def test_silent_connections_hold_up_a_stop_for_the_time_of_a_first_request_only(serve, connect, monkeypatch):
    monkeypatch.setattr(stopping_module, "FIRST_REQUEST", 0.2)
    server = serve(idle_echo)
    clients = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().idle == len(clients))
    began = time.monotonic()
    assert server.stop(SOON).ended == 0
    assert time.monotonic() - began < SOON / 3
    assert server.stats().idle_closed == len(clients)


def test_a_connection_that_has_been_silent_for_longer_ends_at_once(serve, connect, in_thread):
    seen = []

    def handle(conn):
        conn.accepted_at -= 60
        seen.append(conn)
        idle_echo(conn)

    server = serve(handle)
    client = connect(server)
    wait_until(lambda: server.stats().idle == 1)
    ended = gevent.spawn(server.stop, SOON)
    assert in_thread(client.recv, 10) == b""
    ended.get(timeout=SOON)


def idle_echo_of_an_old_connection(conn):
    conn.accepted_at -= 60
    idle_echo(conn)


def test_a_patient_stop_waits_for_a_first_request_however_late_it_comes(serve, connect, in_thread):
    server = serve(idle_echo_of_an_old_connection)
    client = connect(server)
    wait_until(lambda: server.stats().idle == 1)
    stopping = gevent.spawn(server.stop, None, patient=True)
    wait_until(server.listening_ended.is_set)
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    assert in_thread(client.recv, 10) == b""
    assert stopping.get(timeout=SOON).finished == 1


def test_a_patient_stop_ends_silent_connections_at_its_time_out_and_does_not_call_them_cut(serve, connect):
    server = serve(idle_echo)
    connect(server)
    wait_until(lambda: server.stats().idle == 1)
    report = server.stop(0.05, patient=True)
    assert (report.finished, report.ended) == (1, 0)
    assert server.stats().idle_closed == 1


def test_a_patient_stop_ends_connections_that_had_a_request_at_once(serve, connect, in_thread):
    server = serve(idle_echo)
    client = connect(server)
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    wait_until(lambda: server.stats().idle == 1)
    assert server.stop(None, patient=True).finished == 1


def test_hasten_ends_the_patience_of_a_stop(serve, connect, in_thread):
    server = serve(idle_echo_of_an_old_connection)
    client = connect(server)
    wait_until(lambda: server.stats().idle == 1)
    stopping = gevent.spawn(server.stop, None, patient=True)
    wait_until(server.listening_ended.is_set)
    server.hasten(60)
    assert in_thread(client.recv, 10) == b""
    assert stopping.get(timeout=SOON).finished == 1


def test_hasten_bounds_a_stop_that_waits_for_ever(serve, connect):
    server = serve(lambda conn: gevent.sleep(60))
    connect(server)
    wait_until(lambda: server.active_connections == 1)
    stopping = gevent.spawn(server.stop, None)
    wait_until(server.listening_ended.is_set)
    server.hasten(0.05)
    assert stopping.get(timeout=SOON).ended == 1
