"""No memory for a connection: it is reset, and all that it had taken is given back."""

import dataclasses
import importlib.util

import gevent
import pytest

from gtcpserver import ClientLimits, ProxyProtocol
from gtcpserver.admission import steps as steps_module
from gtcpserver.monitoring.latency import Latency
from gtcpserver.pool import HandlerPool, greenlets
from gtcpserver.pool import places as places_module
from gtcpserver.server.serving import Serving
from gtcpserver.testing.certificates import certificates
from kit.forms import pure_only
from kit.waiting import wait_until


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def is_served(server, connect, in_thread, before=b""):
    def talk():
        client = connect(server)
        client.sendall(before + b"hello")
        return client.recv(100)

    return in_thread(talk) == b"hello"


def nothing_is_taken(server):
    wait_until(lambda: not server.active_connections)
    admission = server._state.admission
    assert server.pool.places.taken == len(server.pool.greenlets) == 0
    assert not admission or len(admission) == 0
    assert not server._options.client_limits or not server._options.client_limits.counted
    assert server._state.nobody_connected.is_set()


@pytest.fixture
def failing_workers(monkeypatch):
    """`failing_workers("switch", 3)`: the third call of a new worker's method has no memory."""

    def fail(method, at):
        calls = [0]

        class Failing(greenlets.HandlerGreenlet):
            def __init__(self, runner):
                note("__init__")
                super().__init__(runner)

        def note(name):
            if name == method:
                calls[0] += 1
                if calls[0] == at:
                    raise MemoryError

        switch = greenlets.switch_with

        def failing_switch(target, *args):
            if isinstance(target, Failing):
                note("switch")
            return switch(target, *args)

        monkeypatch.setattr(greenlets, "HandlerGreenlet", Failing)
        monkeypatch.setattr(greenlets, "switch_to", failing_switch)
        monkeypatch.setattr(greenlets, "switch_with", failing_switch)

    return fail


#: To make one, its first switch, and the one with which it gets its job.
STEPS = [("__init__", 1), ("switch", 1), ("switch", 2)]


@pure_only
@pytest.mark.parametrize(("method", "at"), STEPS)
def test_a_greenlet_that_cannot_start_keeps_no_place(failing_workers, method, at):
    failing_workers(method, at)
    pool = HandlerPool(1)
    done = []

    def in_hub():
        with pytest.raises(MemoryError):
            pool.run(done.append, 1)
        assert not pool.full()
        assert not pool.greenlets
        pool.run(done.append, 2)

    gevent.get_hub().loop.run_callback(in_hub)
    wait_until(lambda: done)
    assert done == [2]
    assert pool.places.taken == 0
    assert pool.join(timeout=1)


@pure_only
def test_a_worker_that_dies_after_its_function_keeps_no_place(monkeypatch):
    """The error was MemoryError, and there is none to print it either; then the worker cannot wait for more."""
    pool = HandlerPool(1)
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *_: (_ for _ in ()).throw(MemoryError))
    monkeypatch.setattr(greenlets.Runner, "wait_for_work", lambda *_: (_ for _ in ()).throw(MemoryError))
    raised = []

    def fail():
        raise MemoryError

    def in_hub():
        try:
            pool.run(fail)
        except MemoryError as error:
            raised.append(error)

    gevent.get_hub().loop.run_callback(in_hub)
    wait_until(lambda: raised)
    assert pool.places.taken == 0
    assert not pool.greenlets


def test_who_waits_for_a_place_is_told_although_the_first_telling_failed(monkeypatch):
    places = places_module.Places(1)
    places.taken = 1
    told = []
    places.rawlink(told.append)
    places.taken = 0
    with monkeypatch.context() as patched:
        patched.setattr(places_module, "get_hub", lambda: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            places.tell()
    places.tell()
    wait_until(lambda: told)


@pure_only
@pytest.mark.parametrize(("method", "at"), STEPS)
@pytest.mark.parametrize("kind", ["plain", "limits", "header", "max_connections"])
def test_a_server_that_could_not_serve_one_serves_the_next(
    serve, connect, in_thread, failing_workers, kind, method, at
):
    options = {
        "plain": {},
        "limits": {"client_limits": ClientLimits(connections=1)},
        "header": {"proxy_protocol": ProxyProtocol(["127.0.0.1"]), "client_limits": ClientLimits(connections=1)},
        "max_connections": {"max_connections": 1},
    }[kind]
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" if kind == "header" else b""
    failing_workers(method, at)
    server = serve(echo, pool=1, linger=0, **options)

    def first():
        with pytest.raises(ConnectionResetError):
            client = connect(server)
            client.sendall(header)
            client.recv(100)

    in_thread(first)
    nothing_is_taken(server)
    assert is_served(server, connect, in_thread, header)


@pure_only
def test_a_stop_does_not_wait_for_one_that_could_not_be_served(serve, connect, in_thread, failing_workers):
    failing_workers("__init__", 1)
    server = serve(echo, client_limits=ClientLimits(connections=1))
    with pytest.raises(ConnectionResetError):
        in_thread(connect(server).recv, 100)
    with gevent.Timeout(5):
        assert server.stop().ended == 0


def test_those_that_wait_for_a_place_are_served_after_one_that_could_not(serve, connect, in_thread, monkeypatch):
    server = serve(echo, pool=1, proxy_protocol=ProxyProtocol(["127.0.0.1"]), linger=0)
    first, second, third = clients = [connect(server) for _ in range(3)]
    wait_until(lambda: len(server._state.admission) == 3)
    for passed, client in enumerate(clients, 1):
        client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        wait_until(lambda passed=passed: server.active_connections + len(server._state.waiting) == passed)
    third.sendall(b"third")
    run_one = server.pool.run_one
    calls = []

    def fail_once(function, argument):
        calls.append(argument)
        if len(calls) == 1:
            raise MemoryError
        run_one(function, argument)

    monkeypatch.setattr(server.pool, "run_one", fail_once)
    first.close()
    with pytest.raises(ConnectionResetError):
        in_thread(second.recv, 100)
    assert in_thread(third.recv, 100) == b"third"


@pure_only
@pytest.mark.parametrize("observed", [False, True])
def test_an_idle_connection_whose_wait_cannot_begin_keeps_its_place(serve, connect, in_thread, monkeypatch, observed):
    raised = []

    def handler(conn):
        with monkeypatch.context() as patched:
            patched.setattr(places_module.Places, "tell", lambda self: (_ for _ in ()).throw(MemoryError))
            conn.server.pool.places.links.append(len)
            try:
                with conn.idle():
                    pass
            except MemoryError:
                raised.append((conn.server.pool.places.taken, conn.is_idle))
        conn.server.pool.places.links.clear()

    server = serve(handler, pool=5)
    if observed:
        server.add_observer(Latency())
    assert in_thread(connect(server).recv, 100) == b""
    assert raised == [(1, False)]
    nothing_is_taken(server)


def test_an_idle_connection_whose_request_cannot_be_measured_keeps_its_place(serve, connect, in_thread):
    class Unmeasured(Latency):
        @property
        def every(self):
            raise MemoryError

        @every.setter
        def every(self, _value):
            pass

    def handler(conn):
        with conn.idle():
            data = conn.recv(100)
        conn.sendall(data + str((conn.server.pool.places.taken, conn.is_idle)).encode())

    server = serve(handler, pool=5)
    server.add_observer(Unmeasured())

    def talk():
        client = connect(server)
        client.sendall(b"x")
        return client.recv(100)

    assert in_thread(talk) == b"x(1, False)"
    nothing_is_taken(server)


@pytest.mark.parametrize("step", ["make", "wait", "_start_timer"])
def test_a_handshake_that_cannot_begin_is_reset(serve, connect, in_thread, monkeypatch, step):
    limits = ClientLimits(connections=5)
    with certificates() as made:
        server = serve(echo, tls=made.server, client_limits=limits)
        stage = server._state.admission._handshakes
        with monkeypatch.context() as patched:
            where = {
                "make": (stage, "_make"),
                "wait": (steps_module.Step, "wait"),
                "_start_timer": (stage, "_start_timer"),
            }
            patched.setattr(*where[step], lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(ConnectionResetError):
                in_thread(talk_tls, connect, server, made)
        nothing_is_taken(server)
        assert server.stats().handshake_failures == {"not_begun": 1}
        assert in_thread(talk_tls, connect, server, made) == b"hello"


def talk_tls(connect, server, made):
    with made.client.wrap_socket(connect(server), server_hostname="localhost") as client:
        client.sendall(b"hello")
        return client.recv(100)


def test_sockets_that_cannot_linger_are_closed(serve, connect, in_thread, monkeypatch):
    from gtcpserver.connection import lingering as linger_module

    server = serve(lambda conn: None, linger=30)
    monkeypatch.setattr(linger_module, "_Lingering", lambda *_: (_ for _ in ()).throw(MemoryError))
    clients = [connect(server) for _ in range(3)]
    for client in clients:
        assert in_thread(client.recv, 100) == b""
    wait_until(lambda: len(server.lingerer) == 0)
    with gevent.Timeout(5):
        server.stop()


EVERY_ALLOCATION = """
    from gevent import monkey; monkey.patch_all()
    import sys
    import _testcapi, gevent, socket
    from gtcpserver import ClientLimits, ProxyProtocol, Server
    from gtcpserver.testing.certificates import certificates

    def echo(conn):
        while data := conn.recv(4096):
            conn.sendall(data)

    made = None
    options = {"client_limits": ClientLimits(connections=1000)}
    if sys.argv[1] == "tls":
        context = certificates()
        made = context.__enter__()
        options["tls"] = made.server
    else:
        options["proxy_protocol"] = ProxyProtocol(["127.0.0.1"])
    server = Server("127.0.0.1:0", echo, pool=50, linger=0, **options)
    server.start()
    acceptor = server._state.acceptors[0]
    admit = acceptor.hand_over
    fails_at = [None]

    def admit_without_memory(connection, address):
        at, fails_at[0] = fails_at[0], None
        if at is not None:
            _testcapi.set_nomemory(at, at + 1)
        try:
            return admit(connection, address)
        finally:
            _testcapi.remove_mem_hooks()

    acceptor.hand_over = admit_without_memory

    def talk():
        client = socket.create_connection(("127.0.0.1", server.port))
        client.settimeout(60)
        try:
            if made is None:
                client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\\r\\n")
            else:
                client = made.client.wrap_socket(client, server_hostname="localhost")
            client.sendall(b"hello")
            return client.recv(10)
        except OSError as error:
            return error
        finally:
            client.close()

    assert talk() == b"hello"
    reset = 0
    for at in range(100):
        fails_at[0] = at
        acceptor.delay = 0.001
        answer = talk()
        if answer != b"hello":
            assert isinstance(answer, ConnectionResetError), (at, answer)
            reset += 1
            assert talk() == b"hello", at
        with gevent.Timeout(5, AssertionError(f"allocation {at} leaves something behind")):
            while (
                server.connections()
                or server.pool.places.taken
                or len(server._state.admission)
                or server._options.client_limits.counted
                or not server._state.nobody_connected.is_set()
            ):
                gevent.sleep(0.001)
    server.stop(5)
    print(reset)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("_testcapi") is None, reason="this Python has no _testcapi")
@pytest.mark.parametrize("kind", ["tls", "header"])
def test_no_allocation_that_fails_while_a_connection_is_admitted_leaves_anything_behind(python, kind):
    process = python(EVERY_ALLOCATION, kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()[-2000:]
    assert int(out) >= 5


LITTLE_MEMORY = """
    import resource, sys
    import gevent, gevent.socket
    from gtcpserver import Server

    def echo(conn):
        while data := conn.recv(4096):
            conn.sendall(data)

    def connect(count):
        return [gevent.socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]

    def answers(clients):
        served = 0
        for client in clients:
            client.settimeout(60)
            try:
                client.sendall(b"hello")
                served += client.recv(10) == b"hello"
            except OSError:
                pass
            client.close()
        return served

    server = Server("127.0.0.1:0", echo, pool=50, linger=0)
    server.start()
    acceptor = server._state.acceptors[0]
    # So that arrays and dicts have their size, and small pieces are at hand.
    assert answers(connect(60)[:50]) == 50
    gevent.sleep(0.05)
    server.pool.retire_waiting()
    gevent.sleep(0.05)
    ballast = [bytearray(4000) for _ in range(2000)]
    del ballast
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))
    clients = connect(50)
    gevent.sleep(0.2)
    refused = acceptor.delay > 0.01
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    answers(clients)
    del clients
    gevent.sleep(0.05)
    acceptor.delay = 0.01
    served = answers(connect(50))
    while server.active_connections:
        gevent.sleep(0.01)
    print(int(refused), served, server.pool.places.taken)
"""


@pytest.mark.slow
def test_a_process_that_was_short_of_memory_serves_as_many_as_before(python):
    process = python(LITTLE_MEMORY)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()[-2000:]
    refused, served, taken = map(int, out.split())
    assert (served, taken) == (50, 0)
    if not refused:
        pytest.skip("this Python had memory enough within the limit")


@pure_only
def test_a_client_that_a_stop_takes_from_the_queue_and_cannot_note_is_reset(serve, connect, in_thread, monkeypatch):
    server = serve(echo, pool=1, linger=0)
    first = connect(server)
    wait_until(lambda: server.active_connections == 1)
    second = connect(server)
    calls = []

    def fail_once(*args):
        calls.append(monkeypatch.undo())
        raise MemoryError

    server._state.acceptors[0].stop_accepting()
    server.pool.places.links.clear()
    server._capacity._is_linked = False
    monkeypatch.setattr(places_module.Places, "rawlink", fail_once)
    stopping = gevent.spawn(server.stop, 10)
    with pytest.raises(ConnectionResetError):  # an end in order would be an empty answer
        in_thread(second.recv, 100)
    assert calls
    first.close()
    report = stopping.get()
    assert report.ended == 0
    assert report.failures == ("drain: MemoryError",)


def fail_first(function):
    """The function as it is without memory for its first call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return function(*arguments)

    return call


@pytest.mark.parametrize("stage", ["_headers", "_handshakes"])
def test_one_that_passed_and_could_not_be_handed_over_ends_when_it_is_overdue(serve, connect, in_thread, stage):
    limits = ClientLimits(connections=1)
    with certificates() as made:
        if stage == "_headers":
            options = {"proxy_protocol": ProxyProtocol(["127.0.0.1"], timeout=0.3)}
            header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
        else:
            options = {"tls": dataclasses.replace(made.server, handshake_timeout=0.3)}
            header = b""
        server = serve(echo, client_limits=limits, **options)
        under_way = getattr(server._state.admission, stage)
        under_way.done = fail_first(under_way.done)

        def talk():
            with connect(server) as client:
                client.sendall(header)
                if stage == "_headers":
                    client.sendall(b"hello")
                    return client.recv(100)
                with made.client.wrap_socket(client, server_hostname="localhost") as encrypted:
                    encrypted.sendall(b"hello")
                    return encrypted.recv(100)

        assert in_thread(talk) == b""
        nothing_is_taken(server)
        assert server._state.unserved == 1
        assert in_thread(talk) == b"hello"


@pure_only
def test_one_that_waits_and_could_not_be_let_in_is_served_later(serve, connect, in_thread, monkeypatch):
    monkeypatch.setattr(Serving, "_serve_admitted", fail_first(Serving._serve_admitted))
    server = serve(echo, pool=1, client_limits=ClientLimits(connections=2), proxy_protocol=ProxyProtocol(["127.0.0.1"]))
    clients = [connect(server) for _ in range(2)]
    wait_until(lambda: len(server._state.admission) == 2)
    for passed, client in enumerate(clients, 1):
        client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        wait_until(lambda passed=passed: server.active_connections + len(server._state.waiting) == passed)
    first, second = clients
    second.sendall(b"hello")
    first.close()
    assert in_thread(second.recv, 100) == b"hello"
    second.close()
    nothing_is_taken(server)
