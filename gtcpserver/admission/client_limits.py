"""ClientLimits: who may connect, how many connections a client may have, and how fast it may open new ones.

An IPv6 client has a whole /64 for itself (RFC 6177), so limits count networks of 64 bits. An IPv4 client is one
address: behind a carrier's NAT that may be many people, for whom the limits must be wide.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from time import monotonic
from typing import Any, cast

from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import ConfigError
from gtcpserver.networks import IPAddress, IPNetwork, as_ip, is_in, parse_network
from gtcpserver.shared.column import Column
from gtcpserver.store.store import Demand, Store, limits_of

from .shared_clients import Refusal, SharedClients

#: Number of clients whose rate is remembered; beyond it the least recently seen is forgotten. 300 bytes each.
MOST_CLIENTS = 100_000

#: "4" and an IPv4 address, or "6" and the first 64 bits of an IPv6 one. (Python's address objects take 0.5 us for each
#: hash.)
ClientKey = bytes


class ClientLimits:
    """Limits for each client of a server, or of several servers that are given the same object.

    Clients on a unix socket are on this host, and are not limited. With workers, the limits of their server hold for
    all workers together, through reloads, upgrades and crashes; of connections that come at the same moment, each
    worker may admit one too many. With ``shared_limits`` they hold for all machines.

    Args:
        allow: networks and addresses of clients that may connect, such as "10.0.0.0/8"; empty: all.
        deny: networks and addresses that may not, even if they are in `allow`.
        connections: most connections a client may have at once; None for no limit.
        new_per_second: connections a client may open per second, on average; None for no limit.
        burst: connections a client may open at once after a pause; None: those of one second, at least 1.

    Attributes:
        refused: counter of closed connections, by reason: "client_denied", "client_connections", "client_rate",
            "store_failure".

    Raises:
        ConfigError: an invalid network or number.

    Example::

        from gtcpserver import ClientLimits, Server

        limits = ClientLimits(deny=["192.0.2.0/24"], connections=50, new_per_second=20)
        server = Server("127.0.0.1:5000", handle, client_limits=limits)
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        connections: int | None = None,
        new_per_second: float | None = None,
        burst: int | None = None,
    ) -> None:
        self._allow = _networks("allow", allow)
        self._deny = _networks("deny", deny)
        self._names_clients = bool(self._allow or self._deny)
        check_whole_number("connections", connections, least=1, none="for no limit")
        check_number("new_per_second", new_per_second, above=0, none="for no limit")
        check_whole_number("burst", burst, least=1, none="for those of one second")
        if burst is not None and new_per_second is None:
            raise ConfigError("burst must come together with new_per_second")
        self._connections = connections
        self._rate = new_per_second
        self._burst = float(burst if burst is not None else max(1.0, new_per_second or 0.0))
        self._open: dict[ClientKey, int] = {}
        self._buckets: OrderedDict[ClientKey, tuple[float, float]] = OrderedDict()
        self._shared: SharedClients | None = None
        self._name = b""
        self._store: Store | None = None
        self._store_name = ""
        #: For this package: `enter` is to be followed by `confirm`.
        self.asks_store = False
        self.refused: Counter[str] = Counter()

    @property
    def counted(self) -> int:
        """Clients whose connections are counted now.

        :meta private:
        """
        return len(self._open) if self._shared is None else len(self._shared)

    @property
    def remembered(self) -> int:
        """Clients whose rate is remembered.

        :meta private:
        """
        return len(self._buckets)

    def share(self, column: Column, name: str) -> None:
        """Count clients together with all processes that have a column. Call before the first `enter`.

        Args:
            column: the column of this process.
            name: name of these limits, the same in all processes.

        :meta private:
        """
        if self._connections is not None or self._rate is not None:
            self._shared = SharedClients(column, self._connections, self._rate, self._burst)
            self._name = name.encode() + b" "

    def share_store(self, store: Store, name: str) -> None:
        """Count clients together with other machines, too. Call before the first `enter`.

        Args:
            store: where they are counted; `enter` is then followed by `confirm`.
            name: name of these limits, the same on all machines.

        :meta private:
        """
        if self._connections is not None or self._rate is not None:
            self._store = store
            self._store_name = name
            self.asks_store = True

    def enter(self, address: Any) -> Refusal | None:
        """Count a new connection of a client, if its limits allow it.

        Args:
            address: the client's, as ``accept`` returns it.

        Returns:
            The limit that refuses the connection. None: it may stay; call `leave` when it ends.
        """
        # One function: each call costs 400 instructions.
        if not isinstance(address, tuple):
            return None
        host = address[0]
        if self._names_clients and self._denies(as_ip(host)):
            return self._refuse("client_denied")
        key = key_of_host(host)
        if self._store is not None and self._store.allows_all:
            self._count(key)
            return None
        if self._shared is not None:
            refusal = self._shared.enter(self._name + key)
            return None if refusal is None else self._refuse(refusal)
        most = self._connections
        number = self._open.get(key, 0) if most is not None else 0
        if most is not None and number >= most:
            return self._refuse("client_connections")
        if self._rate is not None and not self._take_token(key, self._rate):
            return self._refuse("client_rate")
        if most is not None:
            self._open[key] = number + 1
        return None

    def _refuse(self, refusal: Refusal) -> Refusal:
        self.refused[refusal] += 1
        return refusal

    def _count(self, key: ClientKey) -> None:
        if self._shared is not None:
            self._shared.resume(self._name + key)
        elif self._connections is not None:
            self._open[key] = self._open.get(key, 0) + 1

    # -- limits of all machines --------------------------------------------------------------------------------------

    def demands(self, address: Any) -> list[Demand]:
        """Return what to ask the store about a client; nothing: no store counts it.

        :meta private:
        """
        if self._store is None or not isinstance(address, tuple):
            return []
        name = f"{self._store_name}:{text_of(key_of_host(address[0]))}"
        return limits_of(name, self._connections, self._rate, self._burst, ("client_connections", "client_rate"))

    def confirm(self, address: Any, decided: Callable[[Refusal | None], Any]) -> tuple[bool, Refusal | None]:
        """Ask the store about a connection that `enter` has admitted. Does not wait.

        Args:
            address: the address given to `enter`.
            decided: called in the hub with the limit that refuses the connection, which is then no longer counted;
                None: it may stay.

        Returns:
            True and the answer, as for `decided`, which is then not called; False and None: it will be.

        :meta private:
        """
        demands = self.demands(address)
        if self._store is None or not demands:
            return True, None
        answer = self._store.ask(demands, lambda answer: decided(self._confirmed(address, answer)))
        return (False, None) if answer is None else (True, self._confirmed(address, answer))

    def _confirmed(self, address: Any, answer: str) -> Refusal | None:
        if not answer:
            return None
        self.undo_enter(address)
        self.refused[answer] += 1
        return cast(Refusal, answer)

    def confirm_and_wait(self, address: Any) -> Refusal | None:
        """As `confirm`, in a greenlet, which waits for the answer.

        :meta private:
        """
        demands = self.demands(address)
        if self._store is None or not demands:
            return None
        try:
            answer = self._store.ask_and_wait(demands)
        except BaseException:
            self.undo_enter(address)
            raise
        return self._confirmed(address, answer)

    # -- the end of a connection, and other ways ---------------------------------------------------------------------

    def _denies(self, ip: IPAddress) -> bool:
        return is_in(ip, self._deny) or bool(self._allow and not is_in(ip, self._allow))

    def _take_token(self, key: ClientKey, rate: float) -> bool:
        """Take a token from the client's bucket: a connection costs one, and `rate` of them come back per second."""
        now = monotonic()
        tokens, since = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * rate)
        self._buckets[key] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return tokens >= 1

    def resume(self, address: Any, returns: bool = False) -> Refusal | None:
        """Count a connection that another process has admitted: it is no new one, so its rate is not asked.

        Args:
            address: as for `enter`.
            returns: it was counted here before, and stays whatever the limits say.

        Returns:
            As `enter`.
        """
        if not isinstance(address, tuple):
            return None
        key = key_of_host(address[0])
        if not returns and self._names_clients and self._denies(as_ip(address[0])):
            return "client_denied"
        is_full = self._connections is not None and self._open.get(key, 0) >= self._connections
        if self._shared is None and is_full and not returns:
            return "client_connections"
        self._count(key)
        if self._store is not None:
            self._store.count(self.demands(address))
        return None

    def leave(self, address: Any, confirmed: bool = True) -> None:
        """Stop counting a connection that has ended.

        Args:
            address: the address given to `enter`.
            confirmed: for this package: False if the store has not admitted it.
        """
        if self._store is not None and confirmed:
            self._store.leave(self.demands(address))
        if self._connections is None or not isinstance(address, tuple):
            return
        key = key_of_host(address[0])
        if self._shared is not None:
            self._shared.leave(self._name + key)
            return
        left = self._open.pop(key, 0) - 1
        if left > 0:
            self._open[key] = left

    def undo_enter(self, address: Any) -> None:
        """Undo `enter`: the store has not confirmed the connection.

        :meta private:
        """
        self.leave(address, confirmed=False)
        self._give_back_here(address)

    def move(self, address: Any, client: Any) -> Refusal | None:
        """Count a connection as another client's: the header of a balancer named the client. May wait for the store.

        Args:
            address: the address given to `enter`.
            client: address of the client in the header.

        Returns:
            None: call `leave` with ``client`` when the connection ends. Otherwise the limit that refuses it: the
            connection is no longer counted, and must be closed.
        """
        self.leave(address)
        self._give_back_here(address)
        if self._store is not None:
            self._store.give_back(self.demands(address))
        refusal = self.enter(client)
        return self.confirm_and_wait(client) if refusal is None else refusal

    def _give_back_here(self, address: Any) -> None:
        if self._rate is None or not isinstance(address, tuple):
            return
        key = key_of_host(address[0])
        if self._shared is not None:
            self._shared.give_back(self._name + key)
        elif key in self._buckets:
            tokens, since = self._buckets[key]
            self._buckets[key] = (min(self._burst, tokens + 1), since)


def client_key(ip: IPAddress) -> ClientKey:
    """Return what counts as one client: an IPv4 address, or an IPv6 network of 64 bits."""
    return b"4" + ip.packed if isinstance(ip, IPv4Address) else b"6" + ip.packed[:8]


@lru_cache(maxsize=4096)
def key_of_host(host: str) -> ClientKey:
    """Return the client that has an address, as returned by sockets. Raise ValueError."""
    return client_key(as_ip(host))


def text_of(key: ClientKey) -> str:
    """Return a client as text: "192.0.2.1", "2001:db8:0:1::/64"."""
    packed = key[1:]
    return str(IPv4Address(packed)) if len(packed) == 4 else f"{IPv6Address(packed + bytes(8))}/64"


def _networks(name: str, texts: Sequence[str]) -> tuple[IPNetwork, ...]:
    found = []
    for text in (texts,) if isinstance(texts, str) else texts:
        try:
            found.append(parse_network(text))
        except ValueError as error:
            raise ConfigError(f"{name} must be networks or addresses, got {text!r} ({error})") from None
    return tuple(found)
