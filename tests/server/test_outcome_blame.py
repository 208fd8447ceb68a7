"""Whose fault an error is: what a client does is counted, what its handler meets elsewhere is logged, by one rule."""

import asyncio
import builtins
import concurrent.futures
import contextlib
import logging
import os
import pickle
import socket
import ssl
import struct

import gevent
import gevent.socket
import gevent.ssl
import pytest

from gtcpserver import (
    EarlyEOF,
    LimitExceeded,
    Server,
    StreamServer,
    connect,
    from_socketserver,
    from_wsgi,
    is_client_error,
    pipe,
)
from gtcpserver.testing import HandlerFailed, certificates, check_faults, serving
from gtcpserver.testing import connect as connect_client
from kit.waiting import wait_until

GROUP = getattr(builtins, "ExceptionGroup", None)  # of Python 3.11
RESET = struct.pack("ii", 1, 0)
COUNTERS = ("resets", "timeouts", "limits_exceeded", "slow_clients", "handler_timeouts", "handler_errors")


@pytest.fixture(scope="module")
def made():
    with certificates() as made:
        yield made


@pytest.fixture(params=["plain", "tls"])
def tls(request, made):
    return made if request.param == "tls" else None


def counted(server):
    stats = server.stats()
    values = stats if isinstance(stats, dict) else {name: getattr(stats, name) for name in COUNTERS}
    return {name: values[name] for name in COUNTERS if values.get(name)}


def shown(caplog):
    return [record for record in caplog.records if record.levelno > logging.DEBUG]


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@pytest.fixture
def upstream():
    """An address where every connection gets what the test wants: `upstream.does = function(sock)`."""

    class Upstream:
        does = staticmethod(lambda sock: sock.recv(1))

    def serve_one(sock, _address):
        Upstream.does(sock)

    server = StreamServer("127.0.0.1:0", serve_one)
    server.start()
    Upstream.address = f"127.0.0.1:{server.server_port}"
    yield Upstream
    server.stop(0)


def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()


# -- the handler's own trouble -----------------------------------------------------------------------------------------


def refused(conn, upstream):
    connect(closed_port())


def refused_by_gevent(conn, upstream):
    gevent.socket.create_connection(closed_port())


def reset_by_upstream(conn, upstream):
    upstream.does = reset
    connect(upstream.address).recv(1)


def reset_by_upstream_in_a_greenlet(conn, upstream):
    upstream.does = reset
    gevent.spawn(connect(upstream.address).recv, 1).get()


def cut_short_by_upstream(conn, upstream):
    upstream.does = lambda sock: sock.sendall(b"ab")
    connect(upstream.address).recv_exactly(3)


def line_without_end_from_upstream(conn, upstream):
    upstream.does = lambda sock: sock.sendall(b"x" * 100)
    connect(upstream.address).recv_until(b"\n", 50)


def upstream_times_out(conn, upstream):
    with connect(upstream.address) as other:
        other.settimeout(0.01)
        other.recv(1)


def upstream_beyond_its_deadline(conn, upstream):
    with connect(upstream.address) as other, other.deadline(0.01):
        other.recv(1)


def gevent_timeout_while_upstream_is_silent(conn, upstream):
    with connect(upstream.address) as other, gevent.Timeout(0.01):
        other.recv(1)


def gevent_timeout_elsewhere(conn, upstream):
    with gevent.Timeout(0.01):
        gevent.sleep(60)


def future_times_out(conn, upstream):
    concurrent.futures.Future().result(timeout=0.001)


def asyncio_times_out(conn, upstream):
    raise asyncio.TimeoutError


def broken_pipe(conn, upstream):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as file:
        print("something", file=file, flush=True)


def upstream_speaks_no_tls(conn, upstream):
    upstream.does = lambda sock: sock.sendall(b"no TLS here\r\n")
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.wrap_socket(connect(upstream.address), server_hostname="localhost")


def file_that_is_written_fails(conn, upstream):
    class File:
        def write(self, data):
            raise BrokenPipeError("of a file")

    conn.recv_to_file(File(), 1)


def file_that_is_sent_fails(conn, upstream):
    class File:
        def read(self, size):
            raise TimeoutError("of a file")

    conn.sendfile(File())


def upstream_resets_a_pipe(conn, upstream):
    upstream.does = reset
    with connect(upstream.address) as other:
        pipe(other, conn)


def upstream_is_too_silent_for_a_pipe(conn, upstream):
    with connect(upstream.address) as other:
        pipe(other, conn, idle_timeout=0.01)


def sends_after_its_own_shutdown(conn, upstream):
    conn.shutdown(socket.SHUT_WR)
    conn.sendall(b"more")


def bug_behind_an_early_end(conn, upstream):
    try:
        conn.settimeout(0.01)
        conn.recv_until(b"never")
    except TimeoutError:
        raise KeyError("a bug") from None


def bug_while_the_end_is_dealt_with(conn, upstream):
    try:
        conn.settimeout(0.01)
        conn.recv_until(b"never")
    except TimeoutError:
        {}["a bug"]


def group_of_both(conn, upstream):
    errors = []
    for sock in (conn, connect(upstream.address)):
        sock.settimeout(0.01)
        try:
            sock.recv_exactly(2)
        except TimeoutError as error:
            errors.append(error)
    raise GROUP("both", errors) if GROUP else errors[1]


TROUBLE = [
    refused,
    refused_by_gevent,
    reset_by_upstream,
    reset_by_upstream_in_a_greenlet,
    cut_short_by_upstream,
    line_without_end_from_upstream,
    upstream_times_out,
    upstream_beyond_its_deadline,
    gevent_timeout_while_upstream_is_silent,
    gevent_timeout_elsewhere,
    future_times_out,
    asyncio_times_out,
    broken_pipe,
    upstream_speaks_no_tls,
    file_that_is_written_fails,
    file_that_is_sent_fails,
    upstream_resets_a_pipe,
    upstream_is_too_silent_for_a_pipe,
    sends_after_its_own_shutdown,
    bug_behind_an_early_end,
    bug_while_the_end_is_dealt_with,
    group_of_both,
]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda trouble: trouble.__name__)
def test_the_handlers_own_trouble_is_logged_with_its_traceback(serve, caplog, tls, upstream, trouble):
    server = serve(lambda conn: trouble(conn, upstream), tls=tls and tls.server)
    with connect_client(server, tls=tls and tls.client) as client:
        client.sendall(b"x")
        wait_until(lambda: counted(server))
    assert counted(server) == {"handler_errors": 1}
    (record,) = shown(caplog)
    assert "handler for" in record.getMessage()
    assert trouble.__name__ in caplog.text  # the traceback


@pytest.mark.parametrize("trouble", [refused, cut_short_by_upstream, gevent_timeout_elsewhere, broken_pipe])
def test_so_it_is_under_a_stream_server(caplog, upstream, made, trouble):
    for options in ({}, {"certfile": made.certfile, "keyfile": made.keyfile}):
        caplog.clear()
        server = StreamServer("127.0.0.1:0", lambda sock, address: trouble(sock, upstream), **options)
        server.start()
        with connect_client(f"127.0.0.1:{server.server_port}", tls=made.client if options else None):
            wait_until(lambda: counted(server))  # noqa: B023
        server.stop(0)
        assert counted(server) == {"handler_errors": 1}
        assert trouble.__name__ in caplog.text


def test_so_it_is_of_hooks(serve, caplog, upstream):
    server = serve(lambda conn: None, on_connect=lambda conn: refused(conn, upstream))
    with connect_client(server) as client:
        assert client.recv_all() == b""
    assert counted(server) == {"handler_errors": 1}
    assert "refused" in caplog.text


def test_the_test_kit_does_not_pass_a_handler_that_cannot_reach_its_database(upstream):
    def handler(conn):
        refused(conn, upstream)

    with (
        pytest.raises(HandlerFailed, match="ConnectionRefusedError"),
        serving(handler) as server,
        connect_client(server) as client,
    ):
        assert client.recv_all() == b""


@pytest.mark.slow
def test_the_fault_player_does_not_pass_it_either():
    def handler(conn):
        while data := conn.recv(100):
            conn.sendall(data)
        raise BrokenPipeError("of its own")

    report = check_faults(handler, [(b"x", b"x")], patience=0.5)
    assert any(problem.kind == "handler error" for problem in report.problems)


def test_http_server_does_not_take_its_own_time_out_for_the_clients(serve, caplog, upstream):
    from http.server import BaseHTTPRequestHandler

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            upstream_times_out(self.connection, upstream)

        def log_message(self, *args):
            pass

    server = serve(from_socketserver(Pages))
    with connect_client(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv_all()
    assert counted(server) == {"handler_errors": 1}
    assert "upstream_times_out" in caplog.text


def test_a_wsgi_application_that_holds_the_connection_is_judged_by_the_same_rule(serve, caplog, upstream):
    def application(environ, start_response):
        upstream.does = reset
        connect(upstream.address).recv(1)

    server = serve(from_wsgi(application))
    with connect_client(server) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        client.half_close()
        assert b"500" in client.recv_all()
    assert caplog.text.count("application failed") == 1


# -- what clients do ---------------------------------------------------------------------------------------------------


class Wrapped(Exception):
    pass


def receives(conn, ready):
    while conn.recv(100):
        pass


def receives_into_a_buffer(conn, ready):
    while conn.recv_into(bytearray(100)):
        pass


def reads_a_file(conn, ready):
    with conn.makefile("rb") as file:
        file.read()


def receives_in_a_greenlet(conn, ready):
    gevent.spawn(receives, conn, ready).get()


def names_the_cause(conn, ready):
    try:
        receives(conn, ready)
    except OSError as error:
        raise Wrapped("the client has left") from error


def sends_a_last_word_and_passes_it_on(conn, ready):
    try:
        receives(conn, ready)
    except OSError:
        with contextlib.suppress(OSError):
            conn.sendall(b"x")
            conn.sendall(b"x")
        raise


def groups(conn, ready):
    try:
        receives(conn, ready)
    except OSError as error:
        raise (GROUP("one", [error]) if GROUP else error)  # noqa: B904


def asks_who_it_was(conn, ready):
    gevent.socket.wait_read(conn.fileno())
    conn._sock.recv(1) if conn.tls is None and ready else None
    conn.getpeername()


def sends(conn, ready):
    while True:
        conn.sendall(bytes(65536))


def sends_a_file(conn, ready):
    with open("/dev/zero", "rb") as file:
        conn.sendfile(file)


def receives_to_a_file(conn, ready):
    with open(os.devnull, "wb") as file:
        conn.recv_to_file(file)


RECEIVE = [
    receives,
    receives_into_a_buffer,
    reads_a_file,
    receives_in_a_greenlet,
    names_the_cause,
    sends_a_last_word_and_passes_it_on,
    groups,
    receives_to_a_file,
    sends,
    sends_a_file,
]


@pytest.mark.slow
@pytest.mark.parametrize("handler", RECEIVE, ids=lambda handler: handler.__name__)
def test_a_reset_is_the_clients_and_no_line_of_the_log(serve, caplog, tls, handler):
    server = serve(lambda conn: handler(conn, None), tls=tls and tls.server)
    for _ in range(3):
        client = connect_client(server, tls=tls and tls.client)
        client.sendall(b"x")
        wait_until(lambda: server.stats().active)
        client.reset()
        wait_until(lambda: not server.stats().active)
    assert counted(server) == {"resets": 3}
    assert shown(caplog) == []


def test_a_reset_between_two_reads_is_the_clients_whatever_the_socket_is_asked_next(serve, caplog):
    go_on = gevent.event.Event()

    def handler(conn):
        go_on.wait()
        wait_until(lambda: not conn.getpeername())

    server = serve(handler)
    client = connect_client(server)
    wait_until(lambda: server.stats().active)
    client.reset()
    go_on.set()
    wait_until(lambda: not server.stats().active)
    assert counted(server) == {"resets": 1}
    assert shown(caplog) == []


def test_a_client_that_resets_a_pipe_is_not_its_upstream(serve, caplog, tls, upstream):
    def handler(conn):
        with connect(upstream.address) as other:
            pipe(conn, other)

    server = serve(handler, tls=tls and tls.server)
    client = connect_client(server, tls=tls and tls.client)
    wait_until(lambda: server.stats().active)
    client.reset()
    wait_until(lambda: not server.stats().active)
    assert counted(server) == {"resets": 1}
    assert shown(caplog) == []


def waits(conn, upstream):
    conn.settimeout(0.01)
    conn.recv(2)


def waits_for_it_all(conn, upstream):
    with conn.deadline(0.01):
        conn.recv_exactly(2)


def waits_within_a_gevent_timeout(conn, upstream):
    with gevent.Timeout(0.01):
        conn.recv(2)


def waits_within_a_gevent_timeout_of_another_class(conn, upstream):
    with gevent.Timeout(0.01, TimeoutError("too long")):
        conn.recv(2)


def waits_to_send(conn, upstream):
    conn.settimeout(0.05)
    while True:
        conn.sendall(bytes(65536))


def waits_for_a_file(conn, upstream):
    conn.settimeout(0.01)
    with open(os.devnull, "wb") as file:
        conn.recv_to_file(file)


def waits_in_a_pipe(conn, upstream):
    with connect(upstream.address) as other:
        pipe(conn, other, idle_timeout=0.01)


def waits_in_a_pipe_with_a_deadline(conn, upstream):
    with connect(upstream.address) as other, conn.deadline(0.01):
        pipe(conn, other)


def waits_for_a_client_that_takes_nothing(conn, upstream):
    upstream.does = lambda sock: sock.sendall(bytes(20_000_000))
    with connect(upstream.address) as other:
        pipe(other, conn, idle_timeout=0.05)


WAITS = [
    waits,
    waits_for_it_all,
    waits_within_a_gevent_timeout,
    waits_within_a_gevent_timeout_of_another_class,
    waits_to_send,
    waits_for_a_file,
    waits_in_a_pipe,
    waits_in_a_pipe_with_a_deadline,
    waits_for_a_client_that_takes_nothing,
]


@pytest.mark.slow
@pytest.mark.parametrize("handler", WAITS, ids=lambda handler: handler.__name__)
def test_a_time_out_is_the_clients_where_the_handler_has_waited_for_it(serve, caplog, tls, upstream, handler):
    server = serve(lambda conn: handler(conn, upstream), tls=tls and tls.server)
    with connect_client(server, tls=tls and tls.client):
        wait_until(lambda: counted(server))
    assert counted(server) == {"timeouts": 1}
    assert shown(caplog) == []


def short_message(conn):
    conn.recv_exactly(100)


def short_line(conn):
    conn.recv_until(b"\n")


def too_long(conn):
    conn.recv_until(b"\n", 2)


def says_so_itself(conn):
    raise LimitExceeded(f"a field of {conn.recv(1)!r}")


def says_that_it_was_short(conn):
    raise EarlyEOF(f"a field of {conn.recv(1)!r}")


def names_bad_input(conn):
    try:
        short_line(conn)
    except EarlyEOF as error:
        raise ValueError("no request") from error


@pytest.mark.parametrize(
    ("handler", "counter"),
    [
        (short_message, "resets"),
        (short_line, "resets"),
        (too_long, "limits_exceeded"),
        (says_so_itself, "limits_exceeded"),
        (says_that_it_was_short, "resets"),
        (names_bad_input, "resets"),
    ],
)
def test_what_a_client_sends_wrong_is_counted(serve, caplog, tls, handler, counter):
    server = serve(handler, tls=tls and tls.server)
    for _ in range(3):
        with connect_client(server, tls=tls and tls.client) as client:
            client.sendall(b"abc")
            client.half_close()
            assert client.recv_all() == b""
    assert counted(server) == {counter: 3}
    assert shown(caplog) == []


def test_broken_tls_is_the_clients(serve, caplog, made):
    server = serve(lambda conn: conn.recv(10), tls=made.server)
    with connect_client(server, tls=made.client) as client:
        wait_until(lambda: server.stats().active)
        client.socket.sendall(b"plain text, all of a sudden\r\n")
        wait_until(lambda: counted(server))
    assert counted(server) == {"resets": 1}
    assert shown(caplog) == []


def test_bytes_before_a_handshake_and_a_handshake_that_fails_are_the_clients(serve, caplog, made):
    def handler(conn):
        conn.recv_until(b"\n")
        conn.start_tls(made.server)

    server = serve(handler)
    for said in (b"STARTTLS\ninjected", b"STARTTLS\n"):
        with connect_client(server) as client:
            client.sendall(said)
            gevent.sleep(0.01)
            with contextlib.suppress(OSError):
                client.sendall(b"no handshake at all\r\n")
            wait_until(lambda: not server.stats().active)
    assert counted(server) == {"resets": 2}
    assert shown(caplog) == []


def test_a_socket_that_a_stream_server_has_wrapped_is_its_client(caplog, made, upstream):
    def handle(sock, address):
        assert isinstance(sock, ssl.SSLSocket) or type(sock).__name__ == "SSLSocket"
        sock.settimeout(0.05)
        if sock.recv(1) == b"!":
            refused(sock, upstream)
        sock.recv(1)

    server = StreamServer(
        "127.0.0.1:0", handle, certfile=made.certfile, keyfile=made.keyfile, suppress_ragged_eofs=True
    )
    server.start()
    try:
        client = connect_client(f"127.0.0.1:{server.server_port}", tls=made.client)
        client.sendall(b"x")
        wait_until(lambda: counted(server))
        client.close()
        assert sum(counted(server).values()) == 1
        assert "handler_errors" not in counted(server)
        assert shown(caplog) == []
        with connect_client(f"127.0.0.1:{server.server_port}", tls=made.client) as client:
            client.sendall(b"!")
            wait_until(lambda: counted(server).get("handler_errors"))
    finally:
        server.stop(0)


# -- the rule itself ---------------------------------------------------------------------------------------------------


def test_on_error_can_ask_whose_it_is(serve, upstream):
    seen = []
    server = serve(
        lambda conn: waits(conn, None) if conn.recv(1) == b"c" else refused(conn, None),
        on_error=lambda conn, error: seen.append((type(error), is_client_error(error, conn))),
    )
    for said in (b"c", b"h"):
        with connect_client(server) as client:
            client.sendall(said)
            assert client.recv_all() == b""
    assert seen == [(TimeoutError, True), (ConnectionRefusedError, False)]


def test_an_error_of_one_client_is_not_that_of_another(serve, caplog):
    # A chat: the handler of one client sends to another, which has left.
    others = []

    def handler(conn):
        others.append(conn)
        if len(others) == 1:
            gevent.sleep(60)
        wait_until(lambda: others[0].sendall(b"x"))

    server = serve(handler)
    first = connect_client(server)
    wait_until(lambda: others)
    first.reset()
    with connect_client(server) as second:
        assert second.recv_all() == b""
    assert counted(server) == {"handler_errors": 1}


def test_causes_that_form_a_circle_end(serve, caplog):
    def handler(conn):
        one, other = ValueError("one"), ValueError("other")
        one.__cause__, other.__cause__ = other, one
        raise one

    server = serve(handler)
    with connect_client(server) as client:
        assert client.recv_all() == b""
    assert counted(server) == {"handler_errors": 1}


def test_an_error_can_still_be_pickled_and_holds_no_connection(serve, caplog):
    errors = []

    def handler(conn):
        try:
            waits(conn, None)
        except TimeoutError as error:
            errors.append(error.with_traceback(None))

    server = serve(handler)
    with connect_client(server) as client:
        assert client.recv_all() == b""
    assert repr(pickle.loads(pickle.dumps(errors[0]))) == repr(errors[0])
    assert not any(isinstance(value, Server) or hasattr(value, "sock") for value in vars(errors[0]).values())
