"""Groups of upstreams: one member is chosen for each connection, another one if it cannot be reached.

What counts against a member is only that it cannot be connected to: everything else depends on the destination, which
clients choose, and they must not be able to have a member passed over. A member that failed `fall` times in a row is
asked last; it is probed with TCP connections until `rise` of them have succeeded. Each worker process has its own view.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args
from weakref import WeakSet

import gevent

from gtcpserver.admission.client_limits import client_key
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import ConfigError

from .target import IPAddress
from .upstream import Upstream

log = logging.getLogger("gtcpserver")

#: How to choose a member. "first": in the order of the configuration; "round-robin": in turn; "least-connections": the
#: one with the fewest of our connections; "hash-client": always the same one for a client (an IPv6 client is its /64).
Strategy = Literal["first", "round-robin", "least-connections", "hash-client"]


#: The largest weight. nginx and haproxy have 256 and more; LVS 65,535.
MOST_WEIGHT = 65_535


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

    def add(self, connection: Any) -> None:
        """Count a connection until it is closed, and dropped by those who use it."""
        self._connections.add(connection)

    @property
    def connections(self) -> int:
        """Return the number of open connections. Takes the same time for any number."""
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
        rise: probes in a row that must succeed until it is up again.
        check_every: seconds between two probes.

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
    ) -> None:
        if strategy not in get_args(Strategy):
            raise ConfigError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
        if not members:
            raise ConfigError("members must have at least one upstream, got none")
        if weights and len(weights) != len(members):
            raise ConfigError(f"weights must have one number for each of {len(members)} members, got {len(weights)}")
        for weight in weights:
            check_whole_number("weights", weight, least=1, most=MOST_WEIGHT)
        check_whole_number("fall", fall, least=1)
        check_whole_number("rise", rise, least=1)
        check_number("check_every", check_every, above=0)
        self.name = name
        self.members = [Member(one, weight) for one, weight in zip(members, weights or [1] * len(members), strict=True)]
        self._strategy = strategy
        self._fall = fall
        self._rise = rise
        self._check_every = check_every
        self._probing: dict[Member, Any] = {}
        self.counters: Counter[str] = Counter()

    def in_order(self, client: IPAddress) -> list[Member]:
        """Return the members in the order in which to try them, those that are down last."""
        members = self.members
        if self._strategy == "round-robin":
            members = self._in_turn()
        elif self._strategy == "least-connections":
            members = sorted(members, key=lambda member: member.connections / member.weight)
        elif self._strategy == "hash-client":
            key = str(client_key(client))
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

    def note_reached(self, member: Member) -> None:
        """Note that a member could be connected to."""
        member.failures = 0

    def note_unreachable(self, member: Member, why: OSError, probe: Callable[[], None]) -> None:
        """Note that a member could not be connected to.

        Args:
            probe: connects to it, and raises OSError if that fails.
        """
        member.failures += 1
        if member.failures < self._fall or member in self._probing:
            return
        self._probing[member] = gevent.spawn(self._probe, member, probe)  # if that fails, it is not down
        member.is_down = True
        self.counters["upstream_down"] += 1
        log.warning("upstream %s of %s is down: %s", member.upstream.name, self.name, why.strerror or why)

    def _probe(self, member: Member, probe: Callable[[], None]) -> None:
        successes = 0
        try:
            while successes < self._rise:
                gevent.sleep(self._check_every)
                try:
                    probe()
                except OSError:
                    successes = 0
                else:
                    successes += 1
            member.is_down = False
            self.counters["upstream_up"] += 1
            member.failures = 0
            log.info("upstream %s of %s is up", member.upstream.name, self.name)
        finally:
            self._probing.pop(member, None)

    def close(self) -> None:
        """End the probes."""
        gevent.killall(list(self._probing.values()), block=False)
        self._probing.clear()
