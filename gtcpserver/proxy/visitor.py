"""Visitor: one client of a gate, from its admission to its connections to destinations."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic

import gevent
from gevent.hub import get_hub

from gtcpserver.admission.proxy_header import network_address
from gtcpserver.connection.connection import Connection

from .dial import dial, dial_unix
from .errors import TTL_EXPIRED, Cut, Denied, LimitReached, QuotaUsedUp, UpstreamError, UpstreamUnreachable
from .gate import Gate, not_connected
from .permission import Permission
from .record import AccessRecord, Result
from .resolve import Found, ResolveTimeout
from .source import is_better_source
from .succession import end_tunnel
from .target import IPAddress, Target
from .upstream import MOST_HOPS, SUSPICIOUS, Dial, Place, UnixPath, Upstream
from .upstream_group import UpstreamGroup

#: Seconds of rest, in which the end of a transfer comes whose quota is used up.
LAST_REST = 0.01


def admit(gate: Gate, conn: Connection) -> Visitor:
    """Register a client that has connected; `Visitor.leave` must be called at its end."""
    address = network_address(conn)
    client, text, decision = gate.decide_client(address)
    visitor = Visitor(gate, client, AccessRecord(text, gate.listener), decision.auth, conn, address)
    if not decision.allowed:
        visitor.turn_away("client_denied", decision.rule)
    else:
        exceeded = gate.limits.enter(address)
        if exceeded:
            visitor.turn_away("limit", exceeded)
        else:
            visitor.entered = True
            gate.tenure.enter()
    return visitor


@dataclass(slots=True, eq=False)
class Visitor(Permission):
    """One client of a gate: `open` connects it to a destination, directly or through upstreams."""

    def open(self, target: Target) -> Connection:
        """Connect to a target, at the addresses that were checked.

        Raises:
            Denied: a rule does not allow it.
            LimitReached: its user has too many connections, or too many connection attempts in progress.
            OSError: it cannot be reached.
        """
        return self._open(target, for_request=False)[0]

    def open_for_request(self, target: Target) -> tuple[Connection, Upstream | None]:
        """Connect to where an HTTP request for a target is sent: the target, or an HTTP proxy that forwards it.

        Raises: as `open`.
        """
        return self._open(target, for_request=True)

    def _open(self, target: Target, for_request: bool) -> tuple[Connection, Upstream | None]:
        record = self.record
        record.asked = str(target)
        forwarding: Upstream | None = None
        self.found = ()
        try:
            self.check_limits()
            upstream, found = self.upstream_to(target)
            if upstream is None:
                connection, ip = self._dial(self.allowed_addresses(target, found), target.port, for_request)
                record.connected = record.asked if ip is target.ip else str(Target(str(ip), target.port, ip))
                self.opened = target, ip, self.found
            elif isinstance(upstream, UpstreamGroup):
                connection, forwarding = self._go_through_group(upstream, target, found, for_request)
            else:
                seconds = self.gate.timeouts.connect
                connection, forwarding = self._go_through_one(upstream, target, found, for_request, seconds)
        except Denied as error:
            record.result, record.detail = "destination_denied", str(error)
            raise
        except OSError as error:
            record.result, record.detail = result_of(error), error.strerror or str(error)
            self._forget(self.found)
            raise
        record.note_opened()
        return connection, forwarding

    def _forget(self, found: Sequence[IPAddress]) -> None:
        """Have a name that could not be connected to looked up again: its address may be an old one."""
        if isinstance(found, Found):
            self.gate.resolver.forget(found)

    def _dial(self, addresses: Sequence[IPAddress], port: int, for_request: bool) -> tuple[Connection, IPAddress]:
        return dial(
            self.in_reach(addresses),
            port,
            timeout=self.gate.timeouts.connect,
            source=self.source_to,
            fast_open=self.gate.fast_open and for_request,
            attempts=self.gate.limits.attempts_of(self.address),
        )

    def _go_through_group(
        self, group: UpstreamGroup, target: Target, found: Sequence[IPAddress] | None, for_request: bool
    ) -> tuple[Connection, Upstream | None]:
        until = monotonic() + self.gate.timeouts.connect
        group.begin_checks(self.gate.check_upstream)
        members = group.in_order(self.client)
        for left in range(len(members), 0, -1):
            member = members[-left]
            # Each has its share of the remaining time, so that a silent one leaves time for the others.
            share = max(0.0, until - monotonic()) / left
            try:
                opened = self._go_through_one(member.upstream, target, found, for_request, share)
            except UpstreamUnreachable as error:
                group.note_unreachable(member, error)
                if left == 1:
                    raise
            else:
                group.note_reached(member)
                member.add(opened[0])
                return opened
        raise AssertionError("a member is left")  # pragma: no cover

    def _go_through_one(
        self,
        upstream: Upstream,
        target: Target,
        found: Sequence[IPAddress] | None,
        for_request: bool,
        seconds: float,
    ) -> tuple[Connection, Upstream | None]:
        self.record.upstream = upstream.name
        # It may look the name up again, and find another address than the one that was checked.
        finds_the_same = upstream.resolve == "there" or target.ip is not None
        forwarding = upstream if for_request and upstream.forwards and finds_the_same else None
        return self._go_through(upstream, target, found, forwarding is not None, seconds), forwarding

    def _go_through(
        self, upstream: Upstream, target: Target, found: Sequence[IPAddress] | None, only_to_it: bool, seconds: float
    ) -> Connection:
        if upstream.resolve == "there" and target.ip is None:
            decision = self.decide(target, None)
            if not decision.allowed:
                raise Denied(decision.rule)
            targets = [target]
            self.opened = target, None, ()
        else:
            allowed = self.allowed_addresses(target, found)
            if upstream.is_ipv4_only:
                allowed = [ip for ip in allowed if ip.version == 4]
                if not allowed:
                    raise OSError(errno.ENETUNREACH, f"no IPv4 address, for {upstream.scheme}")
            targets = [Target(str(ip), target.port, ip) for ip in allowed]
            self.opened = target, targets[0].ip, self.found

        def dial_first(proxy: Place) -> Connection:
            if isinstance(proxy, UnixPath):
                return dial_unix(proxy.path)
            addresses = self.addresses_of(proxy, by_rules=False)
            try:
                return self._dial(addresses, proxy.port, False)[0]
            except OSError:
                self._forget(addresses)
                raise

        if only_to_it:
            with gevent.Timeout(seconds, not_connected(seconds)):
                return upstream.reach(dial_first, self.conn)
        with self._counted_hops(upstream, target) as hops:
            return self._connect_through(upstream, target, targets, dial_first, hops, seconds)

    @contextmanager
    def _counted_hops(self, upstream: Upstream, target: Target) -> Iterator[int]:
        """Count a connection to a target through an upstream; yield the hops to tell it, 0 for none.

        Raises:
            OSError: ELOOP: it has come through too many proxies.
        """
        under_way, key = self.gate.under_way, (upstream.name, target)
        hops = self.hops + 1 if self.hops or under_way[key] >= SUSPICIOUS else 0
        if hops >= MOST_HOPS:
            raise OSError(errno.ELOOP, f"a loop: it came through {self.hops} proxies")
        under_way[key] += 1
        try:
            yield hops
        finally:
            under_way[key] -= 1
            if not under_way[key]:
                del under_way[key]

    def _connect_through(
        self,
        upstream: Upstream,
        target: Target,
        targets: Sequence[Target],
        dial_first: Dial,
        hops: int,
        seconds: float,
    ) -> Connection:
        until = monotonic() + seconds
        for left in range(len(targets), 0, -1):
            one = targets[-left]
            # Each has its share of the remaining time, so that a silent one leaves time for the others.
            share = max(0.0, until - monotonic()) / left
            try:
                with gevent.Timeout(share, not_connected(seconds)):
                    connection = upstream.connect(one, dial_first, self.conn, hops)
            except (UpstreamError, TimeoutError) as error:
                if left == 1 or isinstance(error, UpstreamUnreachable):
                    raise
            else:
                self.record.connected = str(one)
                self.opened = target, one.ip, self.found
                return connection
        raise AssertionError("a target is left")  # pragma: no cover

    # -- bytes of its user -------------------------------------------------------------------------------------------

    @property
    def has_quota(self) -> bool:
        """Return whether its bytes are counted."""
        return self.gate.quota is not None and self.record.user is not None

    def charge(self, size: int) -> bool:
        """Count bytes that it has moved; if its user's quota is used up, end what it does and return True."""
        quota, user = self.gate.quota, self.record.user
        if quota is None or user is None or not quota.charge(user, size):
            return False
        get_hub().loop.run_callback(self._end, Cut("quota", quota.used_up(user).why))
        return True

    def _end(self, why: Cut) -> None:
        # In the hub. A request waits in its presence, a tunnel or UDP association for its end.
        if self._presence is None or not self._presence.dismiss(why):
            end_tunnel(self, why)

    @property
    def toll(self) -> Callable[[int], float] | None:
        """Return the function that counts and rate-limits its transfers; None: nothing does."""
        pace = self.pace
        if not self.has_quota:
            return pace

        def pay(size: int) -> float:
            seconds = 0.0 if pace is None else pace(size)
            return max(seconds, LAST_REST) if size and self.charge(size) else seconds

        return pay

    # -- source addresses --------------------------------------------------------------------------------------------

    def in_reach(self, addresses: Sequence[IPAddress]) -> Sequence[IPAddress]:
        """Return the addresses that can be reached from those in `external`. Raise OSError if there are none."""
        external = self.gate.external
        if isinstance(external, str):
            return addresses
        versions = {own.version for own in external}
        reached = [ip for ip in addresses if ip.version in versions]
        if not reached:
            raise OSError(errno.ENETUNREACH, "no address of the families in external")
        return reached

    def source_to(self, ip: IPAddress) -> IPAddress | None:
        """Return the source address for a destination; None: the system's choice."""
        external = self.gate.external
        if not isinstance(external, str):
            return self.gate.fixed_source(ip)
        if external == "system" or (found := self.own) is None:
            return None
        own = found[0]
        if own.version != ip.version or own.is_unspecified:
            return None
        return own if external == "same" or own.is_global or is_better_source(own, ip) else None


def result_of(error: OSError) -> Result:
    """Return what the record calls a failure to connect."""
    if isinstance(error, LimitReached):
        return "quota" if isinstance(error, QuotaUsedUp) else "limit"
    if isinstance(error, socket.gaierror):
        return "unresolved"
    if isinstance(error, ResolveTimeout):
        return "resolve_timeout"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "connect_timeout"
    if error.errno == errno.ECONNREFUSED:
        return "refused"
    if isinstance(error, UpstreamError) and error.errno in (errno.EACCES, errno.EIO):
        return "upstream_failed"
    if error.errno == errno.ELOOP:
        return "loop"
    if error.errno == errno.EADDRNOTAVAIL:
        return "no_port"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, TTL_EXPIRED):
        return "unreachable"
    return "failed"
