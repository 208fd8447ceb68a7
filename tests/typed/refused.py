"""Mistakes that mypy --strict and pyright must tell a user (test_typing.py). It is not meant to be run.

Each line that ends with the comment `refused` has one, and no other line has any.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial

from gtcpserver import Connection, Server, TLSConfig, connect, from_wsgi, relay, run
from gtcpserver.testing import check_faults, serving


class Session(Connection):
    """A connection class of one's own."""

    name: str

    __slots__ = ("name",)


class Counting:
    """An object as a handler."""

    def __call__(self, conn: Connection) -> None:
        print(conn)


class AsyncCounting:
    """One that never serves."""

    async def __call__(self, conn: Connection) -> None:
        print(conn)


def handle(conn: Connection) -> None:
    conn.sendall(b"hello")


def handle_session(conn: Session) -> None:
    print(conn.name)


async def handle_async(conn: Connection) -> None:
    print(conn)


async def handle_async_generator(conn: Connection) -> AsyncIterator[int]:
    print(conn)
    yield 1


def handle_generator(conn: Connection) -> Iterator[int]:
    print(conn)
    yield 1


def handle_two(conn: Connection, address: str) -> None:
    print(conn, address)


def admit_session(conn: Session) -> bool:
    return conn.name != ""


async def admit_async(conn: Connection) -> bool:
    return conn.started_at > 0


async def application(scope: dict[str, object], receive: object, send: object) -> None:
    print(scope, receive, send)


def the_connection(conn: Connection) -> None:
    print(conn.nosuch)  # refused
    conn.sendal(b"x")  # refused
    conn.sendall("text")  # refused
    conn.recv("10")  # refused
    conn.sendfile(3.5)  # refused
    conn.recv_until("\n")  # refused
    conn.settimeout("5")  # refused
    conn.timeout = "5"  # refused
    print(conn.tls.version)  # refused
    print(conn.client_address.host)  # refused
    conn.start_tls("cert.pem")  # refused
    conn.started_at.isoformat()  # refused
    with conn.idle(5):  # refused
        pass
    with conn.deadline("5"):  # refused
        pass


def handlers() -> None:
    Server("127.0.0.1:5000", handle_async)  # refused
    Server("127.0.0.1:5000", handle_async_generator)  # refused
    Server("127.0.0.1:5000", handle_generator)  # refused
    Server("127.0.0.1:5000", handle_two)  # refused
    Server("127.0.0.1:5000", handle_session)  # refused
    Server("127.0.0.1:5000", partial(handle_async))  # refused
    Server("127.0.0.1:5000", AsyncCounting())  # refused
    Server("127.0.0.1:5000", Counting)  # refused
    Server("127.0.0.1:5000", 5)  # refused
    Server("127.0.0.1:5000", lambda conn: conn.nosuch())  # refused
    Server("127.0.0.1:5000", handle, connection_class=int)  # refused
    run(handle_async)  # refused
    run(handle_session)  # refused
    run(5)  # refused
    serving(handle_async)  # refused
    check_faults(handle_session, [(b"a", b"b")])  # refused
    from_wsgi(application)  # refused


def options() -> None:
    run(handle, pol=5)  # refused
    run(handle, pool="5")  # refused
    run(handle, bind=5.0)  # refused
    run(handle, workers="all")  # refused
    run(handle, monkey_patch="yes")  # refused
    run(handle, block_detector="on")  # refused
    run(handle, pin_cpus="yes")  # refused
    run(handle_session, connection_class=Session, pol=5)  # refused
    Server("127.0.0.1:5000", handle, pol=5)  # refused
    Server("127.0.0.1:5000", handle, on_full="panic")  # refused
    Server("127.0.0.1:5000", handle, workers=2)  # refused
    Server("127.0.0.1:5000", handle, tls="cert.pem")  # refused
    Server("127.0.0.1:5000", handle, tls=TLSConfig(5))  # refused
    Server("127.0.0.1:5000", handle, on_connect=admit_session)  # refused
    Server("127.0.0.1:5000", handle, on_connect=admit_async)  # refused
    Server("127.0.0.1:5000", handle, on_error=handle)  # refused
    Server(None, handle)  # refused
    Server(("127.0.0.1", "5000"), handle)  # refused
    serving(handle, pol=5)  # refused


def others(conn: Connection) -> None:
    reveal: Session = connect("127.0.0.1:5001")  # refused
    print(reveal)
    relay(conn, 5)  # refused
    print(Server(0, handle).nosuch)  # refused


def what_is_right(conn: Connection, sock: socket.socket) -> None:
    """No line of these."""
    Server("127.0.0.1:5000", handle_session, connection_class=Session, on_connect=admit_session)
    Server("127.0.0.1:5000", Counting(), on_disconnect=handle)
    session: Session = connect("127.0.0.1:5001", connection_class=Session)
    relay(conn, session)
    relay(conn, sock)
