"""FleetRoom: ``max_connections`` of several machines, of which each process has some places beforehand.

To ask for each connection would have the accept loops wait for each. So a process takes places in stock: a part of
those that are free, so that the stocks become smaller as the service fills up, and the last places are taken one by
one. Once a second it gives back what it does not need, and where hardly any are left, with each connection that ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gevent.hub import get_hub

from gtcpserver.store.connect import StoreError
from gtcpserver.store.scripts import PLACES
from gtcpserver.store.store import LEASE_OVER, Store

from .state import ServerState

#: Seconds until a full service is asked for again.
AGAIN_SECONDS = 0.1

#: Part of the stock that is kept when nobody needs it.
KEPT = 8


class FleetRoom:
    """The places of this process.

    Args:
        store: gives them.
        most: places of all processes together: ``max_connections``.
        state: has the connections of this process.
        answered: called in the hub when there may be room, or it turned out that there is none.

    Attributes:
        is_asking: whether there is room will be known in a moment.
    """

    def __init__(self, store: Store, most: int, state: ServerState, answered: Callable[[], Any]) -> None:
        self._store = store
        self._most = most
        self._state = state
        self._answered = answered
        self.is_asking = False
        self._member = ""
        self._places = 0
        self._ask_from = 0
        self._is_full = False
        self._is_tight = False
        self._somebody_waits = False
        self._has_ended = False
        self._has_left = False
        # Made now, as that of ServiceRoom.
        self._timer: Any = get_hub().loop.timer(AGAIN_SECONDS, AGAIN_SECONDS, ref=False)
        self._number = store.add_part(self)
        self.renew()

    def has_room(self) -> bool:
        """Return whether this process may have another connection. If not, `answered` is called later."""
        store = self._store
        if store.away:
            return not store.refuses_all or self._wait()
        used = len(self._state.connections)
        if used >= self._ask_from and not self._is_full:
            self._ask(1)
        return used < self._places or self._wait()

    def _wait(self) -> bool:
        self._somebody_waits = True
        return False

    def freed(self) -> None:
        """Give back the place of a connection that ended, where others may wait for it."""
        if self._is_tight:
            self._has_ended = True
            self._ask(int(self._somebody_waits))

    def renew(self) -> None:
        """As Part."""
        used = len(self._state.connections)
        kept = min(self._places, used + max(0, self._places - used) // KEPT)
        if not self.is_asking:
            self._places = kept
            self._ask(int(self._somebody_waits))

    def leave(self) -> None:
        """Give all places back. An answer that comes later takes none."""
        self._has_left = True
        self._timer.close()
        self._store.ask_share(PLACES, self._number, ["places"], ["0", "0", "0", "0"], lambda _: None)

    # -- questions ---------------------------------------------------------------------------------------------------

    def _ask(self, wanted: int) -> None:
        if self.is_asking or self._has_left:
            return
        if self._member != self._store.member:  # what another member had is void
            self._member, self._places = self._store.member, 0
        used = len(self._state.connections)
        if self._has_ended:
            self._has_ended = False
            self._places = min(self._places, used)
        numbers = [str(number) for number in (self._most, used, self._places, wanted)]
        answered = partial(self._learn, used, wanted)
        self.is_asking = self._store.ask_share(PLACES, self._number, ["places"], numbers, answered)

    def _learn(self, used: int, wanted: int, reply: Any) -> None:
        self.is_asking = False
        if self._has_left:
            return
        if isinstance(reply, int) and reply >= 0:
            self._take(reply, used, wanted)
        elif reply is not None:
            # Without a lease there are no places. To ask again at once would be a loop.
            self._store.fail(StoreError(LEASE_OVER if reply == -1 else "no answer of our script"))
        if self._somebody_waits:
            try:
                get_hub().loop.run_callback(self._wake)
            except MemoryError:
                self._timer.again(self._look)

    def _take(self, places: int, used: int, wanted: int) -> None:
        """Have this number of places, when `used` of them were used, and one more wanted or none."""
        self._places = places
        self._is_tight = places <= used + 1
        self._ask_from = places - max(0, places - used) // 2
        self._is_full = bool(wanted) and places <= used <= len(self._state.connections)
        if self._is_full:
            self._timer.again(self._look)
        if self._is_tight and self._has_ended:
            self._ask(int(self._somebody_waits))

    def _wake(self) -> None:
        self._somebody_waits = False
        try:
            self._answered()  # which asks again, if a connection waits
        except MemoryError:
            self._somebody_waits = True
            self._timer.again(self._look)

    def _look(self) -> None:
        self._timer.stop()
        self._is_full = False
        if self._somebody_waits:
            self._wake()
