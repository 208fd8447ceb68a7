"""``python -m kit.form_cases``: what a connection answers to unusual calls, as JSON; for both forms of the package."""

from __future__ import annotations

import array
import copy
import gc
import inspect
import json
import pickle
import re
import socket
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import gevent
from gevent.hub import get_hub

import gtcpserver
from gtcpserver import Connection

Case = Callable[[Connection, socket.socket], Any]

CASES: dict[str, Case] = {}


class Stubborn(Connection):
    """Overrides what the hot path calls by its own name."""

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return b"overridden " + super().stream.recv(bufsize, flags)

    def sendall(self, data: bytes, flags: int = 0) -> None:
        super().stream.sendall(b"<" + data + b">", flags)


class OwnInit(Connection):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context = "mine"


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def pair(connection_class: type[Connection] = Connection) -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return connection_class(ours.family, ours.type, 0, ours.detach()), theirs


def outcome(action: Callable[[], Any]) -> str:
    """Return what a call returns or raises, without addresses of objects and numbers of descriptors."""
    try:
        said = repr(action())
    except BaseException as error:
        known = error if isinstance(error, Exception | gevent.Timeout) else type(error)
        said = f"{type(error).__name__}: {known}"
    # Cython's words differ from CPython's for some conversions of arguments; the class is what programs see.
    said = re.sub(r"^(TypeError|OverflowError): .*", r"\1", said, flags=re.S)
    return re.sub(r"0x[0-9a-f]+|fd=\d+", "*", said)


# -- arguments ---------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 5, 100, 65536, 65537, 1 << 20, True, False, -1, -(1 << 40), 1 << 63, -(1 << 70), 1.5, "5", None, b"", ()]
FLAGS = [0, socket.MSG_PEEK, socket.MSG_DONTWAIT, socket.MSG_WAITALL, -1, 1 << 31, 1 << 70, 1.5, "1", True]
DATA = [
    b"",
    b"bytes",
    bytearray(b"bytearray"),
    memoryview(b"view"),
    memoryview(b"strided")[::2],
    array.array("i", [1, 2, 3]),
    array.array("i"),
    type("Bytes", (bytes,), {})(b"subclass"),
    "text",
    None,
    5,
    [b"list"],
]


def sizes(method: str) -> None:
    for size in SIZES:

        def ask(conn: Connection, peer: socket.socket, size: Any = size) -> Any:
            conn.settimeout(0.01)
            peer.send(b"0123456789")
            return outcome(lambda: getattr(conn, method)(size)), outcome(lambda: conn.recv(4))

        CASES[f"{method}({size!r})"] = ask


def flags(name: str, call: Callable[[Connection, Any], Any]) -> None:
    for flag in FLAGS:

        def ask(conn: Connection, peer: socket.socket, flag: Any = flag) -> Any:
            conn.settimeout(0.01)
            peer.send(b"0123456789")
            first = outcome(lambda: call(conn, flag))
            return first, outcome(lambda: conn.recv(4)), outcome(lambda: peer.recv(100))

        CASES[f"{name}, flags={flag!r}"] = ask


def data(method: str) -> None:
    for value in DATA:

        def ask(conn: Connection, peer: socket.socket, value: Any = value) -> Any:
            return outcome(lambda: getattr(conn, method)(value)), outcome(lambda: peer.recv(100)), conn.bytes_sent

        CASES[f"{method}({type(value).__name__} {value!r})".split(" at 0x")[0]] = ask


for name in ("recv", "recv_exactly"):
    sizes(name)
del CASES[f"recv_exactly({-(1 << 70)})"]  # ValueError in pure Python, OverflowError compiled
flags("recv(4)", lambda conn, flag: conn.recv(4, flag))
flags("recv_into(4)", lambda conn, flag: conn.recv_into(bytearray(4), 4, flag))
flags("send", lambda conn, flag: conn.send(b"data", flag))
flags("sendall", lambda conn, flag: conn.sendall(b"data", flag))
data("send")
data("sendall")
data("unread")


@case
def keywords(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"0123456789abcdefghij")
    return [
        outcome(lambda: conn.recv(bufsize=2)),
        outcome(lambda: conn.recv(bufsize=2, flags=socket.MSG_PEEK)),
        outcome(lambda: conn.recv(2, flags=0)),
        outcome(lambda: conn.recv_exactly(n=3)),
        outcome(lambda: conn.recv_into(buffer=bytearray(2), nbytes=1, flags=0)),
        outcome(lambda: conn.sendall(data=b"x", flags=0)),
        outcome(lambda: conn.send(data=b"x")),
        outcome(lambda: conn.recv()),
        outcome(lambda: conn.recv(1, 0, 0)),
        outcome(lambda: conn.recv(1, nothing=1)),
        outcome(lambda: conn.sendall()),
    ]


@case
def numbers_that_are_no_int(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"0123456789")
    return outcome(lambda: conn.recv(socket.SocketKind(2))), outcome(lambda: conn.recv_exactly(socket.SocketKind(2)))


@case
def buffers(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"0123456789" * 10)
    found = []
    for buffer in (
        bytearray(5),
        memoryview(bytearray(5)),
        memoryview(bytearray(8))[::2],
        array.array("i", [0]),
        b"read only",
        "text",
        None,
        bytearray(),
    ):
        for nbytes in (0, 2, 100, -1):
            found.append((outcome(lambda b=buffer, n=nbytes: conn.recv_into(b, n)), repr(buffer).split(" at 0x")[0]))
            if buffer is None:
                break
    conn.close()
    return found


@case
def read_ahead_is_given_by_every_read(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"line\nrest of it")
    conn.settimeout(0.01)
    return [
        outcome(lambda: conn.recv_until(b"\n")),
        outcome(lambda: conn.recv(-1)),
        outcome(lambda: conn.recv(2)),
        outcome(lambda: conn.recv_into(bytearray(3))),
        outcome(lambda: conn.recv(1, socket.MSG_PEEK)),
        outcome(lambda: conn.recv_exactly(100)),
        outcome(lambda: conn.peeked),
    ]


@case
def huge_timeouts(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"0123456789")
    found = []
    for seconds in (float("inf"), 1e300, 1 << 70, 1e-300, True, "1", float("nan"), -1, None, 0, 0.0):
        found.append((repr(seconds), outcome(lambda s=seconds: conn.settimeout(s)), outcome(lambda: conn.recv(1))))
    return found


@case
def huge_deadlines(conn: Connection, peer: socket.socket) -> Any:
    peer.send(b"0123456789")
    found = []
    for seconds in (float("inf"), 1e300, 1 << 70, 1e-300, True, "1", float("nan"), -1, None, 0):

        def ask(seconds: Any = seconds) -> bytes:
            with conn.deadline(seconds):
                return conn.recv(1)

        found.append((repr(seconds), outcome(ask), conn.stream.deadlines, conn.stream.deadline))
    return found


# -- waiting -----------------------------------------------------------------------------------------------------------


READS: dict[str, Callable[[Connection], Any]] = {
    "recv": lambda conn: conn.recv(10),
    "recv_into": lambda conn: conn.recv_into(bytearray(10)),
    "recv_exactly": lambda conn: conn.recv_exactly(10),
    "recv_until": lambda conn: conn.recv_until(b"\n"),
    "large recv": lambda conn: conn.recv(1 << 20),
    "peek": lambda conn: conn.recv(10, socket.MSG_PEEK),
}
WRITES: dict[str, Callable[[Connection], Any]] = {
    "sendall": lambda conn: [conn.sendall(b"x" * 50_000) for _ in range(100)],
    "large sendall": lambda conn: conn.sendall(b"x" * (1 << 23)),
    "send": lambda conn: [conn.send(b"x" * 50_000) for _ in range(100)],
}


def within_timeout(call: Callable[[Connection], Any]) -> Case:
    def ask(conn: Connection, _peer: socket.socket) -> Any:
        found = []
        for seconds in (0.0, 1e-6, 0.01):
            conn.settimeout(seconds)
            found.append(outcome(lambda: call(conn)))
        conn.settimeout(None)
        with conn.deadline(0.01):
            found.append(outcome(lambda: call(conn)))

        def timed() -> Any:
            with gevent.Timeout(0.01):
                return call(conn)

        return [*found, re.sub(r"seconds.*", "", outcome(timed)), conn.stream.reader(), conn.stream.writer()]

    return ask


def ended(call: Callable[[Connection], Any], how: Callable[[Connection, socket.socket, Any], Any]) -> Case:
    """A greenlet calls; then something happens to it or to the connection."""

    def ask(conn: Connection, peer: socket.socket) -> Any:
        found = []
        for primed in (False, True):
            if primed and not conn.closed:
                found.append((outcome(lambda: peer.send(b"1\n")), outcome(lambda: conn.recv(10))))
            greenlet = gevent.spawn(outcome, lambda: call(conn))
            gevent.sleep(0)
            how(conn, peer, greenlet)
            greenlet.join(1)
            found += [str(greenlet.value), outcome(conn.stream.reader), outcome(conn.stream.writer), conn.closed]
            greenlet.kill()
        return found

    return ask


ENDS: dict[str, Callable[[Connection, socket.socket, Any], Any]] = {
    "kill": lambda conn, peer, greenlet: greenlet.kill(),
    "kill with an error": lambda conn, peer, greenlet: greenlet.kill(ValueError("mine")),
    "close": lambda conn, peer, greenlet: conn.close(),
    "abort": lambda conn, peer, greenlet: conn.abort(),
    "shutdown": lambda conn, peer, greenlet: conn.shutdown(socket.SHUT_RDWR),
    "peer closes": lambda conn, peer, greenlet: peer.close(),
    "detach": lambda conn, peer, greenlet: socket.socket(fileno=conn.detach()).close(),
}

for name, call in {**READS, **WRITES}.items():
    CASES[f"{name} within time-outs"] = within_timeout(call)
    for what, how in ENDS.items():
        CASES[f"{name}, then {what}"] = ended(call, how)


@case
def two_readers(conn: Connection, peer: socket.socket) -> Any:
    found = []
    for primed in (False, True):
        if primed:
            peer.send(b"x")
            found.append(outcome(lambda: conn.recv(10)))
        first = gevent.spawn(outcome, lambda: conn.recv(10))
        gevent.sleep(0)
        for read in READS.values():
            said = gevent.spawn(outcome, lambda read=read: read(conn))
            said.join(0.05)
            found.append(re.sub(r"connection: .*", "connection", str(said.value)))
            said.kill()
        peer.send(b"data")
        first.join(1)
        found.append(str(first.value))
        first.kill()
    return found


@case
def two_writers(conn: Connection, _peer: socket.socket) -> Any:
    first = gevent.spawn(outcome, lambda: conn.sendall(bytes(1 << 23)))
    gevent.sleep(0)
    found = []
    for write in WRITES.values():
        said = gevent.spawn(outcome, lambda write=write: write(conn))
        said.join(0.05)
        found.append(re.sub(r"connection: .*", "connection", str(said.value)))
        said.kill()
    first.kill()
    return found


@case
def in_the_hub(conn: Connection, peer: socket.socket) -> Any:
    found: list[str] = []

    def ask() -> None:
        calls = {**READS, **WRITES}
        found.extend(f"{name}: {outcome(partial(call, conn))}" for name, call in calls.items())

    for primed in (False, True):
        if primed:
            peer.send(b"x")
            found.append(outcome(lambda: conn.recv(10)))
        get_hub().loop.run_callback(ask)
        gevent.sleep(0.01)
        found.append(outcome(conn.stream.reader))
    return found


# -- the object --------------------------------------------------------------------------------------------------------


@case
def signatures(conn: Connection, _peer: socket.socket) -> Any:
    return [
        str(inspect.signature(method)).replace("'", "")
        for method in (conn.recv, conn.sendall, conn.recv_into, conn.recv_exactly, conn.send, conn.settimeout)
    ] + [conn.recv.__name__, conn.sendall.__name__, callable(conn.recv)]


@case
def pickles(conn: Connection, _peer: socket.socket) -> Any:
    return outcome(lambda: pickle.dumps(conn)), outcome(lambda: pickle.dumps(conn.idle()))


@case
def copies(conn: Connection, _peer: socket.socket) -> Any:
    return outcome(lambda: copy.deepcopy(conn))


@case
def unknown_attributes(conn: Connection, _peer: socket.socket) -> Any:
    return (
        outcome(lambda: setattr(conn.stream, "nothing", 1)),
        outcome(lambda: setattr(conn, "nothing", 1)),
        outcome(lambda: conn.idle().nothing),
    )


@case
def dropped_without_close(conn: Connection, peer: socket.socket) -> Any:
    def dropped(*, waited: bool) -> Any:
        conn, peer = pair()
        with closing(peer):
            if waited:
                conn.settimeout(5)
                peer.send(b"x")
                conn.recv(10)
                with gevent.Timeout(0.01, False):
                    conn.recv(10)
            alive, stream_alive = weakref.ref(conn), weakref.ref(conn.stream)
            del conn
            gc.collect()
            gevent.sleep(0.01)
            return alive() is None, stream_alive() is None, outcome(lambda: peer.recv(10))

    return dropped(waited=False), dropped(waited=True)


@case
def subclasses(_conn: Connection, _peer: socket.socket) -> Any:
    def ask(one: type[Connection]) -> list[Any]:
        conn, peer = pair(one)
        with closing(conn), closing(peer):
            peer.send(b"data")
            said = [outcome(lambda: conn.recv(10)), outcome(lambda: conn.sendall(b"answer")), conn.context]
            return [*said, outcome(lambda: peer.recv(100))]

    return [ask(one) for one in (Stubborn, OwnInit)]


@case
def after_close(conn: Connection, _peer: socket.socket) -> Any:
    conn.close()
    return [outcome(lambda call=call: call(conn)) for call in {**READS, **WRITES}.values()]


@case
def methods_taken_before_the_close(conn: Connection, _peer: socket.socket) -> Any:
    recv, sendall = conn.recv, conn.sendall
    conn.close()
    del conn
    return outcome(lambda: recv(10)), outcome(lambda: sendall(b"x")), outcome(lambda: sendall(b""))


@case
def traceback_names_lines(conn: Connection, peer: socket.socket) -> Any:
    peer.close()
    try:
        conn.recv_exactly(10)
    except EOFError as error:
        frames = traceback.extract_tb(error.__traceback__)
        # Compiled, one function may be named twice, with its module.
        return sorted({(frame.filename.rpartition("/")[2], frame.name.rpartition(".")[2]) for frame in frames})
    return None


def main() -> None:
    found = {}
    for name, ask in CASES.items():
        conn, peer = pair()
        with closing(peer):
            found[name] = outcome(lambda ask=ask, conn=conn, peer=peer: ask(conn, peer))
            conn.close()
    json.dump({"compiled": gtcpserver.compiled, "found": found}, sys.stdout)


if __name__ == "__main__":
    main()
