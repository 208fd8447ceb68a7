"""A program whose handlers fork; forks.py has its clients.

    python forking.py patched|plain server|stream|tls|stream-tls|wsgi [first]

It prints its port. `first` is Python that is run before anything of ours is imported.
"""

from __future__ import annotations

import os
import socket
import sys

# Whatever is called in a child must be importable.


def wait_here(seconds: float) -> None:
    """In a child: wait on the event loop."""
    import gevent

    gevent.sleep(seconds)


def square(number: int) -> int:
    import gevent

    gevent.sleep(0.01)
    return number * number


def handle(conn, _address=None):
    import gevent

    request = conn.makefile("rb").readline().decode().split()
    word, rest = request[0], request[1:]
    if word == "lines":
        for number in range(20):
            conn.sendall(f"line {number}\n".encode())
            gevent.sleep(0.02)
    elif word == "pid":
        conn.sendall(b"%d\n" % os.getpid())
    else:
        COMMANDS[word](conn, *rest)


def start_process(conn, method="fork", seconds="60"):
    """Of multiprocessing; it goes on after the handler."""
    import multiprocessing

    process = multiprocessing.get_context(method).Process(target=wait_here, args=(float(seconds),))
    process.start()
    conn.sendall(b"%d\n" % process.pid)


def start_at_end(conn):
    """When the client has closed its side."""
    while conn.recv(100):
        pass
    start_process(conn)


def start_fork(conn):
    import gevent

    pid = os.fork()
    if not pid:
        gevent.sleep(60)
        os._exit(0)
    conn.sendall(b"%d\n" % pid)


def start_program(conn):
    """A child that waits between fork and exec."""
    import subprocess

    import gevent

    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=lambda: gevent.sleep(0.2))
    conn.sendall(b"%d\n" % process.pid)
    process.communicate()


def native_fork():
    """gevent's works in its main thread alone."""
    from gevent.monkey import get_original

    return get_original("os", "fork")()


def start_in_thread(conn):
    import gevent

    def fork():
        pid = native_fork()
        if not pid:
            gevent.sleep(60)
        return pid

    conn.sendall(b"%d\n" % gevent.get_hub().threadpool.apply(fork))


def end_in_thread(conn):
    """A child that returns from a task of a thread."""
    import gevent

    def fork():
        return native_fork() or None

    pid = gevent.get_hub().threadpool.apply(fork)
    try:
        status = status_of(pid)
    except ChildProcessError:  # gevent has reaped it, which did not fork it: that is known at its end
        status = 0
    conn.sendall(b"status %d\n" % status)


def start_pool(conn, kind):
    """Processes that go on after the handler."""
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context("fork")
    if kind == "futures":
        pool = concurrent.futures.ProcessPoolExecutor(2, mp_context=context)
        result = list(pool.map(square, range(10)))
        pids = list(pool._processes)  # noqa: SLF001  the children of a pool
    else:
        pool = context.Pool(2)
        result = pool.map(square, range(10))
        pids = [process.pid for process in pool._pool]  # noqa: SLF001  the children of a pool
    KEPT.append(pool)
    assert result == [number * number for number in range(10)]
    conn.sendall(" ".join(map(str, pids)).encode() + b"\n")


def status_of(pid):
    import gevent

    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        gevent.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def fork_and_end(conn, how):
    """The child writes to the connection, and comes to an end."""
    import gevent

    try:
        pid = os.fork()
        if not pid:
            gevent.sleep(0.01)
            conn.sendall(b"child\n")
            if how == "exit":
                sys.exit(5)
            if how == "raise":
                raise ValueError("raised in the child")
            if how == "close":
                conn.close()
            return
        conn.sendall(b"status %d\n" % status_of(pid))
    finally:
        if pid:
            conn.sendall(b"parent\n")


def fork_quietly(conn, how):
    """The child only comes to an end."""
    pid = os.fork()
    if not pid:
        if how == "exit":
            sys.exit(0)
        if how == "close":
            conn.close()
        return
    assert status_of(pid) == 0
    conn.sendall(b"parent\n")


def terminate(conn, count):
    import multiprocessing

    codes = []
    for _ in range(int(count)):
        process = multiprocessing.get_context("fork").Process(target=wait_here, args=(60.0,))
        process.start()
        process.terminate()
        process.join()
        codes.append(process.exitcode)
    conn.sendall(repr(codes).encode() + b"\n")


def in_child(conn, what):
    """Do it in a child and tell what it returns."""
    import contextlib

    import gevent

    reading, writing = os.pipe()
    with gevent.Timeout(10) if what == "timeout" else contextlib.nullcontext():
        pid = os.fork()
        if not pid:
            result = IN_CHILD[what](conn)
    if not pid:
        os.write(writing, repr(result).encode())
        os._exit(0)
    os.close(writing)
    status = status_of(pid)
    conn.sendall(os.read(reading, 1000) + b" %d\n" % status)
    os.close(reading)


def _run_asyncio(_conn):
    import asyncio

    async def main():
        await asyncio.sleep(0.01)
        return "asyncio"

    return asyncio.run(main())


def _run_program(_conn):
    import subprocess

    return subprocess.run(["echo", "program"], stdout=subprocess.PIPE, check=True).stdout


def _look_up(_conn):
    return socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)[0][4][1]


def _use_locks(_conn):
    import gevent

    # Copies of greenlets wait for these.
    EVENT.set()
    LOCK.release()
    gevent.sleep(0.05)
    return RAN


def _use_sockets(_conn):
    # A gevent socket of before the fork, on which nobody waits, can be waited on; closing others does no harm.
    import gevent

    one, other, watched = SOCKETS
    gevent.spawn_later(0.01, other.sendall, b"x")
    received = one.recv(1)
    one.close()
    watched.close()
    return received


def _time_out(_conn):
    import gevent

    gevent.sleep(0.01)
    return "in time"


def _serve_anew(_conn):
    """A server of the child's own, whose handler forks."""
    import gevent

    from gtcpserver import Server, connect

    with Server("127.0.0.1:0", handle) as server:
        with connect(server.address) as client:
            client.sendall(b"fork_and_end return\n")
            answer = client.recv_exactly(len(b"child\nstatus 0\nparent\n"))
        gevent.sleep(0)
    return answer


def _collect(_conn):
    """References to the parent's greenlets go, and with them the greenlets."""
    import gc

    import gevent

    GREENLETS.clear()
    gc.collect()
    gevent.sleep(0.01)
    return RAN


def _waits_for_ever(_conn):
    import gevent.event

    try:
        gevent.event.Event().wait()
    except gevent.exceptions.LoopExit:
        return "LoopExit"


IN_CHILD = {
    "asyncio": _run_asyncio,
    "program": _run_program,
    "look_up": _look_up,
    "locks": _use_locks,
    "sockets": _use_sockets,
    "timeout": _time_out,
    "serve": _serve_anew,
    "collect": _collect,
    "endless": _waits_for_ever,
}


def fork_in_callback(conn, how):
    """In a callback of the event loop itself."""
    import gevent
    from gevent.event import AsyncResult

    forked = AsyncResult()

    def callback():
        pid = os.fork()
        if not pid:
            if how == "raise":
                raise ValueError("raised in the child")
            return
        forked.set(pid)

    gevent.get_hub().loop.run_callback(callback)
    conn.sendall(b"status %d\n" % status_of(forked.get()))


def fork_in_greenlet(conn, how):
    """In a greenlet of the handler's, that the handler waits for."""
    import gevent

    def fork():
        pid = os.fork()
        if not pid:
            gevent.sleep(0.01)
            if how == "raise":
                raise ValueError("raised in the child")
            if how == "exit":
                sys.exit(5)
        return pid

    conn.sendall(b"status %d\n" % status_of(gevent.spawn(fork).get()))


KEPT: list = []
RAN: list = []
GREENLETS: list = []
LOCK = EVENT = None
SOCKETS: list = []
COMMANDS = {
    "process": start_process,
    "at_end": start_at_end,
    "fork": start_fork,
    "program": start_program,
    "thread": start_in_thread,
    "end_in_thread": end_in_thread,
    "pool": start_pool,
    "fork_and_end": fork_and_end,
    "fork_quietly": fork_quietly,
    "terminate": terminate,
    "in_child": in_child,
    "callback": fork_in_callback,
    "greenlet": fork_in_greenlet,
}


def application(environ, start_response):
    """WSGI: the child returns an answer as well."""
    import gevent

    pid = os.fork()
    if not pid:
        gevent.sleep(0.01)
    text = b"child" if not pid else b"status %d" % status_of(pid)
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]


def make_copies():
    """Greenlets that wait in the parent, each in another way, and would tell if they ran in a child."""
    global LOCK, EVENT
    import gevent
    import gevent.event
    import gevent.lock
    import gevent.socket

    parent = os.getpid()
    EVENT = gevent.event.Event()
    SOCKETS.extend((*gevent.socket.socketpair(), *gevent.socket.socketpair()[:1]))

    def copy(wait):
        try:
            wait()
            if os.getpid() != parent:
                RAN.append(wait)
        finally:
            if os.getpid() != parent:
                os.write(2, b"a finally block has run in a child\n")

    def hold_and_wait():
        while True:
            gevent.sleep(0.01)
            if os.getpid() != parent:
                RAN.append("sleep")

    LOCK = gevent.lock.Semaphore()
    LOCK.acquire()
    for wait in (LOCK.acquire, EVENT.wait, lambda: SOCKETS[2].recv(1), hold_and_wait, lambda: gevent.sleep(60)):
        GREENLETS.append(gevent.spawn(copy, wait))
    gevent.sleep(0.01)


def main():
    how, kind = sys.argv[1:3]
    if how == "patched":
        from gevent import monkey

        monkey.patch_all()
        import gevent

        # Before the first fork: gevent's os.fork() installs it behind it, and a child that ends before is never seen.
        gevent.get_hub().loop.install_sigchld()
    if len(sys.argv) > 3:
        exec(sys.argv[3], {})
    import gevent

    from gtcpserver import Server, StreamServer, TLSConfig, from_wsgi
    from gtcpserver.tls import self_signed

    if kind.startswith("stream"):
        files = self_signed()._asdict() if kind == "stream-tls" else {}
        server = StreamServer(("127.0.0.1", 0), handle, **files)
        server.start()
        port = server.server_port
    else:
        options = {"tls": TLSConfig(*self_signed())} if kind == "tls" else {}
        server = Server("127.0.0.1:0", from_wsgi(application) if kind == "wsgi" else handle, **options)
        server.start()
        port = server.port
    make_copies()
    gevent.spawn(print, port, flush=True)  # when it catches signals
    server.serve_forever()


if __name__ == "__main__":
    main()
