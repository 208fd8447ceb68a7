"""The control socket: a unix socket on which `gtcpserver ctl` asks the master; a JSON object a line, either way.

It is closed to other users twice: by its mode (600), and by asking the kernel who has connected (SO_PEERCRED, unix(7)).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent import monkey

from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.errors import GtcpServerError
from gtcpserver.files.trusted_path import UntrustedPath, check_path
from gtcpserver.listening.unix_path import bind_unix, remove_if_ours
from gtcpserver.strict_json import to_json

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

MAX_REQUEST = 4096  # bytes of a line; a request is a command and a number
MAX_CLIENTS = 16  # at once; one more, and a silent one is closed
REQUEST_SECONDS = 5.0  # for a client to send its line
MODE = 0o600

PAUSE_SECONDS = 0.25
"""How long nobody is accepted after that has failed. What waits would fail again at once (EMFILE), and make us spin."""

PASSING = frozenset({errno.ENOBUFS, errno.ENOMEM})
"""Errors of a socket that say nothing of the other end."""

Reply = Callable[[dict[str, Any]], None]
Answer = Callable[[dict[str, Any], Reply], None]


class ControlClient:
    """One connection: a line comes, one goes, it is closed. Never waits."""

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
        """The socket is ready."""
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
        self._answer(request, self.reply)

    def reply(self, fields: dict[str, Any]) -> None:
        """Sends the answer and closes; with a field `end` True, at the end of the master."""
        self.asked = True
        self._keep = bool(fields.get("end"))
        self._outbox = bytearray(to_json(fields).encode() + b"\n")
        with contextlib.suppress(OSError):  # what remains is sent when the socket is ready
            self.handle(select.POLLOUT)

    def _send(self) -> None:
        del self._outbox[: self._sock.send(self._outbox)]
        if not self._outbox and not self._keep:
            self.close()

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class ControlSocket:
    """The listening side.

    Args:
        path: where; nothing that is there and in use is replaced.
        answer: called with a request and a function to reply with, now or later, once.
        inherited: descriptor and identity from the last master.

    Raises:
        OSError: the path cannot be had; the message names it.
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
        """Somebody has connected."""
        try:
            # Not socket.accept: in a monkey-patched program its sockets are gevent's, which make an event loop.
            fd, _ = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001 (socket.accept is built on it)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                self._pause_until = monotonic() + PAUSE_SECONDS
            return
        # With its kind, which Python would ask the kernel for: where that fails, nobody closes the descriptor.
        sock = _socket_class(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        try:
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            sock.close()
            return
        if uid not in (0, os.geteuid()):
            left_out = self._refused.allow(uid)
            if left_out is not None:
                log.warning("a process of user %d was refused on the control socket%s", uid, also(left_out))
            sock.close()
            return
        if len(self.clients) >= MAX_CLIENTS:
            # The one that has been silent for the longest time, or waited.
            next((client for client in self.clients if not client.asked), self.clients[0]).close()
            self.clients = [client for client in self.clients if not client.closed]
        self.clients.append(ControlClient(sock, self._answer))

    def accepts(self, now: float) -> bool:
        """Whether to wait for connections."""
        return now >= self._pause_until

    def look_after(self, now: float) -> None:
        for client in self.clients:
            client.expire(now)
        self.clients = [client for client in self.clients if not client.closed]

    def close(self, *, remove: bool) -> None:
        """Closes everything. `remove` the path too, if it is still ours."""
        for client in self.clients:
            client.close()
        if remove and self.identity is not None:
            remove_if_ours(self.path, self.identity)
        self.sock.close()


class ControlError(GtcpServerError):
    """A master cannot be asked, or says no."""


def ask(path: str, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Asks a master, as `gtcpserver ctl` does; blocks.

    Args:
        path: of its control socket.
        request: such as {"command": "status"}.
        timeout: seconds for the answer; None waits for ever.

    Raises:
        ControlError: nobody is there, it gave no answer in time, or it says what is wrong.
    """
    with _socket_class(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
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
