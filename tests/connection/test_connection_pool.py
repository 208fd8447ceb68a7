"""Connections to a backend: reused while they are good, replaced when they are not, and never shared."""

from __future__ import annotations

import logging
import os
import socket

import gevent
import gevent.ssl
import pytest
from gevent.event import Event

from gtcpserver import (
    ConfigError,
    ConnectionPool,
    EarlyEOF,
    Frames,
    GtcpServerError,
    LengthPrefix,
    Server,
    stay_connected,
)
from gtcpserver.connection import back_off as back_off_module
from gtcpserver.connection import connection_pool as pool_module
from kit.patience import SOON
from kit.waiting import wait_until


def upper(conn):
    frames = conn.frames(prefix=1)
    for message in frames:
        if message == b"close":
            return
        frames.send(message.upper())
        if message == b"more":
            conn.sendall(b"unasked")
        if message == b"last":
            return


@pytest.fixture
def backend(serve):
    return serve(upper)


@pytest.fixture
def pooled(backend):
    pools = []

    def make(server=backend, **options):
        pools.append(ConnectionPool(f"127.0.0.1:{server.port}", **{"timeout": SOON, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def ask(pool, message=b"hello"):
    with pool.connection() as conn:
        frames = conn.frames(prefix=1)
        frames.send(message)
        return frames.recv()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


# -- reuse -------------------------------------------------------------------------------------------------------------


def test_a_connection_is_used_again(pooled, backend):
    pool = pooled()
    assert [ask(pool) for _ in range(5)] == [b"HELLO"] * 5
    assert (pool.connected, pool.reused, pool.idle, pool.in_use) == (1, 4, 1, 0)
    assert backend.accepted_connections == 1


def test_the_last_one_used_is_the_next(pooled):
    pool = pooled()
    with pool.connection() as first, pool.connection() as second:
        assert pool.in_use == 2
    with pool.connection() as conn:
        assert conn is first  # blocks end from the inside out
    assert second.fileno() >= 0


@pytest.mark.parametrize("message", [b"more", b"last"])
def test_one_that_the_backend_has_closed_or_written_to_is_replaced(pooled, backend, message):
    pool = pooled()
    ask(pool, message)
    # Bytes that came with the answer are left in the connection, which is not even kept.
    wait_until(lambda: not pool.idle or not pool._is_quiet(pool._idle[0][0]))
    assert ask(pool) == b"HELLO"
    assert (pool.connected, pool.reused) == (2, 0)


def test_one_whose_block_raised_or_closed_it_or_left_bytes_is_not_kept(pooled):
    pool = pooled()
    with pytest.raises(ZeroDivisionError), pool.connection() as conn:
        raise ZeroDivisionError
    assert conn.fileno() < 0
    with pool.connection() as conn:
        conn.close()
    with pool.connection() as conn:
        conn.unread(b"rest")
    assert (pool.idle, pool.in_use) == (0, 0)
    killed = gevent.spawn(lambda: pool.connection().__enter__() and gevent.sleep(SOON))
    gevent.sleep(0.01)
    killed.kill()
    assert ask(pool) == b"HELLO"


@pytest.mark.parametrize("error", [ConnectionResetError, EarlyEOF("closed")])
def test_a_check_may_refuse_one(pooled, error):
    seen = []

    def check(conn):
        seen.append(conn)
        if len(seen) == 2:
            raise error
        return len(seen) != 1

    pool = pooled(check=check)
    with pool.connection(), pool.connection():
        pass
    assert ask(pool) == b"HELLO"
    assert (len(seen), pool.connected, pool.idle) == (2, 3, 1)
    ask(pool)
    assert pool.reused == 1


def test_old_and_unused_ones_are_closed(pooled, backend):
    pool = pooled(max_age=0.02)
    ask(pool)
    gevent.sleep(0.03)
    ask(pool)
    assert pool.connected == 2
    pool = pooled(idle_timeout=0.03)
    with pool.connection(), pool.connection():
        pass
    ask(pool)
    wait_until(lambda: pool.idle == 0)
    wait_until(lambda: backend.active_connections <= 1)
    assert pool._closer is None
    ask(pool)
    assert pool.connected == 3


def test_each_block_begins_with_the_timeout_of_the_pool(pooled):
    pool = pooled(timeout=5)
    with pool.connection() as conn:
        conn.settimeout(0.5)
    with pool.connection() as conn:
        assert conn.gettimeout() == 5


# -- limits ------------------------------------------------------------------------------------------------------------


def test_no_more_than_its_size_and_who_waits_gets_the_next(pooled):
    pool = pooled(size=1, wait_timeout=SOON)
    with pool.connection():
        waiting = gevent.spawn(ask, pool)
        gevent.sleep(0.01)
        assert not waiting.ready()
    assert waiting.get(timeout=SOON) == b"HELLO"
    assert pool.connected == 1
    pool = pooled(size=1, wait_timeout=0.01)
    in_use = r"all 1 connections to 127.0.0.1:\d+ in use for 0.01 s"
    with pool.connection(), pytest.raises(TimeoutError, match=in_use):
        ask(pool)
    assert ask(pool) == b"HELLO"
    pool = pooled(size=None)
    with pool.connection(), pool.connection():
        assert pool.in_use == 2


def test_a_place_is_given_back_when_nothing_connects(pooled):
    pool = ConnectionPool(f"127.0.0.1:{free_port()}", size=1, wait_timeout=0)
    for _ in range(3):
        with pytest.raises(ConnectionError), pool.connection():
            pass


def test_a_closed_pool_has_no_connections(pooled, backend):
    pool = pooled()
    ask(pool)
    with pool.connection() as conn:
        with pool.connection():
            pass
        pool.close()
        assert (pool.idle, pool.in_use) == (0, 1)
    assert conn.fileno() < 0
    with pytest.raises(GtcpServerError, match="is closed"), pool.connection():
        pass
    wait_until(lambda: backend.active_connections == 0)
    with pooled() as pool:
        ask(pool)
    assert pool.idle == 0


# -- a backend that is down --------------------------------------------------------------------------------------------


def test_callers_do_not_hammer_a_backend_that_is_down(monkeypatch):
    monkeypatch.setattr(back_off_module.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(back_off_module, "FIRST_PAUSE", 50.0)
    pool = ConnectionPool(f"127.0.0.1:{free_port()}")
    with pytest.raises(ConnectionRefusedError), pool.connection():
        pass
    with pytest.raises(ConnectionError, match=r"the next attempt is in \d+\.\d s; .*refused"), pool.connection():
        pass
    assert pool.failed == 1


def test_callers_that_may_wait_get_a_backend_that_comes_back(monkeypatch):
    port = free_port()
    pool = ConnectionPool(f"127.0.0.1:{port}", retry_for=SOON, timeout=SOON)
    waiting = [gevent.spawn(ask, pool) for _ in range(3)]
    wait_until(lambda: pool.failed >= 3)
    with Server(f"127.0.0.1:{port}", upper), pool:
        assert [one.get(timeout=SOON) for one in waiting] == [b"HELLO"] * 3
        assert pool._back_off.failures == 0


def test_pauses_double_up_to_the_longest_and_once_for_failures_at_a_time(monkeypatch):
    monkeypatch.setattr(back_off_module.random, "uniform", lambda low, high: high)
    back_off = back_off_module.BackOff(1.0)
    pauses = []
    for _ in range(6):
        seen = back_off.failures
        back_off.failed(OSError(), seen)
        back_off.failed(OSError(), seen)
        pauses.append(round(back_off.left(), 1))
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    back_off.worked()
    assert back_off.left() == 0


def test_a_lack_of_descriptors_is_not_the_backend_s_fault(pooled, monkeypatch):
    pool = pooled()
    monkeypatch.setattr(pool, "_dial", lambda: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    with pytest.raises(OSError, match="Too many"), pool.connection():
        pass
    assert pool.failed == 0


# -- TLS, forks --------------------------------------------------------------------------------------------------------


def test_over_tls_with_its_certificate_checked(serve, gtcp_tls, tmp_path):
    server = serve(upper, tls=gtcp_tls.server)
    address = f"127.0.0.1:{server.port}"
    pool = ConnectionPool(address, tls=True, timeout=SOON)
    with pytest.raises(gevent.ssl.SSLCertVerificationError), pool.connection():
        pass
    context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata="".join(_pem(gtcp_tls.client)))
    with ConnectionPool(address, tls=context, server_hostname="localhost", timeout=SOON) as pool:
        for _ in range(3):
            with pool.connection() as conn:
                frames = Frames(conn, LengthPrefix(1))
                frames.send(b"secret")
                assert frames.recv() == b"SECRET"
        assert (pool.connected, pool.reused) == (1, 2)


def _pem(context):
    import ssl

    return (ssl.DER_cert_to_PEM_cert(one) for one in context.get_ca_certs(binary_form=True))


def test_a_forked_child_leaves_the_parent_s_connections(pooled, backend):
    pool = pooled()
    assert ask(pool) == b"HELLO"
    child = gevent.get_hub() and os.fork()
    if not child:
        status = 1
        try:
            status = 0 if ask(pool) == b"HELLO" and (pool.connected, pool.reused) == (2, 0) else 2
        finally:
            os._exit(status)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        gevent.sleep(0.005)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert ask(pool) == b"HELLO"
    assert (pool.connected, pool.reused) == (1, 1)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"address": "*:80"}, "address to connect to must be"),
        ({"size": 0}, "size must be"),
        ({"idle_timeout": 0}, "idle_timeout must be"),
        ({"connect_timeout": 0}, "connect_timeout must be"),
        ({"retry_for": -1}, "retry_for must be"),
        ({"tls": "yes"}, "tls must be True or a gevent.ssl.SSLContext"),
        ({"address": "unix:/x", "tls": True}, "server_hostname is needed"),
        ({"server_hostname": 5}, "server_hostname must be"),
        ({"server_hostname": ""}, "server_hostname must be"),
        ({"connection_class": 3}, "connection_class must be"),
        ({"connection_class": socket.socket}, "connection_class must be"),
        ({"check": True}, "check must be"),
    ],
)
def test_arguments_that_cannot_be(options, told):
    with pytest.raises(ConfigError, match=told):
        ConnectionPool(**{"address": "127.0.0.1:1", **options})


# -- stay_connected ----------------------------------------------------------------------------------------------------


def test_it_connects_again_whatever_ends_the_connection(serve, caplog, monkeypatch):
    monkeypatch.setattr(back_off_module, "FIRST_PAUSE", 0.001)
    caplog.set_level(logging.INFO)
    ends = []
    done = Event()

    def use(conn):
        ends.append(conn)
        if len(ends) == 1:
            return
        if len(ends) == 2:
            conn.recv_exactly(5)  # EarlyEOF
        if len(ends) == 3:
            conn.settimeout(0.01)
            conn.sendall(b"\5he")
            conn.recv(1)  # TimeoutError
        done.set()
        conn.recv(1)

    def handler(conn):
        if len(ends) < 3:
            gevent.sleep(0.005)
            return
        conn.frames(prefix=1).recv()

    server = serve(handler)
    task = server.spawn(stay_connected, f"127.0.0.1:{server.port}", use)
    assert done.wait(SOON)
    assert all(conn.fileno() < 0 for conn in ends[:3])
    task.kill()
    assert ends[-1].fileno() < 0
    lines = [record.getMessage() for record in caplog.records if "connect" in record.getMessage()]
    where = f"127.0.0.1:{server.port}"
    assert lines[0] == f"connection to {where} lost, connecting again: it was closed"
    assert set(lines[1:]) == {f"connected to {where} again"}


def test_it_waits_for_a_backend_that_is_not_there_yet(monkeypatch):
    port, done = free_port(), Event()
    task = gevent.spawn(stay_connected, f"127.0.0.1:{port}", lambda conn: done.set() or conn.recv(1))
    gevent.sleep(0.02)
    with Server(f"127.0.0.1:{port}", upper):
        assert done.wait(SOON)
        task.kill()


def test_an_error_of_something_else_ends_it(serve):
    def use(conn):
        os.stat("/nowhere/at/all")

    with pytest.raises(FileNotFoundError):
        stay_connected(f"127.0.0.1:{serve(upper).port}", use)


def test_a_connection_that_has_lasted_makes_the_next_pause_short(serve, monkeypatch):
    monkeypatch.setattr(pool_module, "LONGEST_PAUSE_ALONE", 0.01)
    calls = []

    def use(conn):
        calls.append(conn)
        if len(calls) == 3:
            raise EarlyEOF("not of the connection")
        gevent.sleep(0.02)

    with pytest.raises(EarlyEOF):
        stay_connected(f"127.0.0.1:{serve(upper).port}", use)
    assert len(calls) == 3
