"""The control socket: a unix socket on which `gtcpserver ctl` asks the master; one JSON object per line, both ways.

Two checks keep other users out: its mode (600), and the peer's credentials from the kernel (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from gevent import monkey

from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.errors import GtcpServerError
from gtcpserver.files.trusted_path import UntrustedPath, check_path
from gtcpserver.linux import peer_of
from gtcpserver.listening.unix_path import bind_unix, remove_if_ours
from gtcpserver.strict_json import to_json

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

#: Maximum bytes of a request line: with this many, and each character escaped, it still fits into a message to the
#: workers (`messages.MAX_BYTES`).
MAX_REQUEST = 32 * 1024
#: Maximum number of clients at once; beyond it, a silent one is closed.
MAX_CLIENTS = 16
#: Seconds for a client to send its line.
REQUEST_SECONDS = 5.0
MODE = 0o600

#: Seconds without accepting after a failed accept. A waiting connection would fail again at once (EMFILE), and the
#: master would spin.
PAUSE_SECONDS = 0.25

#: Socket errors that say nothing about the other end.
PASSING = frozenset({errno.ENOBUFS, errno.ENOMEM})

Reply = Callable[[dict[str, Any]], None]
Answer = Callable[[dict[str, Any], Reply], None]


@contextlib.contextmanager
def answering(reply: Reply) -> Iterator[None]:
    """Tell a client that the master failed at what it asked for, so that it does not wait for ever; raise on."""
    try:
        yield
    except Exception:
        reply({"error": "the master failed at this; its log says why"})
        raise


class ControlClient:
    """One connection: reads a line, answers with a line, and closes. Never waits."""

    def __init__(self, sock: socket.socket, answer: Answer) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._answer = answer
        self._inbox = b""
        self._outbox = bytearray()
        self.asked = False
        self._keep = False
        self.closed = False
        self.give_up_at = monotonic() + REQUEST_SECONDS

    def fileno(self) -> int:
        return self._sock.fileno()

    def events(self) -> int:
        return (0 if self.asked else select.POLLIN) | (select.POLLOUT if self._outbox else 0)

    def handle(self, events: int) -> None:
        """Handle events of the socket."""
        try:
            if self._outbox and events & select.POLLOUT:
                self._send()
            elif not self.asked and events & (select.POLLIN | select.POLLHUP):
                self._receive()
            elif events & (select.POLLHUP | select.POLLERR):
                self.close()
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in PASSING:
                raise
            self.close()

    def expire(self, now: float) -> None:
        if not self.asked and now > self.give_up_at:
            self.close()

    def _receive(self) -> None:
        data = self._sock.recv(MAX_REQUEST)
        if not data:
            self.close()
            return
        self._inbox += data
        line, end, _ = self._inbox.partition(b"\n")
        if not end:
            if len(self._inbox) > MAX_REQUEST:
                self.reply({"error": f"a request must be a line of at most {MAX_REQUEST} bytes"})
            return
        self.asked = True
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            self.reply({"error": f"a request must be a JSON object: {error}"})
            return
        with answering(self.reply):
            self._answer(request, self.reply)

    def reply(self, fields: dict[str, Any]) -> None:
        """Send the answer and close; with a field `end` True, close at the end of the master."""
        self.asked = True
        self._keep = bool(fields.get("end"))
        self._outbox = bytearray(to_json(fields).encode() + b"\n")
        with contextlib.suppress(OSError):  # the rest is sent when the socket is ready
            self.handle(select.POLLOUT)

    def _send(self) -> None:
        del self._outbox[: self._sock.send(self._outbox)]
        if not self._outbox and not self._keep:
            self.close()

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class ControlSocket:
    """The listening control socket.

    Args:
        path: path of the socket; an existing one in use is not replaced.
        answer: called with a request and a function to reply with, now or later, once.
        inherited: descriptor and identity from the last master.

    Raises:
        OSError: the path is unavailable; the message names it.
        UntrustedPath: this process is root, and another user could change where the path leads.
    """

    def __init__(self, path: str, answer: Answer, inherited: tuple[int, tuple[int, int] | None] | None = None) -> None:
        self.path = os.path.abspath(path) if not path.startswith("@") else path
        self._answer = answer
        self.clients: list[ControlClient] = []
        self._pause_until = 0.0
        self._refused = FaultLimiter()
        if inherited is not None:
            self.sock = _socket_class(fileno=inherited[0])
            os.set_inheritable(inherited[0], False)
            self.identity = inherited[1]
        else:
            self.sock = _socket_class(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if not self.path.startswith("@"):
                    check_path(self.path)
                self.identity = bind_unix(self.sock, self.path, MODE, MAX_CLIENTS)
            except BaseException as error:
                self.sock.close()
                if isinstance(error, UntrustedPath):
                    raise UntrustedPath(f"control socket {error}") from None
                if isinstance(error, OSError):
                    why = (error.strerror or str(error)).removeprefix(f"unix:{self.path}").removeprefix(": ").strip()
                    raise OSError(error.errno, f"control socket {self.path}: {why}") from None
                raise
        self.sock.setblocking(False)

    def accept(self) -> None:
        """Accept a connection."""
        try:
            # Not socket.accept: in a monkey-patched program it returns gevent's sockets, which create an event loop.
            fd, _ = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001 (socket.accept is built on it)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                self._pause_until = monotonic() + PAUSE_SECONDS
            return
        # With explicit kind: otherwise Python asks the kernel, and if that fails, the descriptor leaks.
        sock = _socket_class(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        try:
            peer = peer_of(sock)
        except OSError:
            sock.close()
            return
        uid = peer[1] if peer is not None else os.geteuid()  # unknown: the mode alone has kept others out
        if uid not in (0, os.geteuid()):
            left_out = self._refused.allow(uid)
            if left_out is not None:
                log.warning("a process of user %d was refused on the control socket%s", uid, also(left_out))
            sock.close()
            return
        if len(self.clients) >= MAX_CLIENTS:
            # Close the oldest silent client, or else the oldest that waits for an answer.
            next((client for client in self.clients if not client.asked), self.clients[0]).close()
            self.clients = [client for client in self.clients if not client.closed]
        self.clients.append(ControlClient(sock, self._answer))

    def accepts(self, now: float) -> bool:
        """Return whether to wait for connections."""
        return now >= self._pause_until

    def look_after(self, now: float) -> None:
        for client in self.clients:
            client.expire(now)
        self.clients = [client for client in self.clients if not client.closed]

    def close(self, *, remove: bool) -> None:
        """Close everything. `remove` deletes the path too, if it is still ours."""
        for client in self.clients:
            client.close()
        if remove and self.identity is not None:
            remove_if_ours(self.path, self.identity)
        self.sock.close()


class ControlError(GtcpServerError):
    """The master cannot be reached, or refuses.

    Example::

        from gtcpserver.supervisor import ControlError, ask

        try:
            ask("nobody.control", {"command": "status"})
        except ControlError as error:
            print(error)
    """


def ask(path: str, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Ask a master, as `gtcpserver ctl` does; blocks.

    Args:
        path: path of its control socket.
        request: the request, such as {"command": "status"}.
        timeout: seconds for the answer; None for no limit.

    Raises:
        ControlError: no master is there, it did not answer in time, or it reports an error.

    Example::

        from gtcpserver.supervisor import ask

        status = ask("app.control", {"command": "status"}, timeout=5)
        for worker in status["workers"]:
            print(worker["number"], worker["state"])
    """
    with _socket_class(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it closed
                sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline()
                answer = json.loads(line) if line else {}
                if answer.get("end"):
                    lines.read()  # until the master has ended
        except TimeoutError:
            raise ControlError(f"{path}: no answer within {timeout:g} s") from None
        except OSError as error:
            raise ControlError(f"{path}: {error.strerror or error}; is a master running with this control?") from None
        except ValueError:
            raise ControlError(f"{path}: the answer is no JSON: is this a control socket?") from None
    if not isinstance(answer, dict) or not answer:
        raise ControlError(f"{path}: closed without an answer; it may be another user's")
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer
