"""AcceptedSocket: the raw socket beneath an accepted connection: a number until something asks for more.

A socket object costs a new connection a tenth of its instructions, and a getsockname(2). Compiled code needs the
descriptor alone: it calls recv(2) and send(2) itself.
"""

from __future__ import annotations

from typing import Any

from gevent._socket3 import _closedsocket
from gevent.socket import socket as _Socket

from gtcpserver.linux import SOCK_NONBLOCK
from gtcpserver.process.descriptors import close_descriptor

_RawSocket = _Socket._gevent_sock_class  # noqa: SLF001 - gevent's

_OWN = frozenset({"_begun", "_made", "fd"})


class AcceptedSocket:
    """A descriptor in place of a socket object, which is made when something asks for what only that has.

    Args:
        family, type, proto: of the socket.
        fd: its descriptor, non-blocking, which the object owns. -1: closed, given away, or the socket object has it.

    Attributes:
        shown: somebody else has the descriptor's number and may have watchers on it.
    """

    __slots__ = ("_begun", "_made", "family", "fd", "proto", "shown", "type")

    def __init__(self, family: int, type: int, proto: int, fd: int) -> None:
        self.set_up(family, type, proto, fd)

    def set_up(self, family: int, type: int, proto: int, fd: int) -> None:
        """Do what the constructor does, for an object of ``AcceptedSocket.__new__``: that costs less."""
        self._made: Any = None
        self.fd = fd
        self.shown = False
        self.family = family
        self.type = type
        self.proto = proto
        self._begun = True

    def fileno(self) -> int:
        """Return the descriptor; -1: it is closed or given away."""
        self.shown = True
        if self._made is None:
            return self.fd
        fd: int = self._made.fileno()
        return fd

    def detach(self) -> int:
        """Give the descriptor away; return it."""
        if self._made is None:
            fd, self.fd = self.fd, -1
        else:
            fd = self._made.detach()
        return fd

    def close(self) -> None:
        """Close the descriptor, if that has not been done."""
        if self._made is not None:
            self._made.close()
        elif self.fd >= 0:
            close_descriptor(self.detach())

    def made(self) -> Any:
        """Return the socket object, which owns the descriptor from now on."""
        if self._made is None:
            if self.fd < 0:
                return _closedsocket(self.family, self.type, self.proto, None, "closed")
            self._made = _RawSocket(self.family, self.type | SOCK_NONBLOCK, self.proto, self.fd)
            self.fd = -1
        return self._made

    def __getattr__(self, name: str) -> Any:
        if name in _OWN:  # never set up
            raise AttributeError(name)
        return getattr(self.made(), name)

    def __repr__(self) -> str:
        return repr(self.made())

    def __del__(self) -> None:
        # Dropped without a close: a socket object warns of it (ResourceWarning), and closes the descriptor. (Compiled,
        # the `fd` of one that was never set up is 0.)
        if self._begun and self.fd >= 0:
            try:
                self.made()
            except BaseException:
                self.close()
                raise
