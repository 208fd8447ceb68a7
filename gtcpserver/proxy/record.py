"""The access record: what one connection through the proxy was, as one line of a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic, time
from typing import Literal

from gtcpserver.server.access_log import log, utc, write_line

Result = Literal[
    "ok",  # relayed, and both sides ended in order
    "reset",  # one side was reset
    "idle",  # nothing moved for too long
    "half_closed",  # the same, after one side had ended
    "lifetime",  # it lasted as long as it may
    "client_denied",
    "destination_denied",
    "command_denied",
    "authentication_failed",
    "authentication_timeout",
    "proxy_header",  # none came from a balancer, or a bad one
    "tls_failed",  # the client's TLS handshake
    "bad_request",  # the client broke the protocol, or left during it
    "negotiation_timeout",
    "limit",  # too many connections
    "upstream_failed",  # the other proxy does not want us, or cannot be understood
    "unresolved",
    "resolve_timeout",  # no answer of the name server in time
    "refused",
    "unreachable",
    "connect_timeout",
    "answer_timeout",  # an HTTP origin said nothing in time
    "no_port",  # all of ours to this destination are in use, or we have no address of its kind
    "failed",
    "stopped",
]


@dataclass(slots=True)
class AccessRecord:
    """One connection, filled in as it goes on.

    Attributes:
        client: address of the client.
        listener: name of the listener.
        protocol: "socks4", "socks4a", "socks5" or "http"; "" until it is known.
        user: who the client is, if it has said so and was believed.
        claimed: the user id of SOCKS4: who the client says it is, and nobody asks whether it is.
        command: "CONNECT", "BIND", "UDP", or a method of HTTP.
        asked: destination as the client named it, in its canonical form.
        connected: the address that was connected to.
        upstream: the proxy through which, if not directly.
        result: how it ended.
        detail: in words: the rule, the error.
        sent, received: bytes from the client to the destination, and back.
        negotiated, opened: seconds until the client had said what it wants, and from there until it was connected.
        authenticated: seconds of `negotiated` that an authenticator took; None: none was asked.
        resolved: seconds that looking names up took, of `opened` but for UDP; None: no name was looked up.
    """

    client: str
    listener: str
    protocol: str = ""
    user: str | None = None
    claimed: str | None = None
    command: str = ""
    asked: str = ""
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
    began_at: float = field(default_factory=time)
    _began: float = field(default_factory=monotonic)

    def note_negotiated(self) -> None:
        """The client has said what it wants."""
        self.negotiated = monotonic() - self._began

    def note_opened(self) -> None:
        """The destination is connected."""
        self.opened = monotonic() - self._began - self.negotiated

    def fields(self, redact: bool = False) -> dict[str, object]:
        """By name, for JSON. ``redact`` leaves out where the client went."""
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
        write_line(log, self.fields(redact), style)
