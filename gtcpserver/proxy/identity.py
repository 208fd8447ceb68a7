"""Identity: who a client of a gate is, and what counts it. The first layer of `Visitor`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.networks import as_ip
from gtcpserver.tls import ConnectionTLS

from .buckets import TokenBucket
from .departures import Presence
from .errors import LimitReached
from .gate import Gate
from .limits import LimitKeeper
from .record import AccessRecord, Result
from .rules import Command
from .succession import Tenure
from .target import IPAddress


@dataclass(slots=True, eq=False)
class Identity:
    """A client of a gate: its connection, its user, and what counts it.

    Attributes:
        auth: the authenticator that must confirm it; None: no authentication.
        conn: its connection.
        address: its address as returned by ``accept``.
        admitted: it may use this listener.
        certified: the user named by its certificate; None: none.
        entered: the limits count it.
        entered_users: the users that it is counted as.
        limits: the limits that count it, those of the gate that has admitted it.
        hops: proxies of ours before this one, as far as they were counted (`upstream.MOST_HOPS`).
        original: where the client of a transparent listener has connected to; None: any other client.
        announce: called with the record of a tunnel that begins; None: it is not logged before its end.
    """

    gate: Gate
    client: IPAddress
    record: AccessRecord
    auth: str | None
    conn: Connection
    address: Any
    admitted: bool = True
    certified: str | None = None
    entered: bool = False
    entered_users: set[str] = field(default_factory=set)
    hops: int = 0
    original: tuple[IPAddress, int] | None = None
    announce: Callable[[AccessRecord], object] | None = None
    limits: LimitKeeper = field(init=False)
    _presence: Presence | None = None
    _bucket: TokenBucket | None = None
    _pace: tuple[str | None, Callable[[int], float] | None] | None = None

    def __post_init__(self) -> None:
        self.limits = self.gate.limits

    @property
    def own(self) -> tuple[IPAddress, int] | None:
        """Return the address and port of the proxy that it connected to. A system call.

        None for a Unix socket, and for a transparent listener, whose clients have connected to somebody else.
        """
        if self.original is not None:
            return None
        here: Any = self.conn.server_address
        return (as_ip(here[0]), here[1]) if isinstance(here, tuple) else None

    def connection_fields(self) -> dict[str, str | None]:
        """Return what `gtcpserver ctl connections` shows of it."""
        record = self.record
        return {
            "user": record.user,
            "listener": record.listener,
            "destination": record.asked or None,
            "upstream": record.upstream or None,
        }

    def turn_away(self, result: Result, why: str) -> None:
        """Deny it the use of this listener; it will be told so in its own protocol."""
        self.admitted = False
        self.record.result, self.record.detail = result, why

    def leave(self) -> None:
        """Unregister it when its connection has ended."""
        while self.entered_users:
            self.limits.leave_user(self.entered_users.pop())
        if self.entered:
            self.entered = False
            self.limits.leave(self.address)
            self.gate.tenure.leave()

    @property
    def tenure(self) -> Tenure:
        """Return the time in which its configuration is used."""
        return self.gate.tenure

    def _be_judged_again(self) -> None:
        was_certified, self.certified = self.certified, None
        decision = self.gate.decide_client(self.address)[2]
        self.auth = decision.auth
        if not decision.allowed:
            self.turn_away("client_denied", decision.rule)
            return
        if was_certified is not None:
            self.record.user = None
        self.show_certificate(self.conn.tls)

    def may_use(self, command: Command) -> bool:
        """Return whether its listener allows a command; if not, note that in the record."""
        if command in self.gate.commands:
            return True
        self.record.result, self.record.detail = "command_denied", f"{command} is not among the commands"
        return False

    @property
    def presence(self) -> Presence:
        """Return the block in which its departure raises ClientGone: for waits in which nothing is read from it."""
        if self._presence is None:
            self._presence = Presence(self.gate.departures, self.conn)
        return self._presence

    def new_record(self) -> AccessRecord:
        """Return a record for the next request of the same client."""
        self.record = AccessRecord(self.record.client, self.record.listener, user=self.certified)
        return self.record

    # -- who it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_password(self) -> bool:
        """Return whether it must authenticate."""
        return self.auth is not None and self.certified is None

    def show_certificate(self, tls: ConnectionTLS | None) -> None:
        """Identify it by its certificate, if certificates are used here."""
        identify = getattr(self.gate.authenticators.get(self.auth or ""), "identify", None)
        if identify is None or not self.admitted:
            return
        user = identify(tls.peer_certificate or {}) if tls is not None else None
        if user is None:
            self.turn_away("authentication_failed", "no certificate of a user")
            return
        self.certified = user
        self._note_user(user)

    def authenticate(self, user: bytes, password: bytes) -> bool:
        """Return whether the user name and password are correct; if so, note the user for the record and the rules."""
        assert self.auth is not None
        authenticator = self.gate.authenticators[self.auth]
        name = user.decode("utf-8", "backslashreplace")
        right = None
        began = monotonic()
        with self.presence, gevent.Timeout(self.gate.timeouts.authenticate, False):
            right = authenticator.check(user, password, self.client)
        self.record.authenticated = monotonic() - began
        if not right:
            self.record.result = "authentication_failed" if right is False else "authentication_timeout"
            self.record.detail = f"user {name}"
            return False
        self._note_user(name)
        return True

    def _note_user(self, name: str) -> None:
        self.record.user = name
        if name not in self.entered_users and not self.limits.enter_user(name):
            self.entered_users.add(name)

    @property
    def pace(self) -> Callable[[int], float] | None:
        """Return the function that rate-limits its transfers (`limits`)."""
        user = self.record.user
        if self._pace is None or self._pace[0] != user:
            if self._bucket is None:
                self._bucket = self.gate.limits.make_bucket()
            self._pace = (user, self.gate.limits.pace(user, self._bucket))
        return self._pace[1]

    def check_quota(self) -> None:
        """Raise QuotaUsedUp if its user may move no more bytes."""
        if self.gate.quota is not None and self.record.user is not None:
            self.gate.quota.check(self.record.user)

    def check_limits(self) -> None:
        """Count it for its user. Raise LimitReached."""
        self.check_quota()
        user = self.record.user
        if user is not None and user not in self.entered_users:
            exceeded = self.limits.enter_user(user)
            if exceeded:
                raise LimitReached(errno.EUSERS, exceeded)
            self.entered_users.add(user)
