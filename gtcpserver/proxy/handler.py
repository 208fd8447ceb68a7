"""ProxyHandler: the handler of a proxy's listener."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from socket import MSG_PEEK
from time import monotonic
from typing import Literal, get_args

import gevent
from greenlet import GreenletExit

from gtcpserver.admission.proxy_header import network_address, read_proxy_header
from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.errors import ClientRefused, ConfigError, DeadlineExceeded
from gtcpserver.networks import as_ip
from gtcpserver.proxy_protocol.header import ProxyProtocolError
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.server.outcome import is_client_error, was_raised_by_connection
from gtcpserver.shared.column import Column
from gtcpserver.store.store import Store
from gtcpserver.tls import Credentials, TLSConfig
from gtcpserver.tls.acme.answers import MAX_HELLO
from gtcpserver.tls.info import ChallengeAnswered

from .errors import Cut, ProtocolError
from .gate import Gate, host_of
from .http_fields import Forwarded, ForwardedField, ForwardedMode, check_pseudonym, unique_pseudonym
from .http_session import HttpSession
from .moving import take_over
from .pac import check_direct
from .record import AccessRecord
from .sniff import Protocol, sniff
from .socks_session import ClientLeft, go_on, negotiate_socks4, negotiate_socks5
from .transparent import Interception
from .visitor import Visitor, admit

Speaks = Literal["mixed", "socks", "http", "transparent"]

#: Seconds for a client that is not admitted to reveal its protocol, so that it is refused in that protocol.
TIME_OF_REFUSED = 1.0

#: Maximum number of such clients at once; others are reset. Each holds a descriptor, and may come as fast as it likes.
MOST_REFUSED = 100


#: Seconds between two looks at a first TLS record that is not whole yet: the rest follows at once.
PEEK_AGAIN = 0.02


class ProxyHandler:
    """Serve the clients of a proxy: ``Server("127.0.0.1:1080", ProxyHandler(Gate(...)))``.

    Args:
        gate: decides who is admitted, and to which destinations.
        speaks: the protocols of this listener; "mixed": both, the first byte tells them apart; "transparent": none,
            clients are redirected here by the firewall.
        tls: a TLSConfig: clients speak TLS with the proxy (an HTTPS proxy, SOCKS in TLS); None: they do not.
        pseudonym: the name of this proxy in the Via field of HTTP messages; None: a unique one.
        via: add that field; without it a loop of proxies is not detected.
        forwarded: how to treat fields in which a client says for whom it asks (X-Forwarded-For and others): "remove",
            "pass", "replace" them by its address or "append" that.
        forwarded_field: the field to use: "x-forwarded-for" or "forwarded" (RFC 7239).
        proxy_protocol: this listener's clients come through balancers that send PROXY headers; None: they do not.
        pac: destinations that browsers reach without this proxy: a script at /proxy.pac says so (`pac`); None: no
            script.
        interception: how "transparent" serves its clients; None: by its defaults.
        log_style: style of the access log (logger "gtcpserver.access"): one line per connection.
        log_at: when a tunnel gets its line: at its "end", or "both" then and when it is connected (result "open"), so
            that one is there even if this process is killed.
        redact: leave destinations out of the log.

    Attributes:
        counters: counts of the results in the access log: how connections and requests have ended.

    Example::

        from gtcpserver import Server
        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.handler import ProxyHandler
        from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule

        gate = Gate(
            client_rules=[parse_client_rule("allow 127.0.0.0/8")],
            destination_rules=[parse_destination_rule("allow any:443")],
        )
        server = Server("127.0.0.1:1080", ProxyHandler(gate))
    """

    def __init__(
        self,
        gate: Gate,
        speaks: Speaks = "mixed",
        *,
        tls: TLSConfig | None = None,
        pseudonym: str | None = None,
        via: bool = True,
        forwarded: ForwardedMode = "remove",
        forwarded_field: ForwardedField = "x-forwarded-for",
        proxy_protocol: ProxyProtocol | None = None,
        pac: Sequence[str] | None = None,
        interception: Interception | None = None,
        log_style: Literal["text", "json"] = "text",
        log_at: Literal["end", "both"] = "end",
        redact: bool = False,
    ) -> None:
        if speaks not in get_args(Speaks):
            raise ConfigError(f"speaks must be one of {', '.join(get_args(Speaks))}, got {speaks!r}")
        self.gate = gate
        self._speaks = speaks
        self._interception = interception or Interception() if speaks == "transparent" else None
        self._tls = None if tls is None else Credentials(tls)
        check_pseudonym(pseudonym)
        self._pseudonym = (pseudonym or unique_pseudonym()).encode() if via else b""
        self._forwarded = Forwarded(forwarded, forwarded_field)
        self._log_style: Literal["text", "json"] = log_style
        self._redact = redact
        check_direct(pac or ())
        self._pac = pac
        self._announces = log_at == "both"
        self._balancers = proxy_protocol
        self._refused = 0
        self.count_in(Counter())

    @property
    def tls_credentials(self) -> tuple[Credentials, ...]:
        """Certificates of the listener, for monitors."""
        return () if self._tls is None else (self._tls,)

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        if conn.resumed:
            self._admitted(conn, take_over(self.gate.latest, conn))
            return
        if self._balancers is not None:
            try:
                read_proxy_header(conn, self._balancers)
            except (ProxyProtocolError, OSError) as error:
                record = AccessRecord(str(as_ip(host_of(network_address(conn)))), self.gate.listener)
                record.result, record.detail = "proxy_header", str(error)
                if isinstance(error, ClientRefused):
                    record.result = "client_denied" if error.reason == "client_denied" else "limit"
                self._write(record)
                return
        self._admitted(conn, admit(self.gate.latest, conn))

    def _admitted(self, conn: Connection, visitor: Visitor) -> None:
        if not visitor.admitted:
            self._refuse(conn, visitor)
            return
        conn.context = visitor
        if self._announces:
            visitor.announce = self._announce
        try:
            self._serve(conn, visitor)
        finally:
            conn.context = None  # no work for the garbage collector
            visitor.leave()

    def _refuse(self, conn: Connection, visitor: Visitor) -> None:
        """Refuse it in its own protocol if it speaks up quickly; not worth a TLS handshake.

        But an ACME authority is answered: from where it asks, nobody knows, so that no rule can admit it.
        """
        if self._may_be_authority(conn):
            self._refused += 1
            try:
                if self._is_question(conn):
                    self._serve(conn, visitor)
                    return
            finally:
                self._refused -= 1
        is_told = (self._tls is None or conn.resumed) and self._interception is None
        if not is_told or self._refused >= MOST_REFUSED:
            conn.abort()
            self._write(visitor.record)
            return
        self._refused += 1
        try:
            self._serve(conn, visitor)
        finally:
            self._refused -= 1

    def _may_be_authority(self, conn: Connection) -> bool:
        answers = None if self._tls is None or conn.resumed else self._tls.answers
        return answers is not None and self._refused < MOST_REFUSED and answers.is_asked()

    def _is_question(self, conn: Connection) -> bool:
        """Return whether the client's first TLS record is an authority's question. It stays unread."""
        assert self._tls is not None
        assert self._tls.answers is not None
        try:
            with conn.deadline(TIME_OF_REFUSED):
                while not _is_whole_record(record := conn.recv(MAX_HELLO, MSG_PEEK)):
                    gevent.sleep(PEEK_AGAIN)
        except OSError:
            return False
        return self._tls.answers.find(record) is not None

    def _serve(self, conn: Connection, visitor: Visitor) -> None:
        is_http = False
        try:
            if self._tls is not None and not conn.resumed:
                try:
                    conn.start_tls(self._tls, answers=True)
                except ChallengeAnswered:
                    visitor.record.result, visitor.record.detail = "acme_challenge", ""
                    return
                except OSError as error:
                    visitor.record.result, visitor.record.detail = "tls_failed", error.strerror or str(error)
                    return
            if conn.relayed_to is not None:
                serve: Callable[[], None] | None = partial(go_on, conn, visitor)
            elif self._interception is not None:
                serve = self._interception.negotiate(conn, visitor)
            else:
                visitor.show_certificate(conn.tls)
                serve = self._negotiate(conn, visitor) if not conn.resumed else self._http(conn, visitor, None)
                is_http = visitor.record.protocol == "http"
            if serve is not None:
                serve()
        except GreenletExit as cut:
            visitor.record.result, visitor.record.detail = "stopped", str(cut)
            raise
        except Cut as cut:
            visitor.record.result, visitor.record.detail = cut.result, str(cut)
            conn.abort()
        except ConnectionError as error:
            if visitor.record.result == "failed":
                visitor.record.detail = error.strerror or str(error)
                if is_client_error(error, conn):
                    visitor.record.result = "reset"
            if not was_raised_by_connection(error):
                raise  # an authenticator's error, say
        finally:
            # An HTTP session writes its own line for each request.
            if not is_http:
                self._write(visitor.record)

    def connection_rejected(self, conn: Connection) -> None:
        """Log a connection that the server has closed because its pool was full. Called in the hub."""
        record = AccessRecord(str(as_ip(host_of(network_address(conn)))), self.gate.listener)
        record.result, record.detail = "limit", "pool"
        self._write(record)

    def share_limits(self, column: Column) -> None:
        """Count clients, users and failures together with all processes that have a column."""
        self.gate.limits.share(column)
        for name, authenticator in self.gate.authenticators.items():
            share = getattr(authenticator, "share", None)
            if share is not None:
                share(column, name)

    def share_store(self, store: Store) -> None:
        """Count clients, users and failures together with other machines."""
        self.gate.limits.share_store(store)
        for name, authenticator in self.gate.authenticators.items():
            share = getattr(authenticator, "share_store", None)
            if share is not None:
                share(store, name)

    def count_in(self, counters: Counter[str]) -> None:
        """Count in these counters, which other handlers may share."""
        self.counters = counters
        for group in self.gate.groups:
            group.counters = counters

    @property
    def gauges(self) -> dict[str, int]:
        """Return the state of the members of all upstream groups, and the number of UDP associations."""
        members = {name: value for group in self.gate.groups for name, value in group.gauges.items()}
        return {**members, "udp_associations": self.gate.latest.limits.associations.open}

    def server_stopped(self) -> None:
        """End what authenticators, groups and the resolver have started, after the server has stopped."""
        for authenticator in self.gate.authenticators.values():
            close = getattr(authenticator, "close", None)
            if close is not None:
                close()
        for group in self.gate.groups:
            group.close()
        if self.gate.quota is not None:
            self.gate.quota.close()
        self.gate.resolver.close()
        self.gate.this_host.close()

    def _announce(self, record: AccessRecord) -> None:
        replace(record, result="open").write(self._log_style, self._redact)

    def _write(self, record: AccessRecord) -> None:
        if record.moved:
            return
        self.counters[record.result] += 1
        record.write(self._log_style, self._redact)

    def _negotiate(self, conn: Connection, visitor: Visitor) -> Callable[[], None] | None:
        """Read the client's request within one deadline. None: it was refused."""
        record, seconds = visitor.record, self.gate.timeouts.negotiate
        if not visitor.admitted:
            seconds = min(seconds, TIME_OF_REFUSED)
        until = monotonic() + seconds
        try:
            with conn.deadline(seconds):
                protocol, data = self._first_bytes(conn)
                visitor.follow()
                if self._speaks != "mixed" and (protocol == "http") != (self._speaks == "http"):
                    raise ProtocolError(f"the client speaks {protocol}, this listener does not")
                if protocol == "http":
                    conn.unread(data)
                    return self._http(conn, visitor, until)
                negotiate = negotiate_socks5 if protocol == "socks5" else negotiate_socks4
                serve = negotiate(conn, visitor, data)
                if serve is not None:
                    record.note_negotiated()
                return serve
        except ProtocolError as error:
            record.result, record.detail = "bad_request", str(error)
            if error.reply:
                conn.sendall(error.reply)
        except ClientLeft:
            if visitor.admitted:
                record.result, record.detail = "bad_request", "the client left"
        except DeadlineExceeded:
            if visitor.admitted:  # otherwise its result is already known
                record.result = "negotiation_timeout"
        return None

    def _http(self, conn: Connection, visitor: Visitor, until: float | None) -> Callable[[], None]:
        visitor.record.protocol = "http"
        both = self._speaks == "mixed"
        return HttpSession(conn, visitor, self._pseudonym, self._write, self._forwarded, until, self._pac, both).serve

    def _first_bytes(self, conn: Connection) -> tuple[Protocol, bytes]:
        data = b""
        while True:
            more = conn.recv(READ_AHEAD)
            if not more:
                raise ClientLeft
            data += more
            protocol = sniff(data)
            if protocol is not None:
                return protocol, data


def _is_whole_record(data: bytes) -> bool:
    """Return whether a TLS record is there from its beginning to its end, or nothing that could become one."""
    could_be = data[:2] in (b"\x16", b"\x16\x03") and len(data) < MAX_HELLO
    return not could_be or (len(data) >= 5 and len(data) >= 5 + int.from_bytes(data[3:5], "big"))
