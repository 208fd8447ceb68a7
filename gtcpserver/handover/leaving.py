"""LeavingConnection: one connection on its way to another worker, from its offer to the end of its descriptor here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from gtcpserver.connection.moving import BUSY, Freeze
from gtcpserver.errors import HandedOver
from gtcpserver.server.moving import STATE

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection

    from .mover import Mover
    from .sender import Sender


class LeavingConnection:
    """A connection that leaves, as the Sender knows it (`sender.Leaving`).

    Args:
        waiter: what its handler waits by, at the beginning of an idle block; None: it waits to read.
    """

    __slots__ = (
        "_dropped",
        "_freeze",
        "_mover",
        "_number",
        "_sender",
        "_sock",
        "_waiter",
        "_worker",
        "connection",
        "state",
    )

    def __init__(self, mover: Mover, connection: Connection, waiter: Any = None) -> None:
        self._mover = mover
        self.connection = connection
        self._waiter = waiter
        self._worker: Any = None
        self._freeze: Freeze | None = None
        self._sock: Any = None
        self._sender: Sender | None = None
        self._number = -1
        self._dropped = False
        self.state: dict[str, Any] = {}

    @property
    def waits(self) -> bool:
        """Whether its handler waits for the outcome."""
        return self._waiter is not None

    def wait(self) -> None:
        """Wait for the outcome, in the handler's greenlet.

        Raises:
            HandedOver: it has moved.
        """
        try:
            self._waiter.get()
        except BaseException:
            self._dropped = True  # killed, by a timeout perhaps: the handler needs its connection now
            if self._freeze is not None and not self._freeze.over:
                self._freeze.touched()
            self._mover.done(self)
            raise

    def freeze(self) -> bool:
        """Freeze it, and write its state; return False if it stays."""
        moving, connection = self._mover.moving, self.connection
        if self._dropped:
            return False
        worker = moving.worker_of(connection)
        why = moving.why_not(connection, worker if self.waits else None)
        if not why:
            try:
                self.state = moving.state_of(connection)
            except OSError:
                why = BUSY  # reset meanwhile
            except Exception:
                why = STATE  # a header, or an address that the program has set, that cannot be written
        if why:
            self.stays(why)
            return False
        self._worker = worker
        try:
            self._freeze = Freeze(connection, self._touched)
        except MemoryError:
            self.stays(BUSY)  # its handler may wait for the outcome
            return False
        return True

    def note_offer(self, sender: Sender, number: int) -> None:
        self._sender, self._number = sender, number

    def _touched(self) -> None:
        if self._sender is not None:
            self._sender.withdraw(self._number)
        self._end_wait(None)
        self._mover.put_off(self, BUSY)

    def fileno(self) -> int:
        assert self._freeze is not None
        fd: int = self._freeze.sock.fileno()
        return fd

    def give_away(self) -> bool:
        freeze, moving = self._freeze, self._mover.moving
        assert freeze is not None
        if self._dropped or freeze.over or not freeze.still_waits() or not self.connection.is_idle:
            return False
        if moving.worker_of(self.connection) is not self._worker:
            return False
        try:
            self._sock = freeze.give_away()
        except MemoryError:
            return False
        moving.given_away(self.connection)
        self._mover.given(self)
        return True

    def tell(self) -> None:
        assert self._freeze is not None
        if self._waiter is not None:
            self._end_wait(HandedOver())
        elif self._freeze.still_waits():
            self._worker.throw(HandedOver())

    def _end_wait(self, error: BaseException | None) -> None:
        waiter = self._waiter
        if waiter is None or self._dropped:
            return
        self._dropped = True
        if error is None:
            get_hub().loop.run_callback(waiter.switch, None)
        else:
            waiter.throw(error)

    def stays(self, why: str) -> None:
        if self._freeze is not None and not self._freeze.over:
            self._freeze.thaw()
        self._mover.put_off(self, why)
        self._end_wait(None)

    def arrived(self) -> None:
        self._mover.settled(self)
        self._sock.close()

    def returned(self) -> None:
        self._mover.settled(self)
        fd = self._sock.detach()
        get_hub().loop.run_callback(partial(self._mover.come_back, self.state, fd))

    def left_in_child(self) -> None:
        for sock in (self._sock, self._freeze.sock if self._freeze is not None else None):
            if sock is not None:
                sock.close()
