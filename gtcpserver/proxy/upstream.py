"""Upstreams: other proxies through which destinations are reached, possibly chained, chosen by rules.

    through UPSTREAM from CLIENT [user USER] [via LISTENER|AUTH] to DESTINATION
    through UPSTREAM DESTINATION                                short for: from any to DESTINATION

UPSTREAM is the name of an upstream, or "direct"; the other words are those of destination rules (`rules`). The first
rule that matches decides; after the last one the connection is direct. They choose the way; whether a client may go
there at all is decided by the destination rules, before.
"""

from __future__ import annotations

import base64
import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import unquote_to_bytes

from gtcpserver.connection.connection import Connection
from gtcpserver.connection.proxy_header import ProxyVersion, header_of
from gtcpserver.errors import CAPACITY_ERRNOS, ConfigError, EarlyEOF, LimitExceeded

from . import socks5
from .errors import TTL_EXPIRED, BadTarget, LimitReached
from .http_fields import via_of_hops
from .resolve import Found
from .rules import DestinationRule, RuleMatch, parse_way
from .target import THIS_HOST, IPAddress, Target, parse_authority

Scheme = Literal["socks5", "http"]
Resolve = Literal["here", "there"]

_SCHEMES: dict[str, Scheme] = {scheme: scheme for scheme in get_args(Scheme)}

DIRECT = "direct"

#: A connection that has come through this many proxies of ours is in a loop. It is counted only where many connections
#: to one destination are under way, and behind that (`Visitor.hops`), since SOCKS has no field for it.
MOST_HOPS = 16

#: Connections to one destination through one upstream from which on hops are counted.
SUSPICIOUS = 8

#: PROXY headers that may precede a tunnel.
LONGEST_HEAD = 16 * 1024


class UpstreamError(OSError):
    """The other proxy did not connect; `errno` says why, as if it were our own connection."""


class UpstreamUnreachable(UpstreamError):
    """The other proxy itself cannot be reached: trying another address of the destination is of no use."""


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Another proxy.

    Attributes:
        name: for rules and the log.
        scheme: its protocol: "socks5" (RFC 1928, 1929) or "http" (CONNECT; RFC 9110 section 9.3.6).
        target: its address.
        user, password: our credentials there; b"": none needed.
        through: the upstream through which to reach it; None: directly.
        resolve: who looks names up. "here": we do, and check every address against the rules, as for direct
            connections. "there": it does, so that only rules about names apply; for networks without DNS of their own,
            and for those (Tor) that must not reveal what they look up.
        send_proxy: begin the connection to it with a PROXY header, "v1" or "v2", for the client; None: do not.
    """

    name: str
    scheme: Scheme
    target: Target
    user: bytes = b""
    password: bytes = field(default=b"", repr=False)
    through: Upstream | None = None
    resolve: Resolve = "here"
    send_proxy: ProxyVersion | None = None

    @property
    def first(self) -> Upstream:
        """Return the upstream of the chain to connect to."""
        return self if self.through is None else self.through.first

    def connect(
        self, target: Target, dial: Callable[[Target], Connection], client: Connection, hops: int = 0
    ) -> Connection:
        """Return a connection to a target through this proxy, and those before it.

        Args:
            dial: connects directly.
            client: the client of the connection.
            hops: number of proxies on the way so far, to tell this proxy; 0: they are not counted.

        Raises:
            UpstreamError: the proxy refuses, or the connection breaks.
            UpstreamUnreachable: it, or one before it, cannot be reached.
            TimeoutError: raised by the caller's timeout.
        """
        connection = self.reach(dial, client, hops)
        try:
            self._ask(connection, target, hops)
        except (EarlyEOF, LimitExceeded, ConnectionError) as error:
            connection.close()
            why = getattr(error, "strerror", None) or error
            raise UpstreamError(errno.EIO, f"upstream {self.name}: {why}") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def reach(self, dial: Callable[[Target], Connection], client: Connection, hops: int = 0) -> Connection:
        """Return a connection to this proxy itself. Raise UpstreamUnreachable."""
        try:
            if self.through is None:
                connection = dial(self.target)
            else:
                connection = self.through.connect(self.target, dial, client, hops)
        except OSError as error:
            if isinstance(error, LimitReached) or error.errno in CAPACITY_ERRNOS:
                raise  # not the proxy's fault
            # Without its number: a refusal by the proxy, or one before it, says nothing about the destination.
            why = error.strerror or str(error)
            raise UpstreamUnreachable(errno.EIO, f"upstream {self.name} cannot be reached: {why}") from None
        if self.send_proxy is not None:
            try:
                connection.sendall(header_of(client, self.send_proxy).to_bytes())
            except BaseException:
                connection.close()
                raise
        return connection

    def _ask(self, connection: Connection, target: Target, hops: int = 0) -> None:
        if self.scheme == "http":
            self._ask_http(connection, target, hops)
        else:
            self._ask_socks5(connection, target, hops)

    # -- SOCKS5 ------------------------------------------------------------------------------------------------------

    def _ask_socks5(self, connection: Connection, target: Target, hops: int) -> None:
        methods = (socks5.Method.NONE, socks5.Method.PASSWORD) if self.user else (socks5.Method.NONE,)
        connection.sendall(socks5.greeting([*methods, socks5.method_of_hops(hops)] if hops else methods))
        version, method = connection.recv_exactly(2)
        if version != socks5.VERSION:
            raise UpstreamError(errno.EIO, f"upstream {self.name} does not speak SOCKS5")
        if method == socks5.Method.PASSWORD and self.user:
            connection.sendall(socks5.password(self.user, self.password))
            if connection.recv_exactly(2)[1]:
                raise UpstreamError(errno.EIO, f"upstream {self.name} does not accept our name and password")
        elif method != socks5.Method.NONE:
            raise UpstreamError(errno.EIO, f"upstream {self.name} wants another way to say who we are")
        connection.sendall(socks5.connect_request(target))
        version, code, _, kind = connection.recv_exactly(4)
        if version != socks5.VERSION:
            raise UpstreamError(errno.EIO, f"upstream {self.name} does not speak SOCKS5")
        if code:
            number = _ERRNO_OF_REPLY.get(code, errno.EIO)
            raise UpstreamError(number, f"upstream {self.name} says: {_name_of(code)}")
        size = {1: 4, 4: 16}.get(kind)
        connection.recv_exactly((connection.recv_exactly(1)[0] if size is None else size) + 2)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _ask_http(self, connection: Connection, target: Target, hops: int) -> None:
        authority = str(target).encode()
        headers = [*self.credentials, via_of_hops(hops)] if hops else self.credentials
        fields = b"".join(b"%b: %b\r\n" % header for header in headers)
        connection.sendall(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (authority, authority, fields))
        # Interim answers may come first.
        room = LONGEST_HEAD
        while True:
            head = connection.recv_until(b"\r\n\r\n", room)
            room -= len(head)
            status = _status_of(head)
            if status is None:
                raise UpstreamError(errno.EIO, f"upstream {self.name} does not speak HTTP")
            if 200 <= status < 300:
                return
            if status >= 200:
                break
        raise UpstreamError(_ERRNO_OF_STATUS.get(status, errno.EIO), f"upstream {self.name} answers {status}")

    @property
    def credentials(self) -> list[tuple[bytes, bytes]]:
        """Return the header fields with our credentials."""
        if not self.user:
            return []
        return [(b"Proxy-Authorization", b"Basic " + base64.b64encode(self.user + b":" + self.password))]


_ERRNO_OF_REPLY: dict[int, int] = {
    socks5.Reply.NOT_ALLOWED: errno.EACCES,
    socks5.Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    socks5.Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    socks5.Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
    socks5.Reply.TTL_EXPIRED: TTL_EXPIRED,
}

_ERRNO_OF_STATUS = {403: errno.EACCES, 502: errno.EHOSTUNREACH, 503: errno.EHOSTUNREACH, 504: errno.ETIMEDOUT}


def _name_of(code: int) -> str:
    try:
        return socks5.Reply(code).name.lower().replace("_", " ")
    except ValueError:
        return f"reply {code}"


def _status_of(head: bytes) -> int | None:
    # As lenient as about the answers of origins (http_origin).
    found = re.match(rb"(?i)HTTP/(?:1\.[0-9]|[2-9](?:\.[0-9])?) ([1-5][0-9][0-9])[ \r]", head)
    return None if found is None else int(found[1])


# -- configuration -----------------------------------------------------------------------------------------------------


def parse_upstream(
    name: str,
    url: str,
    through: Upstream | None = None,
    resolve: Resolve = "here",
    send_proxy: ProxyVersion | None = None,
) -> Upstream:
    """Parse "socks5://user:password@host:port" or "http://host:port"; user and password may be percent-encoded.

    Raises:
        ConfigError: it is malformed.
    """
    expected = f"the url of upstream {name!r} must be socks5://[user:password@]host:port or http://..."
    # Not with urlsplit: it ends a password at its first "/", "?" or "#", and the rest would be in the message.
    # Everything before the last "@" is user and password.
    given, _, rest = url.partition("://")
    userinfo, _, where = rest.rpartition("@")
    scheme = _SCHEMES.get(given.lower())
    if scheme is None:
        raise ConfigError(f"{expected}, got {_without_password(url)!r}")
    try:
        target = parse_authority(where.removesuffix("/"))
    except BadTarget as error:
        raise ConfigError(f"{expected}, got {_without_password(url)!r} ({error})") from None
    try:
        user, _, password = map(unquote_to_bytes, userinfo.partition(":"))
    except UnicodeEncodeError:  # from the command line, in another encoding
        raise ConfigError(f"{expected}: user and password must be UTF-8, or percent-encoded") from None
    if bool(user) != bool(password):
        raise ConfigError(f"{expected}: a user and a password, or none of them")
    if scheme == "http" and b":" in user:
        # The other proxy would take what follows for the password (RFC 7617 section 2).
        raise ConfigError(f"{expected}: HTTP has no users with a colon")
    if scheme == "socks5" and not max(len(user), len(password)) <= 255:
        raise ConfigError(f"{expected}: SOCKS5 has users and passwords of 255 bytes at most")
    return Upstream(
        name=name,
        scheme=scheme,
        target=target,
        user=user,
        password=password,
        through=through,
        resolve=resolve,
        send_proxy=send_proxy,
    )


def _without_password(url: str) -> str:
    before, at, where = url.rpartition("@")
    if not at:
        return url
    scheme = before.partition("://")[0]
    return f"{scheme}://...@{where}" if scheme.isalnum() else f"...@{where}"


@dataclass(frozen=True, slots=True)
class UpstreamRule:
    """Which upstream to use; `match` is the same as in destination rules."""

    text: str
    upstream: str
    match: DestinationRule


def parse_upstream_rule(text: str) -> UpstreamRule:
    """Parse a rule. Raise RuleError."""
    upstream, match = parse_way(text)
    return UpstreamRule(text, upstream, match)


def choose_upstream(
    rules: Sequence[UpstreamRule],
    asked: RuleMatch,
    name: str | None,
    addresses: Callable[[], Sequence[IPAddress]],
    is_own: Callable[[IPAddress], bool] = lambda ip: False,
    candidates: Sequence[str] = (),
) -> str:
    """Return the name of the upstream for a destination, or "direct".

    Args:
        asked: who asks, and for which port.
        name: the requested host name, without its final dot; None for an address.
        addresses: returns the addresses of the name; called when a rule about networks, or about one of the
            `candidates`, is reached.
        is_own: returns whether an address is this host's; called when a rule about this host is reached.
        candidates: absolute names that the requested one may mean, by the search list.
    """
    for rule in rules:
        if not asked.fits(rule.match):
            continue
        what = rule.match.destinations
        if what.is_any or (name is not None and what.has_name(name)):
            return rule.upstream
        if any(map(what.has_name, candidates)):  # which of them is meant is known after the lookup
            found = addresses()
            if isinstance(found, Found) and what.has_name(found.name):
                return rule.upstream
        if what.network is None and what.kind is None:
            continue
        if any(what.has_address(ip, what.kind == THIS_HOST and is_own(ip)) for ip in addresses()):
            return rule.upstream
    return DIRECT
