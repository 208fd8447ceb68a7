"""Groups of upstreams: one member is chosen for each connection, another one if it cannot be reached.

What counts against a member is only that it cannot be connected to: everything else depends on the destination, which
clients choose, and they must not be able to have a member passed over. A member that failed `fall` times in a row is
asked last; it is checked until `rise` checks have succeeded. With a `HealthCheck` of the configuration's, all members
are checked all the time, and failed checks count as well. Each worker process has its own view.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, get_args
from weakref import WeakSet

import gevent

from gtcpserver.admission.client_limits import client_key, text_of
from gtcpserver.checks import check_number, check_whole_number, shown
from gtcpserver.errors import CAPACITY_ERRNOS, ConfigError

from .target import IPAddress, Target
from .upstream import Dial, Upstream

log = logging.getLogger("gtcpserver")

#: How to choose a member. "first": in the order of the configuration; "round-robin": in turn; "least-connections": the
#: one with the fewest of our connections; "hash-client": always the same one for a client (an IPv6 client is its /64).
Strategy = Literal["first", "round-robin", "least-connections", "hash-client"]


#: How to check a member. "tcp": connect to it, or to the first proxy on the way to it; "greeting": also through those,
#: with its TLS, and SOCKS5's greeting and login; "connect": have it connect to a target.
Kind = Literal["tcp", "greeting", "connect"]


@dataclass(frozen=True)
class HealthCheck:
    """What shows that a member works.

    Args:
        kind: see `Kind`.
        target: where to connect to through a member, for "connect".

    Raises:
        ConfigError: an invalid option.
    """

    kind: Kind = "tcp"
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"check must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if (self.kind == "connect") != (self.target is not None):
            raise ConfigError(f'check_target is needed for check = "connect", and no other, got {self.kind!r}')

    def check_member(self, upstream: Upstream) -> None:
        """Raise ConfigError if a member cannot be checked so."""
        ip = None if self.target is None else self.target.ip
        if self.target is None or not upstream.is_ipv4_only or (ip is not None and ip.version == 4):
            return
        if upstream.scheme == "socks4" or ip is not None:
            raise ConfigError(
                f"check_target must be an IPv4 address for {upstream.scheme}, got {str(self.target)!r} with member "
                f"{upstream.name!r}"
            )

    def run(self, upstream: Upstream, dial: Dial) -> None:
        """Check an upstream. Raise OSError if it does not work."""
        if self.target is not None:
            connection = upstream.connect(self.target, dial, None)
        else:
            connection = dial(upstream.first.target) if self.kind == "tcp" else upstream.greet(dial)
        connection.close()


#: Runs the check of an upstream; raises OSError if it does not work.
Run = Callable[[Upstream, HealthCheck], None]


#: The largest weight. nginx and haproxy have 256 and more; LVS 65,535.
MOST_WEIGHT = 65_535


#: Seconds for which a connection may still be counted after its end.
LOOK_EVERY = 1.0


class Member:
    """An upstream in a group.

    Attributes:
        upstream: where it is.
        weight: its share, for all strategies but "first".
        is_down: it cannot be reached; it is asked last.
    """

    def __init__(self, upstream: Upstream, weight: int) -> None:
        self.upstream = upstream
        self.weight = weight
        self.is_down = False
        self.failures = 0  # in a row
        self.turn = 0.0
        self._connections: WeakSet[Any] = WeakSet()
        self._looked_at = float("-inf")

    def add(self, connection: Any) -> None:
        """Count a connection until it is closed."""
        self._connections.add(connection)

    @property
    def connections(self) -> int:
        """Return the number of open connections.

        One that is closed is dropped by those who used it, at once in most cases. The others, such as those that have
        moved to another worker, are looked for once in LOOK_EVERY seconds: each look takes 0.2 us per connection.
        """
        now = monotonic()
        if now - self._looked_at >= LOOK_EVERY:
            self._looked_at = now
            for connection in [one for one in self._connections if one.fileno() < 0]:
                self._connections.discard(connection)
        return len(self._connections)

    def claim(self, key: str) -> float:
        """Return a number that is smallest for the member that a client belongs to (rendezvous hashing): clients of
        other members stay where they are when this one comes or goes."""
        digest = hashlib.blake2b(f"{self.upstream.name} {key}".encode(), digest_size=8).digest()
        return -math.log((int.from_bytes(digest, "big") + 1) / 2**64) / self.weight


class UpstreamGroup:
    """Several upstreams that lead to the same places.

    Args:
        members: at least one.
        strategy: how to choose one.
        weights: one for each member; (): all are equal.
        fall: failures in a row after which a member is down.
        rise: checks in a row that must succeed until it is up again.
        check_every: seconds between two checks.
        check: how to check all members; None: check those that are down, by connecting to them.

    Attributes:
        counters: how often members went down ("upstream_down") and came up ("upstream_up").

    Raises:
        ConfigError: an invalid option.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Upstream],
        strategy: Strategy = "first",
        weights: Sequence[int] = (),
        *,
        fall: int = 2,
        rise: int = 2,
        check_every: float = 5.0,
        check: HealthCheck | None = None,
    ) -> None:
        if strategy not in get_args(Strategy):
            raise ConfigError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
        if not members:
            raise ConfigError("members must have at least one upstream, got none")
        if weights and len(weights) != len(members):
            got = ", ".join(map(shown, weights))
            raise ConfigError(f"weights must have one number for each of {len(members)} members, got [{got}]")
        for weight in weights:
            check_whole_number("weights", weight, least=1, most=MOST_WEIGHT)
        check_whole_number("fall", fall, least=1)
        check_whole_number("rise", rise, least=1)
        check_number("check_every", check_every, above=0)
        self._checks_all = check is not None
        self._check = check or HealthCheck()
        for one in members:
            self._check.check_member(one)
        self.name = name
        self.members = [Member(one, weight) for one, weight in zip(members, weights or [1] * len(members), strict=True)]
        self._strategy = strategy
        self._fall = fall
        self._rise = rise
        self._check_every = check_every
        self._run: Run | None = None
        self._checking: dict[Member, Any] = {}
        self.counters: Counter[str] = Counter()

    def in_order(self, client: IPAddress) -> list[Member]:
        """Return the members in the order in which to try them, those that are down last."""
        members = self.members
        if self._strategy == "round-robin":
            members = self._in_turn()
        elif self._strategy == "least-connections":
            members = sorted(members, key=lambda member: member.connections / member.weight)
        elif self._strategy == "hash-client":
            key = text_of(client_key(client))
            members = sorted(members, key=lambda member: member.claim(key))
        return sorted(members, key=lambda member: member.is_down)

    def add(self, name: str, connection: Any) -> None:
        """Count a connection through the member of that name, which has come from another worker."""
        for member in self.members:
            if member.upstream.name == name:
                member.add(connection)

    def _in_turn(self) -> list[Member]:
        # Smooth weighted round-robin, as in nginx: a member of weight 5 has its turns spread among the others'.
        up = [member for member in self.members if not member.is_down] or self.members
        for member in up:
            member.turn += member.weight
        chosen = max(up, key=lambda member: member.turn)
        chosen.turn -= sum(member.weight for member in up)
        others = sorted((one for one in self.members if one is not chosen), key=lambda member: -member.turn)
        return [chosen, *others]

    # -- health ------------------------------------------------------------------------------------------------------

    @property
    def gauges(self) -> dict[str, int]:
        """Return the state of each member, for metrics and `gtcpserver ctl upstreams`."""
        found = {}
        for member in self.members:
            name = f"{self.name}/{member.upstream.name}"
            found[f"upstream_up:{name}"] = int(not member.is_down)
            found[f"upstream_down:{name}"] = int(member.is_down)
            found[f"upstream_connections:{name}"] = member.connections
        return found

    def begin_checks(self, run: Run) -> None:
        """Check the members from now on, as the options say. Called for each connection.

        Args:
            run: runs the check of an upstream.
        """
        self._run = run
        if self._checks_all and len(self._checking) < len(self.members):
            for member in self.members:
                self._watch(member)

    def note_reached(self, member: Member) -> None:
        """Note that a member could be connected to."""
        member.failures = 0

    def note_unreachable(self, member: Member, why: OSError) -> None:
        """Note that a member could not be connected to."""
        member.failures += 1
        self._judge(member, member.failures, why)

    def _judge(self, member: Member, failures: int, why: OSError) -> None:
        """Decide whether a member is down after so many failures in a row."""
        if failures < self._fall:
            return
        self._watch(member)  # if that fails, it is not down
        if member.is_down:
            return
        member.is_down = True
        self.counters["upstream_down"] += 1
        log.warning("upstream %s of %s is down: %s", member.upstream.name, self.name, why.strerror or why)

    def _watch(self, member: Member) -> None:
        """Check a member regularly: until it is up, or for good."""
        if member not in self._checking:
            self._checking[member] = gevent.spawn(self._check_regularly, member)

    def _check_regularly(self, member: Member) -> None:
        # In a row; failed connections are counted apart, since a proxy that can be connected to may not work.
        successes = failures = 0
        try:
            while self._checks_all or member.is_down:
                gevent.sleep(self._check_every)
                try:
                    assert self._run is not None
                    self._run(member.upstream, self._check)
                except OSError as error:
                    if error.errno in CAPACITY_ERRNOS:
                        continue  # not the member's fault
                    successes, failures = 0, failures + 1
                    self._judge(member, failures, error)
                else:
                    successes, failures = successes + 1, 0
                    if member.is_down and successes >= self._rise:
                        self._note_up(member)
        finally:
            self._checking.pop(member, None)

    def _note_up(self, member: Member) -> None:
        member.is_down = False
        member.failures = 0
        self.counters["upstream_up"] += 1
        log.info("upstream %s of %s is up", member.upstream.name, self.name)

    def close(self) -> None:
        """End the checks."""
        gevent.killall(list(self._checking.values()), block=False)
        self._checking.clear()
