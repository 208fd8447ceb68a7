"""The access record: one connection through the proxy, as one line of a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from logging import INFO
from time import monotonic, time
from typing import Literal

from gtcpserver.server.access_log import log, utc, write_line

Result = Literal[
    "open",  # the line at the beginning of a tunnel
    "ok",  # relayed, and both sides ended normally
    "reset",  # one side was reset
    "idle",  # no data for too long
    "half_closed",  # the same, after one side had ended
    "lifetime",  # it lasted as long as it may
    "not_redirected",  # a client has connected to a transparent listener itself
    "client_denied",
    "destination_denied",
    "command_denied",
    "authentication_failed",
    "authentication_timeout",
    "proxy_header",  # a balancer sent none, or a bad one
    "acme_challenge",  # an ACME authority has asked for a proof of a name, and got it
    "tls_failed",  # the client's TLS handshake
    "client_left",  # the client gave up before it was connected or answered
    "bad_request",  # the client violated the protocol, or left during it
    "negotiation_timeout",
    "limit",  # too many connections
    "quota",  # its user has moved as many bytes as it may
    "loop",  # it has come back to this proxy, or through too many
    "upstream_failed",  # the other proxy refused the request, or its response was not understood
    "unresolved",
    "resolve_timeout",  # the name server did not answer in time
    "refused",
    "unreachable",
    "connect_timeout",
    "answer_timeout",  # an HTTP origin did not respond in time
    "no_port",  # all local ports to this destination are in use, or there is no local address of its family
    "failed",
    "stopped",
]


@dataclass(slots=True)
class AccessRecord:
    """One connection, filled in as it progresses.

    Attributes:
        client: address of the client.
        listener: name of the listener.
        protocol: "socks4", "socks4a", "socks5", "http" or "transparent"; "" until it is known.
        user: the authenticated user, if any.
        claimed: the unverified user of a SOCKS client: SOCKS4's user ID, or a user name where no password is needed.
        command: "CONNECT", "BIND", "UDP", or a method of HTTP.
        asked: destination as the client named it, in its canonical form.
        original: the address that the client of a transparent listener has connected to; `asked` then has the name that
            it claims, if any.
        connected: the address that was connected to.
        upstream: the proxy on the way, if any.
        result: how it ended.
        detail: explanation: the rule, the error.
        sent, received: bytes from the client to the destination, and back.
        negotiated, opened: seconds until the client had stated its request, and from there until it was connected.
        authenticated: seconds of `negotiated` spent in an authenticator; None: none was asked.
        moved: another worker has it, and writes the line.
        resolved: seconds spent on looking up names, included in `opened` except over UDP; None: no lookup.
    """

    client: str
    listener: str
    protocol: str = ""
    user: str | None = None
    claimed: str | None = None
    command: str = ""
    asked: str = ""
    original: str = ""
    connected: str = ""
    upstream: str = ""
    result: Result = "failed"
    detail: str = ""
    sent: int = 0
    received: int = 0
    negotiated: float = 0.0
    opened: float = 0.0
    authenticated: float | None = None
    resolved: float | None = None
    moved: bool = False
    began_at: float = field(default_factory=time)
    _began: float = field(default_factory=monotonic)

    def begin(self) -> None:
        """Note that the client begins to state a request: an HTTP client may have been silent before it."""
        self.began_at, self._began = time(), monotonic()

    def note_negotiated(self) -> None:
        """Note that the client has stated its request."""
        self.negotiated = monotonic() - self._began

    def note_opened(self) -> None:
        """Note that the destination is connected."""
        self.opened = monotonic() - self._began - self.negotiated

    def fields(self, redact: bool = False) -> dict[str, object]:
        """Return the fields by name, for JSON. ``redact`` leaves out the destination."""
        hidden = "-" if redact else None
        return {
            "time": utc(self.began_at),
            "client": self.client,
            "listener": self.listener,
            "protocol": self.protocol or None,
            "user": self.user,
            "claimed": self.claimed,
            "command": self.command or None,
            "asked": hidden or self.asked or None,
            "original": (hidden if self.original else None) or self.original or None,
            "connected": hidden or self.connected or None,
            "upstream": self.upstream or None,
            "result": self.result,
            "detail": None if redact else self.detail or None,
            "sent": self.sent,
            "received": self.received,
            "negotiated": round(self.negotiated, 4),
            "authenticated": None if self.authenticated is None else round(self.authenticated, 4),
            "opened": round(self.opened, 4),
            "resolved": None if self.resolved is None else round(self.resolved, 4),
            "duration": round(monotonic() - self._began, 4),
        }

    def write(self, style: Literal["text", "json"] = "text", redact: bool = False) -> None:
        """Write the line to the logger "gtcpserver.access"."""
        if log.isEnabledFor(INFO):
            write_line(log, self.fields(redact), style)
