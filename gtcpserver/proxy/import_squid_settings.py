"""Settings of squid.conf that have one value: names, times, name servers, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from .http_fields import check_pseudonym
from .import_draft import Draft, fail, networks, number
from .import_rules import Line
from .import_squid_words import seconds, size


class SquidSettings:
    """Directives by their names; each takes the words behind it. They raise ConfigError, with the line."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def do_forwarded_for(self, line: Line, words: Sequence[str]) -> None:
        modes = {"on": "append", "off": "remove", "delete": "remove", "truncate": "replace", "transparent": "pass"}
        mode = modes.get(words[0].lower())
        if mode is None:
            fail(line, f"forwarded_for must be one of {', '.join(modes)}, got {words[0]!r}")
        self.draft.config.http.forwarded = mode  # type: ignore[assignment]

    def do_via(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.http.via = "off" if words[0].lower() == "off" else "on"

    def do_visible_hostname(self, line: Line, words: Sequence[str]) -> None:
        try:
            check_pseudonym(words[0])
        except ValueError:
            fail(line, f"visible_hostname must be a host name, got {words[0]!r}")
        self.draft.config.http.pseudonym = words[0]

    def do_dns_nameservers(self, line: Line, words: Sequence[str]) -> None:
        for word in words:
            try:
                address = str(networks(line, word)[0].network_address)
            except ValueError:
                fail(line, f"the address of a name server expected, got {word!r}")
            self.draft.config.resolver.servers.append(f"[{address}]" if ":" in address else address)

    def do_dns_timeout(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.resolver.timeout = seconds(line, words)

    def do_dns_v4_first(self, line: Line, words: Sequence[str]) -> None:
        if words[0].lower() == "on":
            self.draft.config.resolver.family = "prefer-ipv4"

    def do_connect_timeout(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.timeouts.connect = seconds(line, words)

    def do_read_timeout(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.timeouts.answer = self.draft.config.timeouts.idle = seconds(line, words)

    def do_request_start_timeout(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.timeouts.negotiate = seconds(line, words)

    do_request_timeout = do_request_start_timeout

    def do_client_lifetime(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.timeouts.lifetime = seconds(line, words)

    def do_client_idle_pconn_timeout(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.timeouts.keep_alive = seconds(line, words)

    do_persistent_request_timeout = do_client_idle_pconn_timeout

    def do_client_ip_max_connections(self, line: Line, words: Sequence[str]) -> None:
        if words[0] != "-1":
            self.draft.config.limits.client_connections = number(line, words[0], "a number of connections", 1)

    def do_request_body_max_size(self, line: Line, words: Sequence[str]) -> None:
        if most := size(line, words):
            self.draft.config.limits.request_body = most
