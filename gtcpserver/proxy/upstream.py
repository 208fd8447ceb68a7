"""Upstreams: other proxies through which destinations are reached, possibly chained. `upstream_rules` choose them."""

from __future__ import annotations

import base64
import errno
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gtcpserver.connection.client_tls import start_client_tls
from gtcpserver.connection.connection import Connection
from gtcpserver.connection.proxy_header import ProxyVersion, header_of
from gtcpserver.errors import CAPACITY_ERRNOS, EarlyEOF, LimitExceeded, StartTLSError
from gtcpserver.http1.head import Header
from gtcpserver.proxy_protocol.header import ProxyHeader, Transport

from .errors import LimitReached, UpstreamError, UpstreamUnreachable
from .http_fields import via_of_hops
from .target import Target
from .upstream_ask import ask_http, ask_socks4, ask_socks5, greet_socks5

Scheme = Literal["socks5", "socks4", "socks4a", "http", "https"]
Resolve = Literal["here", "there"]

#: A connection that has come through this many proxies of ours is in a loop. It is counted only where many connections
#: to one destination are under way, and behind that (`Visitor.hops`), since SOCKS has no field for it.
MOST_HOPS = 16

#: Connections to one destination through one upstream from which on hops are counted.
SUSPICIOUS = 8


@dataclass(frozen=True)
class UnixPath:
    """The path of a Unix socket; an abstract name begins with "@" (unix(7)).

    Example::

        from gtcpserver.proxy.upstream_url import parse_upstream

        print(parse_upstream("local", "socks5://unix:/run/proxy").target.path)  # /run/proxy
    """

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


#: Where an upstream is.
Place = Target | UnixPath

#: Connects to a place directly.
Dial = Callable[[Place], Connection]


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Another proxy.

    Attributes:
        name: for rules and the log.
        scheme: its protocol: "socks5" (RFC 1928, 1929), "socks4", "socks4a", "http" (CONNECT; RFC 9110 section 9.3.6),
            or "https" (the same over TLS).
        target: its address.
        user, password: our credentials there; b"": none needed. SOCKS4 has a user ID and no password.
        through: the upstream through which to reach it; None: directly.
        resolve: who looks names up. "here": we do, and check every address against the rules, as for direct
            connections. "there": it does, so that only rules about names apply; for networks without DNS of their own,
            and for those (Tor) that must not reveal what they look up.
        send_proxy: begin the connection to it with a PROXY header, "v1" or "v2", for the client; None: do not.
        tls: an ssl.SSLContext for "https".
        tls_name: the name that its certificate must have.

    Example::

        from gtcpserver.proxy.upstream_url import parse_upstream

        office = parse_upstream("office", "http://proxy.example.com:3128")
        tor = parse_upstream("tor", "socks5://127.0.0.1:9050", through=office, resolve="there")
        print(tor.scheme, tor.target, tor.through.name)  # socks5 127.0.0.1:9050 office
    """

    name: str
    scheme: Scheme
    target: Place
    user: bytes = b""
    password: bytes = field(default=b"", repr=False)
    through: Upstream | None = None
    resolve: Resolve = "here"
    send_proxy: ProxyVersion | None = None
    tls: Any = field(default=None, repr=False, compare=False)
    tls_name: str = ""

    @property
    def first(self) -> Upstream:
        """Return the upstream of the chain to connect to."""
        return self if self.through is None else self.through.first

    @property
    def forwards(self) -> bool:
        """Whether it takes HTTP requests to forward."""
        return self.scheme in ("http", "https")

    @property
    def is_ipv4_only(self) -> bool:
        """Whether it can be asked for IPv4 addresses alone."""
        return self.scheme in ("socks4", "socks4a")

    def connect(self, target: Target, dial: Dial, client: Connection | None, hops: int = 0) -> Connection:
        """Return a connection to a target through this proxy, and those before it.

        Args:
            client: the client of the connection; None: it is our own.
            hops: number of proxies on the way so far, to tell this proxy; 0: they are not counted.

        Raises:
            UpstreamError: the proxy refuses, or the connection breaks.
            UpstreamUnreachable: it, or one before it, cannot be reached.
            TimeoutError: raised by the caller's timeout.
        """
        connection = self.reach(dial, client, hops)
        self._talk(connection, lambda: self._ask(connection, target, hops))
        return connection

    def greet(self, dial: Dial) -> Connection:
        """Return a connection to this proxy that has accepted our name and password, where its protocol asks for them
        before the request (SOCKS5). For health checks. Raise as `connect`."""
        connection = self.reach(dial, None)
        if self.scheme == "socks5":
            self._talk(connection, lambda: greet_socks5(connection, self.user, self.password))
        return connection

    def reach(self, dial: Dial, client: Connection | None, hops: int = 0) -> Connection:
        """Return a connection to this proxy itself, with TLS for "https". Raise UpstreamUnreachable."""
        try:
            if self.through is None:
                connection = dial(self.target)
            else:
                assert isinstance(self.target, Target)  # upstream_url
                connection = self.through.connect(self.target, dial, client, hops)
        except OSError as error:
            raise self._unreachable(error) from None
        try:
            # What fails here, the time included, has nothing to do with the destination.
            if self.send_proxy is not None:
                connection.sendall(_header_for(client, self.send_proxy))
            if self.tls is not None:
                start_client_tls(connection, self.tls, self.tls_name)
        except (OSError, StartTLSError) as error:
            connection.close()
            raise self._unreachable(error) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _unreachable(self, error: OSError | StartTLSError) -> Exception:
        if isinstance(error, LimitReached) or getattr(error, "errno", None) in CAPACITY_ERRNOS:
            return error  # not the proxy's fault
        # Without its number: a refusal by the proxy, or one before it, says nothing about the destination.
        return UpstreamUnreachable(errno.EIO, f"upstream {self.name} cannot be reached: {_said_by(error)}")

    def _talk(self, connection: Connection, say: Callable[[], None]) -> None:
        """Talk to the proxy; close the connection if that fails. Raise UpstreamError."""
        try:
            say()
        except UpstreamError as error:
            connection.close()
            raise UpstreamError(error.errno, f"upstream {self.name} {error.strerror}") from None
        except (EarlyEOF, LimitExceeded, ConnectionError, ssl.SSLError) as error:
            connection.close()
            raise UpstreamError(errno.EIO, f"upstream {self.name}: {_said_by(error)}") from None
        except BaseException:
            connection.close()
            raise

    def _ask(self, connection: Connection, target: Target, hops: int = 0) -> None:
        if self.forwards:
            ask_http(connection, target, [*self.credentials, via_of_hops(hops)] if hops else self.credentials)
        elif self.scheme == "socks5":
            greet_socks5(connection, self.user, self.password, hops)
            ask_socks5(connection, target)
        else:
            ask_socks4(connection, target, self.user, hops)

    @property
    def credentials(self) -> list[Header]:
        """Return the header fields with our credentials."""
        if not self.user:
            return []
        return [(b"Proxy-Authorization", b"Basic " + base64.b64encode(self.user + b":" + self.password))]


def _said_by(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error)


def _header_for(client: Connection | None, version: ProxyVersion) -> bytes:
    if client is None:  # a health check
        return ProxyHeader(transport=Transport.UNSPECIFIED, version=1 if version == "v1" else 2).to_bytes()
    header = header_of(client, version)
    original = getattr(client.context, "original", None)
    if original is not None and header.destination is not None:  # a transparent listener's client (`Identity`)
        header = replace(header, destination=original)
    return header.to_bytes()
