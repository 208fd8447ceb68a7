"""Limits of the proxy: connections in total, per client, per user; connection attempts; bytes per second of a
connection and of a user.

With workers all of them count together (`shared`), and with ``shared_limits`` all machines (`store`).
"""

from __future__ import annotations

import errno
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

import gevent

from gtcpserver.admission.client_limits import ClientKey, ClientLimits, key_of_host, text_of
from gtcpserver.admission.shared_clients import SharedClients
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.shared.column import Column
from gtcpserver.store.store import STORE_FAILURE, Demand, Store, limits_of

from .buckets import Bucket, SharedBucket, TokenBucket
from .errors import LimitReached
from .udp import Associations
from .user_rates import StoredBucket, UserRates

#: Users whose bytes are remembered after their last connection; beyond that, the one longest unseen is forgotten. 400
#: bytes each.
MOST_USERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits; None means no limit.

    Attributes:
        connections: of all clients at once.
        client_connections: of one client at once; an IPv6 client is its /64.
        user_connections: of one user at once.
        connect_attempts: connection attempts to destinations and upstreams in progress at once, for all clients.
        client_connect_attempts: the same, for one client.
        udp_associations: of all clients at once.
        client_udp_associations: the same, for one client.
        new_per_second: connections that one client may open per second.
        rate: bytes per second of one connection, both directions together.
        user_rate: bytes per second of all connections of one user.
        request_body: maximum bytes of the body of an HTTP request; chunked bodies are then refused.

    Raises:
        ConfigError: one of them is invalid.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.limits import LimitKeeper, Limits

        gate = Gate(limits=LimitKeeper(Limits(client_connections=100, rate=1_000_000)))
    """

    connections: int | None = None
    client_connections: int | None = None
    user_connections: int | None = None
    connect_attempts: int | None = None
    client_connect_attempts: int | None = None
    udp_associations: int | None = None
    client_udp_associations: int | None = None
    new_per_second: float | None = None
    rate: float | None = None
    user_rate: float | None = None
    request_body: int | None = None

    def __post_init__(self) -> None:
        for name in (
            *("connections", "client_connections", "user_connections"),
            *("connect_attempts", "client_connect_attempts", "udp_associations", "client_udp_associations"),
        ):
            check_whole_number(name, getattr(self, name), least=1, none="for no limit")
        for name in ("new_per_second", "rate", "user_rate"):
            check_number(name, getattr(self, name), above=0, none="for no limit")
        check_whole_number("request_body", self.request_body, least=0, none="for no limit")


#: Limits of the proxy, by those of `ClientLimits`.
_NAMES = {"client_rate": "new_per_second"}


def _key_of(user: str) -> bytes:
    return b"proxy user " + user.encode("utf-8", "surrogatepass")


def _name_of(user: str) -> str:
    """Return a user's name in the store: a digest. Names may be of any length, and are nobody's business there."""
    return f"proxy-user:{blake2b(_key_of(user), digest_size=16).hexdigest()}"


class Attempts:
    """Count the connection attempts of one client, and of all."""

    __slots__ = ("_client", "_keeper")

    def __init__(self, keeper: LimitKeeper, client: ClientKey | None) -> None:
        self._keeper = keeper
        self._client = client

    def begin(self) -> None:
        """Begin an attempt; `end` must be called when its socket is connected or closed. May wait for the store.

        Raises:
            LimitReached: with the name of the limit. The attempt must not begin.
        """
        store = self._keeper.store
        self._begin_here(limited=store is None or not store.allows_all)
        if store is not None:
            answer = "?"
            try:
                answer = store.ask_and_wait(self._demands())
            finally:
                if answer:
                    self._end_here()
            if answer:
                raise LimitReached(errno.EUSERS, answer)

    def end(self) -> None:
        """End an attempt."""
        self._end_here()
        if self._keeper.store is not None:
            self._keeper.store.leave(self._demands())

    def _demands(self) -> list[Demand]:
        """Return what to ask the store: one question for both limits."""
        limits, client = self._keeper.limits, self._client
        demands = limits_of("proxy-attempts", limits.connect_attempts, None, 1, ("connect_attempts", ""))
        if client is not None:
            name = f"proxy-attempts:{text_of(client)}"
            demands += limits_of(name, limits.client_connect_attempts, None, 1, ("client_connect_attempts", ""))
        return demands

    def _begin_here(self, limited: bool) -> None:
        keeper, client = self._keeper, self._client
        limits = keeper.limits
        most = limits.connect_attempts
        if limited and most is not None and keeper.attempts + keeper.elsewhere("proxy_attempts") >= most:
            raise LimitReached(errno.EUSERS, "connect_attempts")
        most = limits.client_connect_attempts
        if client is not None and most is not None:
            of_all = keeper.attempts_of_all
            if of_all is not None and not limited:
                of_all.resume(_attempts_key(client))
            elif of_all is not None and of_all.enter(_attempts_key(client)) is not None:
                raise LimitReached(errno.EUSERS, "client_connect_attempts")
            if limited and of_all is None and keeper.attempts_by_client[client] >= most:
                raise LimitReached(errno.EUSERS, "client_connect_attempts")
            keeper.attempts_by_client[client] += 1
        keeper.attempts += 1
        keeper.tell_attempts()

    def _end_here(self) -> None:
        keeper, client = self._keeper, self._client
        keeper.attempts -= 1
        keeper.tell_attempts()
        if client is not None and keeper.limits.client_connect_attempts is not None:
            if keeper.attempts_of_all is not None:
                keeper.attempts_of_all.leave(_attempts_key(client))
            keeper.attempts_by_client[client] -= 1
            if not keeper.attempts_by_client[client]:
                del keeper.attempts_by_client[client]


def _attempts_key(client: ClientKey) -> bytes:
    return b"proxy attempts " + text_of(client).encode()


class LimitKeeper:
    """Enforce the limits of all listeners of a proxy: know who is connected, and how much each user has moved.

    Attributes:
        connections, attempts, attempts_by_client: what this process has.
        attempts_of_all: attempts by client in all workers; None: there is no such limit, or there are no workers.
        store: what other machines count, too; None: they do not.
        associations: limits UDP associations.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.limits import LimitKeeper, Limits

        keeper = LimitKeeper(Limits(connections=1000))
        gates = [Gate(listener=name, limits=keeper) for name in ("inside", "outside")]
        print(keeper.connections)  # 0
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._clients = ClientLimits(
            connections=self.limits.client_connections, new_per_second=self.limits.new_per_second
        )
        self._limits_clients = bool(self.limits.client_connections or self.limits.new_per_second)
        self._limits_attempts = bool(self.limits.connect_attempts or self.limits.client_connect_attempts)
        self.connections = 0
        self.attempts = 0
        self.attempts_by_client: Counter[ClientKey] = Counter()
        self.attempts_of_all: SharedClients | None = None
        self.associations = Associations(self.limits.udp_associations, self.limits.client_udp_associations)
        self._users: Counter[str] = Counter()
        # Buckets in use, shared by all connections of a user; and those last used, which outlive them: traffic on one
        # connection counts for the next one.
        self._buckets: WeakValueDictionary[str, Bucket] = WeakValueDictionary()
        self._kept: OrderedDict[str, Bucket] = OrderedDict()
        # In a worker process:
        self._column: Column | None = None
        self._users_of_all: SharedClients | None = None
        self.store: Store | None = None
        self._rates: UserRates | None = None

    def share(self, column: Column) -> None:
        """Count together with all processes that have a column. Call before the first connection."""
        self._column = column
        self._clients.share(column, "proxy clients")
        self.associations.share(column)
        if self.limits.user_connections is not None:
            self._users_of_all = SharedClients(column, self.limits.user_connections, None, 1)
        if self.limits.client_connect_attempts is not None:
            self.attempts_of_all = SharedClients(column, self.limits.client_connect_attempts, None, 1)

    def share_store(self, store: Store) -> None:
        """Count together with other machines. Call before the first connection."""
        if self.store is store:
            return  # each listener says it
        self.store = store
        self._clients.share_store(store, "proxy-clients")
        if self.limits.user_rate is not None:
            self._rates = UserRates(store, self.limits.user_rate)

    @property
    def counted(self) -> int:
        """Clients whose connections are counted now."""
        return self._clients.counted

    def enter(self, address: Any) -> str:
        """Register a client. Return "" if it may stay, and `leave` must be called at its end; otherwise the limit.

        May wait for the store.

        Args:
            address: as returned by ``accept``.
        """
        most, store = self.limits.connections, self.store
        is_full = most is not None and self.connections + self.elsewhere("proxy_connections") >= most
        if is_full and (store is None or not store.allows_all):
            return "connections"
        refusal = self._clients.enter(address) if self._limits_clients else None
        if refusal is not None:
            return _NAMES.get(refusal, refusal)
        self.connections += 1
        self._tell_connections()
        if store is not None and (demands := self._demands(address)):
            answer = "?"
            try:
                answer = store.ask_and_wait(demands)
            finally:
                if answer:
                    self._leave_here()
                    if self._limits_clients:
                        self._clients.undo_enter(address)
            return _NAMES.get(answer, answer)
        return ""

    def resume(self, address: Any) -> None:
        """Register a client that another worker has admitted, and that moves here."""
        if self._limits_clients:
            self._clients.resume(address, returns=True)
        self.connections += 1
        self._tell_connections()
        if self.store is not None:
            self.store.count(self._demands_of_all())

    def _demands(self, address: Any) -> list[Demand]:
        """Return what to ask the store: one question for all limits of a connection."""
        return self._demands_of_all() + self._clients.demands(address)

    def _demands_of_all(self) -> list[Demand]:
        return limits_of("proxy", self.limits.connections, None, 1, ("connections", ""))

    def leave(self, address: Any) -> None:
        """Unregister a client that was admitted."""
        self._leave_here()
        if self._limits_clients:
            self._clients.leave(address)
        if self.store is not None:
            self.store.leave(self._demands_of_all())

    def _leave_here(self) -> None:
        self.connections -= 1
        self._tell_connections()

    def elsewhere(self, name: str) -> int:
        """Return how many of these all other workers have."""
        return 0 if self._column is None else self._column.number_elsewhere(name)

    def _tell_connections(self) -> None:
        if self._column is not None and self.limits.connections is not None:
            self._column.set_number("proxy_connections", self.connections)

    def tell_attempts(self) -> None:
        """Tell the other workers how many attempts are under way here."""
        if self._column is not None and self.limits.connect_attempts is not None:
            self._column.set_number("proxy_attempts", self.attempts)

    def attempts_of(self, address: Any) -> Attempts | None:
        """Return the counter of a client's connection attempts; None: there is no limit.

        Args:
            address: as returned by ``accept``. Clients on a Unix socket have no limit of their own.
        """
        if not self._limits_attempts:
            return None
        return Attempts(self, key_of_host(address[0]) if isinstance(address, tuple) else None)

    def enter_user(self, user: str) -> str:
        """Register a connection of this user; return as `enter`. May wait for the store."""
        most, store = self.limits.user_connections, self.store
        if self._rates is not None and self._rates.store.refuses_all:
            return STORE_FAILURE
        if store is not None and store.allows_all:
            if self._users_of_all is not None:
                self._users_of_all.resume(_key_of(user))
        elif self._users_of_all is not None:
            if self._users_of_all.enter(_key_of(user)) is not None:
                return "user_connections"
        elif most is not None and self._users[user] >= most:
            return "user_connections"
        self._users[user] += 1
        if store is not None and most is not None:
            try:
                answer = store.ask_and_wait(self._demands_of_user(user))
            except BaseException:
                self._leave_user_here(user)
                raise
            if answer:
                self._leave_user_here(user)
                return answer
        return ""

    def resume_user(self, user: str) -> None:
        """Register a connection of this user that moves here from another worker."""
        if self._users_of_all is not None:
            self._users_of_all.resume(_key_of(user))
        self._users[user] += 1
        if self.store is not None:
            self.store.count(self._demands_of_user(user))

    def _demands_of_user(self, user: str) -> list[Demand]:
        return limits_of(_name_of(user), self.limits.user_connections, None, 1, ("user_connections", ""))

    def leave_user(self, user: str) -> None:
        """Unregister a connection of this user."""
        self._leave_user_here(user)
        if self.store is not None:
            self.store.leave(self._demands_of_user(user))
        bucket = self._buckets.get(user)
        if bucket is not None:
            self._keep(user, bucket)

    def _leave_user_here(self, user: str) -> None:
        if self._users_of_all is not None:
            self._users_of_all.leave(_key_of(user))
        self._users[user] -= 1
        if not self._users[user]:
            del self._users[user]

    def make_bucket(self, empty: bool = False) -> TokenBucket | None:
        """Return the bucket that limits the rate of one connection, whatever its users; None: there is no limit.

        Args:
            empty: of a connection from another worker, which has had its burst.
        """
        return None if self.limits.rate is None else TokenBucket(self.limits.rate, empty)

    def pace(self, user: str | None, own: TokenBucket | None) -> Callable[[int], float] | None:
        """Return the function that rate-limits a connection, None if there is no limit.

        It is called with the bytes that were moved, and returns the seconds to rest; first with 0, since its user may
        have moved too many on the previous connection.

        Args:
            own: the connection's, from `make_bucket`.
        """
        buckets: list[Bucket] = [] if own is None else [own]
        if self.limits.user_rate is not None and user is not None:
            bucket = self._buckets.get(user)
            if bucket is None:
                bucket = self._buckets[user] = self._bucket_of(user, self.limits.user_rate)
            self._keep(user, bucket)
            buckets.append(bucket)
        if not buckets:
            return None
        return lambda size: max(bucket.spend(size) for bucket in buckets)

    def _bucket_of(self, user: str, rate: float) -> Bucket:
        here = TokenBucket(rate) if self._column is None else SharedBucket(self._column, _key_of(user), rate)
        return here if self._rates is None else StoredBucket(here, rate, self._rates, _name_of(user))

    def _keep(self, user: str, bucket: Bucket) -> None:
        self._kept[user] = bucket
        self._kept.move_to_end(user)
        # Full buckets, which are as good as new, are usually the oldest.
        if len(self._kept) > MOST_USERS:
            self._kept.popitem(last=False)


def rest(pace: Callable[[int], float] | None, size: int) -> None:
    """Wait until the next piece may be moved, after one of this size."""
    if pace is not None and (seconds := pace(size)) > 0:
        gevent.sleep(seconds)
