"""Store: the limits that machines count together, as the rest of the package uses them.

A process has one store for each URL. While Redis answers, `ask` is one round trip, and what is open is counted in Redis
and here. While it is away, what is open is counted here; when it is back, the process becomes a new member, announces
all of its counts, and goes on. Nothing is counted twice by that: counts of the old membership are void at once.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from secrets import token_hex
from time import monotonic
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import gevent
from gevent.event import AsyncResult, Event
from gevent.hub import get_hub

from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.shared.column import Column

from .connect import StoreError, load_library
from .line import Line
from .scripts import ANNOUNCE, CHANGE, ENTER, GIVE_BACK, LEAVE, PLACES, RENEW, RENEW_SECONDS, SHARES, WRONG
from .settings import StoreSettings

log = logging.getLogger("gtcpserver")

#: Seconds until the first attempt to come back, and the most between two. Each is up to half as much more or less, so
#: that the members of a fleet do not all come at once.
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0

#: Seconds that a line must live for the next pause to be the first one again.
STEADY_SECONDS = 10.0

#: Seconds that the start of a server waits for the first attempt.
START_SECONDS = 1.0

#: Seconds to open a line and load the scripts.
OPEN_SECONDS = 2.0

#: Seconds that the stop of a server waits for Redis to know of it. If it does not, the lease is over soon.
CLOSE_SECONDS = 0.5

#: Seconds that a client with too many connections is refused without a question. One that closes a connection on
#: another machine waits that long at most.
REFUSED_SECONDS = 0.1

#: Refused clients that are remembered; beyond it, the one refused longest ago is asked about again. 200 bytes each.
MOST_REFUSED = 10_000

#: Counts in one script, which stops Redis for as long: 500 take 1 ms.
AT_ONCE = 500

#: Renewals in which the counts of all clients are kept from being deleted (`scripts.OPEN_MS` is six times as long).
KEEP_IN = 600

#: A refusal: Redis is away, and nobody is to be admitted without it.
STORE_FAILURE = "store_failure"

LEASE_OVER = "the lease was over, or somebody has deleted it"


class Demand(NamedTuple):
    """One limit that a connection needs room in.

    Attributes:
        key: what is counted, "open:..." or "rate:...".
        refusal: the answer if there is no room.
        most: most connections open; 0 if it limits a rate.
        token: milliseconds in which a rate allows one connection.
        ahead: milliseconds by which a burst may be ahead of the rate.
    """

    key: str
    refusal: str
    most: int = 0
    token: float = 0.0
    ahead: float = 0.0


def limits_of(name: str, most: int | None, rate: float | None, burst: float, names: tuple[str, str]) -> list[Demand]:
    """Return the demands of a client or user, "open" before "rate".

    Args:
        name: its name among all that is counted.
        most: most connections; None for no limit.
        rate: connections per second; None for no limit.
        burst: connections at once.
        names: the refusals.
    """
    demands = []
    if most is not None:
        demands.append(Demand(f"open:{name}", names[0], most))
    if rate is not None:
        token = 1000.0 / rate
        demands.append(Demand(f"rate:{name}", names[1], 0, token, (burst - 1) * token))
    return demands


class Part(Protocol):
    """Takes a share of something that all processes have together, beforehand: nobody waits for it."""

    def renew(self) -> None:
        """Tell Redis what is used, and learn the share. Called once a second, and when Redis is back. Must not wait."""


#: Called in the hub with the refusal; "": the connection is admitted, and counted until `leave`.
Decided = Callable[[str], Any]


class Store:
    """The store of a process.

    Attributes:
        failures: how often Redis went away.
        questions: how many were asked.
        alone: connections decided without Redis.
        member: the name of this process among those that count.
        users: how many servers use it.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.failures = 0
        self.questions = 0
        self.alone = 0
        self.users = 0
        self._parts: WeakSet[Part] = WeakSet()
        self._numbers = count()
        #: Return whether this process shall log that Redis is away, until the other is called: with workers, one does.
        self.take_turn: Callable[[], bool] = lambda: True
        self.end_turn: Callable[[], Any] = lambda: None
        self._line: Line | None = None
        self._opening: Line | None = None
        self.member = ""
        self._open: dict[str, int] = {}
        self._changes: dict[str, int] = {}
        self._unannounced: set[str] | None = None
        self._refused: dict[str, tuple[float, str]] = {}
        self._keep: list[str] = []
        self._untold: list[tuple[Decided, str]] = []
        self._away_since: float | None = None
        self._spoke = False
        self._lines = FaultLimiter(burst=3, interval=60.0)
        self._tried = Event()
        self._closed = False
        self._greenlet: Any = None
        self._timer: Any = None

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and stay connected. Waits for the first attempt, at most START_SECONDS."""
        if self._greenlet is None and not self._closed:
            load_library()
            self._timer = get_hub().loop.timer(RENEW_SECONDS, RENEW_SECONDS, ref=False)
            self._timer.start(self.renew)
            self._greenlet = gevent.spawn(self._run)
        self._tried.wait(START_SECONDS)

    def close(self) -> None:
        """Leave: what this process had open counts no more. Waits for an answer, at most CLOSE_SECONDS."""
        if self._closed:
            return
        self._closed = True
        line, self._line = self._line, None
        if self._timer is not None:
            self._timer.close()
        if line is not None:
            left = Event()
            line.send(LEAVE, [self._key("members")], [self.member], lambda _: left.set())
            left.wait(min(CLOSE_SECONDS, self.settings.timeout))
        for one in (line, self._opening):
            if one is not None:
                one.fail(StoreError("closed"))
        if self._greenlet is not None:
            self._greenlet.kill(block=False)

    def left_in_child(self) -> None:
        """Let go. Called in a forked child."""
        self._closed = True
        _stores.pop(self.settings, None)
        for line in (self._line, self._opening):
            if line is not None:
                line.left_in_child()
        self._line = self._opening = self._greenlet = self._timer = None
        self._untold = []

    @property
    def away(self) -> bool:
        """Whether Redis does not answer now."""
        return self._line is None

    @property
    def allows_all(self) -> bool:
        """Whether limits of connections and rates do not hold now: Redis is away, and "allow" was chosen."""
        return self._line is None and self.settings.on_failure == "allow"

    @property
    def refuses_all(self) -> bool:
        """Whether nobody new is to be admitted now: Redis is away, and "refuse" was chosen."""
        return self._line is None and self.settings.on_failure == "refuse"

    def open(self, key: str) -> int:
        """Return how many connections of a client this process has open."""
        return self._open.get(key, 0)

    # -- questions ---------------------------------------------------------------------------------------------------

    def ask(self, demands: Sequence[Demand], decided: Decided) -> str | None:
        """Ask whether all limits have room for a connection. Does not wait.

        Returns:
            the answer as for `decided`, which is then not called; None: it will be, within the time-out.
        """
        if not demands:
            return ""
        for demand in demands:
            known = self._refused.get(demand.key)
            if known is not None:
                if known[0] > monotonic():
                    return known[1]
                del self._refused[demand.key]
        line = self._line
        if line is None:
            return self._decide_alone(demands)
        self.questions += 1
        if self._changes:
            self._send_changes()
        keys, numbers = [self._key("members")], [self.member]
        for demand in demands:
            keys.append(self._key(demand.key))
            numbers += (str(demand.most), repr(demand.token), repr(demand.ahead))
        line.send(ENTER, keys, numbers, partial(self._answered, demands, decided))
        return None

    def ask_and_wait(self, demands: Sequence[Demand]) -> str:
        """As `ask`, in a greenlet, which waits for the answer. If it is killed meanwhile, nothing stays counted."""
        answer: Any = AsyncResult()
        known = self.ask(demands, answer.set)
        if known is not None:
            return known
        try:
            return str(answer.get())
        except BaseException:
            answer.rawlink(lambda result: self.leave(demands) if not result.value else None)
            raise

    def _answered(self, demands: Sequence[Demand], decided: Decided, reply: Any) -> None:
        # In the greenlet that reads, or in the one that has noticed a failure.
        try:
            answer = self._understood(demands, reply)
        except Exception as error:  # no answer of our script; or memory ran out, and what is counted where is unknown
            answer = STORE_FAILURE
            if self._line is not None:
                self._line.fail(error)
        self._tell(decided, answer)

    def _understood(self, demands: Sequence[Demand], reply: Any) -> str:
        if reply is None:
            return self._decide_alone(demands)
        number, milliseconds = map(int, reply)
        if number < 0:
            if self._line is not None:
                self._line.fail(StoreError(LEASE_OVER))
            return self._decide_alone(demands)
        if number == 0:
            self._count(demands)
            return ""
        demand = demands[number - 1]
        # The script's longest is one token.
        seconds = min(milliseconds, demand.token) / 1000 if milliseconds else REFUSED_SECONDS
        self._refuse(demand.key, seconds, demand.refusal)
        return demand.refusal

    def _refuse(self, key: str, seconds: float, refusal: str) -> None:
        while len(self._refused) >= MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._refused[key] = monotonic() + seconds, refusal

    def _decide_alone(self, demands: Sequence[Demand]) -> str:
        self.alone += 1
        if self.settings.on_failure == "refuse":
            return STORE_FAILURE
        self._count(demands)
        return ""

    def _tell(self, decided: Decided, answer: str) -> None:
        if self._closed and self._timer is None:
            return  # in a forked child
        try:
            get_hub().loop.run_callback(decided, answer)
        except MemoryError:
            self._untold.append((decided, answer))

    # -- counts ------------------------------------------------------------------------------------------------------

    def count(self, demands: Iterable[Demand]) -> None:
        """Count a connection that was admitted elsewhere, without asking."""
        self._count(demands)
        if self._line is not None:
            self._change(demands, 1)

    def leave(self, demands: Iterable[Demand]) -> None:
        """Count a connection no more."""
        for demand in demands:
            if demand.most:
                left = self._open.pop(demand.key, 0) - 1
                if left > 0:
                    self._open[demand.key] = left
                self._refused.pop(demand.key, None)
                if self._unannounced is not None:
                    self._unannounced.add(demand.key)
        if self._line is not None:
            self._change(demands, -1)

    def give_back(self, demands: Iterable[Demand]) -> None:
        """Give back the tokens of a connection that turned out to be another client's."""
        for demand in demands:
            if not demand.most and self._line is not None:
                self._line.send(GIVE_BACK, [self._key(demand.key)], [repr(demand.token)], None)

    def _count(self, demands: Iterable[Demand]) -> None:
        for demand in demands:
            if demand.most:
                self._open[demand.key] = self._open.get(demand.key, 0) + 1
                if self._unannounced is not None:
                    self._unannounced.add(demand.key)

    def _change(self, demands: Iterable[Demand], by: int) -> None:
        for demand in demands:
            if demand.most:
                self._changes[demand.key] = self._changes.get(demand.key, 0) + by
        if self._changes and self._line is not None:
            self._line.wake()

    def _send_changes(self) -> None:
        line, changes = self._line, list(self._changes.items())
        self._changes = {}
        for at in range(0, len(changes) if line is not None else 0, AT_ONCE):
            part = changes[at : at + AT_ONCE]
            keys = [self._key("members"), *(self._key(key) for key, _ in part)]
            assert line is not None
            line.send(CHANGE, keys, [self.member, *(str(by) for _, by in part)], None)

    # -- shares ------------------------------------------------------------------------------------------------------

    def add_part(self, part: Part) -> int:
        """Have a part renewed for as long as it exists; return its number."""
        self._parts.add(part)
        return next(self._numbers)

    def ask_share(
        self, script: str, number: int, keys: Sequence[str], arguments: Sequence[Any], answered: Callable[[Any], Any]
    ) -> bool:
        """Ask for a share. Does not wait.

        Args:
            script: one whose first key is the members, and whose first arguments are the member and its part.
            number: the part's.
            answered: called with the answer; None: there is none. Must neither wait nor raise.

        Returns:
            False: Redis is away, and nothing was asked.
        """
        line = self._line
        if line is None:
            return False
        names = [self._key("members"), *map(self._key, keys)]
        line.send(script, names, [self.member, f"{self.member}/{number}", *arguments], answered)
        return True

    def fail(self, error: Exception) -> None:
        """Take Redis for away: it has answered what it cannot answer."""
        if self._line is not None:
            self._line.fail(error)

    # -- wrong passwords ---------------------------------------------------------------------------------------------

    def wrong(self, name: str, user: str = "", more: int = 0, window: float = 0.0) -> tuple[int, float] | None:
        """Return the number of wrong passwords of an address, and the seconds until they are forgotten. Waits.

        Args:
            name: names the address.
            user: the user whose password was wrong.
            more: wrong passwords to add first.
            window: seconds until they are forgotten.

        Returns:
            None: Redis is away.
        """
        line = self._line
        if line is None:
            return None
        reply: Any = AsyncResult()
        self.questions += 1
        arguments = [user, str(more), str(int(window * 1000))]
        line.send(WRONG, [self._key(f"wrong:{name}")], arguments, reply.set)
        found = reply.get()
        try:
            return None if found is None else (int(found[0]), max(0, int(found[1])) / 1000)
        except Exception as error:  # no answer of our script
            line.fail(error)
            return None

    def forget_wrong(self, name: str, user: str) -> None:
        """Forget the wrong passwords of an address for one user. Does not wait."""
        if self._line is not None:
            self._line.send(WRONG, [self._key(f"wrong:{name}")], [user, "-", "0"], None)

    # -- the line ----------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self.settings.prefix}:{name}"

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._closed:
            line = Line(self.settings, lambda error: self._went_away(error), self._before_writing)
            began = monotonic()
            try:
                self._opening = line
                with gevent.Timeout(OPEN_SECONDS, StoreError(f"no connection within {OPEN_SECONDS:g} s")):
                    line.open((ANNOUNCE, RENEW, ENTER, CHANGE, GIVE_BACK, WRONG, LEAVE, PLACES, SHARES))
                self._announce(line)
                self._opening = None
                began = monotonic()
                line.read()
            except Exception as error:
                line.fail(error)
            self._opening = None
            self._tried.set()
            if monotonic() - began > STEADY_SECONDS:
                pause = FIRST_PAUSE
            gevent.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(LONGEST_PAUSE, pause * 2)

    def _announce(self, line: Line) -> None:
        """Become a new member with all that is open now, and take questions from then on."""
        members = self._key("members")
        if self.member:
            line.call(LEAVE, [members], [self.member])
        self.member = token_hex(8)
        self._unannounced = set(self._open)
        line.call(ANNOUNCE, [members], [self.member])
        while len(self._unannounced) > AT_ONCE:
            line.call(ANNOUNCE, *self._next_counts())
        # One that is slow would go away again at the next question.
        began = monotonic()
        line.call(RENEW, [members], [self.member])
        if monotonic() - began > self.settings.timeout:
            raise StoreError(f"no answer within {self.settings.timeout:g} s")
        # No switch from here on: what changes now follows these counts on the line.
        line.start()
        while self._unannounced:
            line.send(ANNOUNCE, *self._next_counts(), None)
        self._line = line
        self._came_back()

    def _next_counts(self) -> tuple[list[str], list[str]]:
        """Return keys and arguments of the next announcement."""
        assert self._unannounced is not None
        part = [self._unannounced.pop() for _ in range(min(AT_ONCE, len(self._unannounced)))]
        counts = [str(self._open.get(key, 0)) for key in part]
        return [self._key("members"), *map(self._key, part)], [self.member, *counts]

    def _before_writing(self) -> None:
        if self._changes:
            self._send_changes()

    def renew(self) -> None:
        """Renew the lease, and some of the counts. Called in the hub."""
        untold, self._untold = self._untold, []
        for decided, answer in untold:
            self._tell(decided, answer)
        if self._greenlet.dead:  # memory ran out where it dealt with another error
            self._greenlet = gevent.spawn(self._run)
        line = self._line
        if line is None:
            return
        if not self._keep:
            self._keep = list(self._open)
        part = [self._keep.pop() for _ in range(min(len(self._keep), AT_ONCE, 1 + len(self._open) // KEEP_IN))]
        line.send(RENEW, [self._key("members"), *map(self._key, part)], [self.member], partial(self._renewed, line))
        self._renew_parts()

    def _renew_parts(self) -> None:
        for one in list(self._parts):
            one.renew()

    def _renewed(self, line: Line, reply: Any) -> None:
        if reply == 0:
            line.fail(StoreError(LEASE_OVER))

    # -- away and back -----------------------------------------------------------------------------------------------

    def _went_away(self, error: Exception) -> None:
        was_here, self._line = self._line is not None, None
        self._unannounced = None
        self._changes = {}
        self._refused = {}
        if self._closed:
            return
        if was_here or self._away_since is None:
            self.failures += 1
            self._away_since = monotonic()
            self._log_away(error)

    def _log_away(self, error: Exception) -> None:
        if not self.take_turn():
            return
        left_out = self._lines.allow("away")
        if left_out is None:
            self.end_turn()  # another process may have said less
            return
        self._spoke = True
        why = " ".join(str(error).split()) or type(error).__name__
        log.warning("shared limits: Redis at %s is away (%s)%s; %s", self.settings, why, also(left_out), self._holds())

    def _holds(self) -> str:
        return {
            "local": "the limits of this machine hold alone",
            "allow": "no limits of connections and rates hold",
            "refuse": "new clients are refused",
        }[self.settings.on_failure]

    def _came_back(self) -> None:
        self._unannounced = None
        self._renew_parts()
        self._tried.set()
        if self._away_since is not None:
            if self._spoke:
                self._spoke = False
                self.end_turn()
                log.info(
                    "shared limits: Redis at %s is back after %.1f s", self.settings, monotonic() - self._away_since
                )
            self._away_since = None


# -- the stores of this process ---------------------------------------------------------------------------------------

_stores: dict[StoreSettings, Store] = {}


def open_store(settings: StoreSettings, column: Column | None = None) -> Store:
    """Return the store of these settings, started; each call is followed by one of `close_store`.

    Args:
        column: the column of this process, if there are workers.
    """
    store = _stores.get(settings)
    if store is None:
        store = _stores[settings] = Store(settings)
    store.users += 1
    if column is not None:
        store.take_turn, store.end_turn = column.take_turn, column.end_turn
    store.start()
    return store


def close_store(store: Store) -> None:
    """Close a store that nobody uses any more."""
    store.users -= 1
    if not store.users:
        _stores.pop(store.settings, None)
        store.close()


def store_figures() -> dict[str, int]:
    """Return the figures of all stores of this process, as in `ServerStats`."""
    stores = list(_stores.values())
    return {
        "store_away": sum(store.away for store in stores),
        "store_failures": sum(store.failures for store in stores),
        "store_questions": sum(store.questions for store in stores),
        "store_decided_alone": sum(store.alone for store in stores),
    }
