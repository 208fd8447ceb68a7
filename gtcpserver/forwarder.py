"""Forwarder: a handler that connects each client to one of several targets and relays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, get_args

import gevent
import gevent.ssl

from .address import parse_address
from .checks import check_number
from .connection.connect import connect
from .connection.connection import Connection
from .connection.proxy_header import ProxyVersion, check_version, header_of
from .diagnostics.logs import own_logger
from .errors import CAPACITY_ERRNOS, ConfigError
from .plural import counted
from .transfer import relay

log = own_logger("gtcpserver.forward")

Balance = Literal["first", "round-robin", "least"]

#: Seconds to set a refusing target aside: at first, and (doubling after each further failure) at most. So clients do
#: not wait for a host that is down, and its return is noticed.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0

#: Name of the target's address in a session.
_TARGET = "target"


@dataclass
class Target:
    """One target, and what is known about it.

    Attributes:
        address: as for ``connect``.
        active: connections relayed to it now, or about to be.
        connected, failed: attempts so far, by their outcome.
        aside_until: monotonic time before which it is only tried if no other one is left.
        pause: seconds for which it was last set aside; 0.0: it is up.

    Example::

        from gtcpserver.forwarder import Target

        target = Target("10.0.0.5:7000")
        print(target.active, target.failed)  # 0 0
    """

    address: str
    active: int = 0
    connected: int = 0
    failed: int = 0
    aside_until: float = 0.0
    pause: float = 0.0


class Forwarder:
    """Relay every connection to the first target that accepts: ``Server("*:80", Forwarder(["10.0.0.1:80"]))``.

    Args:
        targets: one or more of "host:port", "[IPv6]:port", "unix:/path".
        balance: which target to try first: the "first" of the list (the others are for when it is down), each in turn
            ("round-robin"), or the one with the "least" connections. The others follow in the same order. A target that
            failed is set aside, for longer each time, and tried again when that time is over, or when all are aside.
        connect_timeout: seconds for each target.
        idle_timeout: seconds without data from either side until a relay ends; None: no limit.
        tls: a gevent.ssl.SSLContext for TLS to the targets, which also decides how certificates are verified; None:
            plain text.
        send_proxy: begin each connection to a target with a PROXY header, "v1" or "v2", with the client's address;
            before TLS. Only for targets that expect it. None: none.

    Connections without TLS on either side move to the next worker (``Server(handover=True)``).

    A client is reset if no target could be reached. The same happens when this process runs out of descriptors or
    memory to connect with, which is no target's fault: then the OSError is raised.

    Raises:
        ConfigError: an invalid option.

    Example::

        from gtcpserver import Server
        from gtcpserver.forwarder import Forwarder

        targets = ["10.0.0.5:7000", "10.0.0.6:7000"]
        server = Server("127.0.0.1:5000", Forwarder(targets, balance="least"))
    """

    def __init__(
        self,
        targets: Sequence[str],
        *,
        balance: Balance = "first",
        connect_timeout: float = 5.0,
        idle_timeout: float | None = None,
        tls: Any = None,
        send_proxy: ProxyVersion | None = None,
    ) -> None:
        if isinstance(targets, str) or not targets:
            raise ConfigError(f"targets must be a list of one or more addresses, got {targets!r}")
        if balance not in get_args(Balance):
            raise ConfigError(f'balance must be "first", "round-robin" or "least", got {balance!r}')
        check_number("connect_timeout", connect_timeout, above=0)
        check_version("send_proxy", send_proxy)
        check_number("idle_timeout", idle_timeout, above=0, none="for no limit")
        if tls is not None and not isinstance(tls, gevent.ssl.SSLContext):
            raise ConfigError(f"tls must be a gevent.ssl.SSLContext, got {tls!r}")
        self.targets = [Target(_checked(target)) for target in targets]
        nameless = [target.address for target in self.targets if target.address.startswith("unix:")]
        if tls is not None and tls.check_hostname and nameless:
            raise ConfigError(f"tls must not check host names (check_hostname) for {nameless[0]}, which has none")
        self.balance = balance
        self.connect_timeout = connect_timeout
        self.idle_timeout = idle_timeout
        self.tls = tls
        self.send_proxy = send_proxy
        self._turn = 0

    def __call__(self, conn: Connection) -> None:
        """Serve one client; return when both sides have ended."""
        upstream = conn.relayed_to
        if upstream is not None:  # from another worker
            with upstream:
                self._relay(conn, upstream, self._target_of(conn))
            return
        for target in self._in_order():
            target.active += 1
            pause = target.pause
            due = target.aside_until <= monotonic()
            if due and pause:
                # This client finds out whether it is back, so that others need not wait for that.
                target.aside_until = monotonic() + self.connect_timeout
            try:
                upstream = self._connect(target, conn)
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:  # which any other target would hit too
                    conn.abort()
                    raise
                # If many clients found it down at once, each would double the pause.
                self._is_down(target, error, longer=due and target.pause == pause)
                continue
            finally:
                target.active -= 1
            self._is_up(target)
            with upstream:
                self._relay(conn, upstream, target)
            return
        # A normal end would say that the target had nothing to send.
        conn.abort()

    def _relay(self, conn: Connection, upstream: Any, target: Target) -> None:
        if conn.server is not None and conn.server.moving is not None:
            conn.session[_TARGET] = target.address
        target.active += 1
        try:
            result = relay(conn, upstream, idle_timeout=self.idle_timeout, handover=True)
        finally:
            target.active -= 1
        log.debug(
            "%s to %s: %s there, %d back in %.3f s (%s)",
            conn.client_address,
            target.address,
            counted(result.bytes_a_to_b, "byte"),
            result.bytes_b_to_a,
            result.duration,
            result.reason,
        )

    def _target_of(self, conn: Connection) -> Target:
        """Return the target of a connection from another worker: it counts there, if these settings still have it."""
        address = str(conn.session.get(_TARGET))
        return next((target for target in self.targets if target.address == address), Target(address))

    def _in_order(self) -> Iterable[Target]:
        targets = self.targets
        if self.balance == "round-robin":
            start = self._turn % len(targets)
            self._turn = start + 1
            targets = targets[start:] + targets[:start]
        elif self.balance == "least":
            targets = sorted(targets, key=lambda target: target.active)
        now = monotonic()
        up = [target for target in targets if target.aside_until <= now]
        aside = sorted((target for target in targets if target.aside_until > now), key=lambda t: t.aside_until)
        return up + aside

    def _connect(self, target: Target, conn: Connection) -> Any:
        with gevent.Timeout(
            self.connect_timeout,
            TimeoutError(f"not connected to {target.address} within {self.connect_timeout} seconds"),
        ):
            upstream = connect(target.address)
            try:
                if self.send_proxy is not None:
                    upstream.sendall(header_of(conn, self.send_proxy).to_bytes())
                if self.tls is None:
                    return upstream
                parsed = parse_address(target.address)
                return self.tls.wrap_socket(upstream, server_hostname=None if parsed.kind == "unix" else parsed.host)
            except BaseException:
                upstream.close()
                raise

    def _is_down(self, target: Target, error: OSError, longer: bool) -> None:
        target.failed += 1
        if longer:
            if not target.pause:
                log.warning("target %s is down: %s", target.address, error)
            target.pause = min(LONGEST_PAUSE, 2 * target.pause or FIRST_PAUSE)
            target.aside_until = monotonic() + target.pause

    def _is_up(self, target: Target) -> None:
        target.connected += 1
        if target.pause:
            log.warning("target %s is up again", target.address)
            target.pause = target.aside_until = 0.0


def _checked(target: str) -> str:
    try:
        parsed = parse_address(target)
    except ConfigError:
        parsed = None
    if parsed is None or parsed.kind == "fd" or parsed.host == "*" or (parsed.kind == "tcp" and not parsed.port):
        raise ConfigError(f'targets must be "host:port", "[IPv6]:port" or "unix:/path", got {target!r}')
    return str(parsed)
