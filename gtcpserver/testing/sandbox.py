"""Sandbox: a server in a separate process, so that a handler that spins, hangs or leaks can be watched and ended.

The process is forked from the test's, so any handler works: a closure, an object, a function in the test itself. It
gets a new event loop. A socket pair connects it to the test for commands, and a file holds the stacks of a process that
no longer answers.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import gevent
import gevent.socket
from gevent import monkey
from gevent.hub import Hub, get_hub
from greenlet import getcurrent, greenlet

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import fault_key
from gtcpserver.linux import give_back_memory, memory_file, resident_bytes
from gtcpserver.pool.greenlets import HandlerGreenlet
from gtcpserver.process.forked import own_fork
from gtcpserver.server.describe import describe, peer
from gtcpserver.server.outcome import is_client_error
from gtcpserver.server.server import Server
from gtcpserver.signatures import Handler
from gtcpserver.transfer.pipes import PIPES

#: CPU seconds after which the kernel ends a process that nobody else ends (an endless computation after its test was
#: killed).
MOST_CPU_SECONDS = 120

#: Seconds for the server to start: no handler code runs yet, and the machine may be busy.
START_SECONDS = 60.0

#: Seconds that a handler told to end may take for its ``finally`` blocks.
KILL_SECONDS = 0.5

_STACK_SIGNAL = signal.SIGUSR2


class Blocked(Exception):
    """The event loop of the server does not run; the message is the stack of the code that blocks it."""


class Died(Exception):
    """The server's process ended; the message says how."""


@dataclass(frozen=True)
class Look:
    """The server's process at one moment.

    Attributes:
        accepted: connections since the start.
        open: connections with a running handler, or not closed yet.
        active: open connections with a running handler.
        where: position of each of these handlers in the code.
        descriptors: number open in the process.
        greenlets: number alive, except those that wait for work.
        blocks: memory blocks allocated by Python.
        memory: resident set, bytes.
        errors: errors of handlers since the last thorough look, each once, as text.
    """

    accepted: int
    open: int
    active: int
    where: list[str]
    descriptors: int
    greenlets: int
    blocks: int
    memory: int
    errors: list[str]


class Sandbox:
    """Starts the server; a ``with`` block ends it.

    Args:
        handler: as Server.
        options: as Server.
        patience: seconds in which a running server must answer.

    Raises:
        ConfigError: as Server.
    """

    def __init__(self, handler: Handler[Any], options: Mapping[str, Any], patience: float) -> None:
        Server("127.0.0.1:0", handler, **options)  # validates the options
        self._patience = patience
        self._stacks = memory_file("stacks")
        ours, theirs = _socketpair()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or both processes would write the buffered data
        # From here to the fork, and in the child to the end of the old loop, no other greenlet can run: the loop called
        # this one directly, not for one of several pending events.
        gevent.sleep(0)
        with warnings.catch_warnings():
            # A warning about threads (Python 3.12): the child only runs a server, in the thread that forked.
            warnings.simplefilter("ignore", DeprecationWarning)
            with own_fork():
                self.pid: int = monkey.get_original("os", "fork")()
        if not self.pid:
            os.close(ours)
            _run_child(theirs, self._stacks, handler, options)
        os.close(theirs)
        self._control = gevent.socket.socket(fileno=ours)
        self._lines = b""
        self._status: str | None = None
        try:
            self.address: str = self._ask("start", START_SECONDS)
        except BaseException:
            self.end()
            raise

    def look(self, thorough: bool = True) -> Look:
        """Return the current state. Raises Blocked or Died.

        Args:
            thorough: collect garbage and count; otherwise ``greenlets`` and ``blocks`` are 0.
        """
        return Look(**self._ask("look" if thorough else "glance"))

    def turn(self) -> None:
        """Wait for one iteration of the server's event loop: it has then seen all data sent before. Raises as look."""
        for _ in range(2):
            self._ask("turn")

    def kill_handlers(self) -> list[str]:
        """End every handler by GreenletExit, as a stop does; return where the others are. Raises as look."""
        standing: list[str] = self._ask("kill", self._patience + KILL_SECONDS)
        return standing

    def end(self) -> None:
        """End the process."""
        if self._status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._reap()
        self._control.close()
        if self._stacks >= 0:
            os.close(self._stacks)
            self._stacks = -1

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _ask(self, command: str, patience: float | None = None) -> Any:
        self._control.settimeout(self._patience if patience is None else patience)
        try:
            self._control.sendall(command.encode() + b"\n")
            while b"\n" not in self._lines:
                data = self._control.recv(65536)
                if not data:
                    raise Died(self._reap())
                self._lines += data
        except TimeoutError:
            raise Blocked(self._where_it_stands()) from None
        except ConnectionError:
            raise Died(self._reap()) from None
        line, _, self._lines = self._lines.partition(b"\n")
        answer = json.loads(line)
        if isinstance(answer, dict) and "failed" in answer:
            raise Died(f"the server did not start: {answer['failed']}")
        return answer

    def _where_it_stands(self) -> str:
        os.kill(self.pid, _STACK_SIGNAL)
        size = -1
        for _ in range(50):
            gevent.sleep(0.01)
            before, size = size, os.fstat(self._stacks).st_size
            if size and size == before:
                break
        lines = os.pread(self._stacks, 1 << 20, 0).decode(errors="replace").splitlines()
        own = os.path.dirname(os.path.dirname(__file__))
        frames = [line.strip() for line in lines if "File " in line]
        of_user = [frame for frame in frames if own not in frame and "gevent" not in frame]
        return "\n".join((of_user or frames)[:8]) or "nowhere in Python code"

    def _reap(self) -> str:
        if self._status is None:
            try:
                _, status = monkey.get_original("os", "waitpid")(self.pid, 0)
            except ChildProcessError:
                # A monkey-patched program reaps all its children when one of them ends.
                self._status = "it has ended"
            else:
                code = os.waitstatus_to_exitcode(status)
                how = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
                self._status = f"it has ended: {how}"
        return self._status


def _socketpair() -> tuple[int, int]:
    pair = monkey.get_original("socket", "socketpair")()
    ours, theirs = pair[0].detach(), pair[1].detach()
    return ours, theirs


# -- the child -------------------------------------------------------------------------------------------------------


def _run_child(control: int, stacks: int, handler: Handler[Any], options: Mapping[str, Any]) -> NoReturn:
    status = 1
    try:
        _get_own_event_loop()
        _forget_the_test()
        faulthandler.register(_STACK_SIGNAL, file=stacks, all_threads=False)
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_SECONDS, MOST_CPU_SECONDS))
        _Child(gevent.socket.socket(fileno=control), handler, options).run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: this process must not run the test's exit code.
        os._exit(status)


def _get_own_event_loop() -> None:
    """Leave the parent's event loop with all its greenlets: they run in the parent.

    gevent has no function for this: after a fork, greenlets run on in both processes (gevent's issue 2202).
    """
    hub, me = get_hub(), getcurrent()
    for callback in list(hub.loop._callbacks):  # noqa: SLF001 - gevent's
        callback.stop()
    # Their threads are in the parent.
    hub._threadpool = hub._resolver = None  # noqa: SLF001 - gevent's
    if me.parent is not None:
        me.parent = hub.parent
    hub.parent = me
    hub.destroy(destroy_loop=True)
    # Leave its frame: a lock that waited on the old hub checks whether it is dead, and then takes the new one.
    hub.throw()


def _forget_the_test() -> None:
    # Existing objects are not examined again: counts cover new objects only, and are fast.
    gc.collect()
    gc.freeze()
    _give_back_free_memory()
    # A test runner collects log records, which would look like a leak.
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _give_back_free_memory() -> None:
    """Return free memory to the system: reused memory would hide the server's allocations."""
    give_back_memory()


class _Child:
    """Runs the server, and answers commands."""

    def __init__(self, control: Any, handler: Handler[Any], options: Mapping[str, Any]) -> None:
        self._control = control
        self._errors: list[str] = []
        self._faults: dict[Any, int] = {}
        options = dict(options)
        self._on_error = options.pop("on_error", None)
        self._server = Server("127.0.0.1:0", handler, on_error=self._note_error, **options)

    def run(self) -> None:
        try:
            self._server.start()
        except OSError as error:
            self._answer({"failed": str(error)})
            return
        received = b""
        while data := self._control.recv(1000):
            received += data
            while b"\n" in received:
                command, _, received = received.partition(b"\n")
                self._answer(getattr(self, f"_{command.decode()}")())

    def _answer(self, answer: Any) -> None:
        self._control.sendall(json.dumps(answer).encode() + b"\n")

    def _start(self) -> str:
        return self._server.address

    def _turn(self) -> bool:
        return True

    def _glance(self) -> dict[str, Any]:
        return self._look(thorough=False)

    def _look(self, thorough: bool = True) -> dict[str, Any]:
        PIPES.close_unused()
        greenlets, errors = 0, []
        if thorough:
            errors, self._errors = self._errors, []
            gc.collect()
            greenlets = sum(_is_running(thing) for thing in gc.get_objects())
        stats = self._server.stats()
        return {
            "accepted": stats.accepted,
            "active": stats.active,
            "open": stats.active + stats.lingering + stats.handshaking + stats.proxy_headers_awaited,
            "where": [str(describe(*one)) for one in self._server.connections().items()],
            "descriptors": len(os.listdir("/dev/fd")),
            "greenlets": greenlets,
            "memory": resident_bytes(),
            "errors": errors,
            "blocks": sys.getallocatedblocks() if thorough else 0,
        }

    def _kill(self) -> list[str]:
        connections = self._server.connections()
        asked = list(connections.items())
        for _, worker in asked:
            worker.kill(block=False)
        with gevent.Timeout(KILL_SECONDS, False):
            while any(connection in connections for connection, _ in asked):
                gevent.sleep(0.002)
        return [str(describe(*one)) for one in asked if one[0] in connections]

    def _note_error(self, connection: Connection, error: BaseException) -> None:
        if not is_client_error(error, connection):
            key = fault_key(type(error), error.__traceback__)
            times = self._faults[key] = self._faults.get(key, 0) + 1
            if times == 1:
                stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
                self._errors.append(f"the handler raised for {peer(connection)}:\n{stack}")
        if self._on_error is not None:
            self._on_error(connection, error)


def _is_running(thing: Any) -> bool:
    if not isinstance(thing, greenlet) or thing.dead or isinstance(thing, Hub):
        return False
    return not isinstance(thing, HandlerGreenlet) or thing.working
