"""LeavingConnection: one connection on its way to another worker, from its offer to the end of its descriptor here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from gtcpserver.connection.moving import BUSY, Freeze
from gtcpserver.connection.tunnels import TunnelFreeze, relay_of
from gtcpserver.errors import HandedOver
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.server.moving import STATE

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection
    from gtcpserver.transfer.relay import Relay

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
        "_given",
        "_mover",
        "_number",
        "_sender",
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
        self._freeze: Freeze | TunnelFreeze | None = None
        self._given: list[int] = []  # its descriptors, once it is given away
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
        relay = relay_of(connection)
        if not why and relay is not None and not relay.pause():
            why = BUSY  # there is no pipe for its bytes now
        elif not why:
            why = self._describe_and_freeze(relay)
            if why and relay is not None:
                relay.go_on()
        if why:
            self.stays(why)
            return False
        self._worker = worker
        return True

    def _describe_and_freeze(self, relay: Relay | None) -> str:
        """Return why it stays; "" if it is frozen."""
        connection = self.connection
        try:
            self.state = self._mover.moving.state_of(connection)
        except OSError:
            return BUSY  # reset meanwhile
        except Exception:
            return STATE  # a header, or an address that the program has set, that cannot be written
        try:
            if relay is None:
                self._freeze = Freeze(connection, self._touched)
            else:
                self._freeze = TunnelFreeze(connection, relay, self._touched)
        except MemoryError:
            return BUSY  # its handler may wait for the outcome
        return ""

    def note_offer(self, sender: Sender, number: int) -> None:
        self._sender, self._number = sender, number

    def _touched(self) -> None:
        if self._sender is not None:
            self._sender.withdraw(self._number)
        self._end_wait(None)
        self._mover.put_off(self, BUSY)

    def descriptors(self) -> list[int]:
        assert self._freeze is not None
        return self._freeze.descriptors()

    def give_away(self) -> bool:
        freeze, moving = self._freeze, self._mover.moving
        assert freeze is not None
        if self._dropped or freeze.over or not freeze.still_waits():
            return False
        if not self.connection.is_idle and isinstance(freeze, Freeze):
            return False
        if moving.worker_of(self.connection) is not self._worker:
            return False
        try:
            self._given = freeze.give_away()
        except MemoryError:
            return False
        moving.given_away(self.connection)
        self._mover.given(self)
        return True

    def tell(self) -> None:
        assert self._freeze is not None
        if self._waiter is not None:
            self._end_wait(HandedOver())
        elif self._freeze.may_be_told():
            self._freeze.tell(self._worker, HandedOver())

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
        try:
            self._mover.put_off(self, why)
        finally:
            self._end_wait(None)

    def arrived(self) -> None:
        self._mover.settled(self)
        self._close_given()

    def _close_given(self) -> None:
        given, self._given = self._given, []
        for fd in given:
            close_descriptor(fd)

    def returned(self) -> None:
        self._mover.settled(self)
        given, self._given = self._given, []
        get_hub().loop.run_callback(partial(self._mover.come_back, self.state, given))

    def left_in_child(self) -> None:
        self._close_given()
        if self._freeze is not None and not self._freeze.over:
            self._freeze.left_in_child()
