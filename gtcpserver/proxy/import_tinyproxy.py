"""tinyproxy.conf(5), version 1.11, as a configuration of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from urllib.parse import quote

from .http_fields import check_pseudonym
from .import_draft import (
    Draft,
    add_listener,
    an_address,
    check_encoding,
    close,
    fail,
    host_name,
    listen_address,
    networks,
    number,
)
from .import_rules import Entry, Line, Match, other_ports, word_of
from .passwords import hash_password
from .settings import UpstreamTable

SECRETS = frozenset({"basicauth", "upstream"})

#: Directives that are no matter of who may do what.
_OTHERS = {
    "user": "the option --worker-user, or the service manager",
    "group": "the option --worker-user, or the service manager",
    "logfile": "log.file is for the access log; other messages go to standard error",
    "syslog": "standard error; the service manager may send it there",
    "loglevel": "the option --log-level",
    "pidfile": "the option --pid-file",
    "errorfile": "",
    "defaulterrorfile": "",
    "stathost": "the option --metrics has a status page",
    "statfile": "the option --metrics has a status page",
    "xtinyproxy": 'http.forwarded = "replace" tells origins the client\'s address',
    "addheader": "",
    "reversepath": "this proxy does not stand in front of servers",
    "reversemagic": "",
    "reversebaseurl": "",
    "minspareservers": "",
    "maxspareservers": "",
    "startservers": "",
    "maxrequestsperchild": "",
    "filterurls": "",
    "filterextended": "",
    "filtertype": "",
    "filtercasesensitive": "",
}

_WORD = re.compile(r'"([^"]*)"|([^\s"]+)')
_YES = ("yes", "on", "true", "1")


class _Reader:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.port: int | None = None
        self.listen: list[str] = []
        self.access: list[Entry] = []
        self.has_access = False
        self.users: dict[str, str] = {}
        self.connect_ports: list[tuple[Line, int]] = []
        self.upstreams: list[tuple[str, str]] = []
        self.external: list[str] = []
        self.filter: Line | None = None
        self.filter_denies = False
        self.nothing: Line | None = None

    def read(self, line: Line) -> None:
        text = line.text.strip()
        if not text or text.startswith("#"):
            return
        check_encoding(line)
        words = [quoted or word for quoted, word in _WORD.findall(text)]
        if not words or text.count('"') % 2:
            fail(line, "a quote without its partner")
        key = words[0].lower()
        directive = getattr(self, f"do_{key}", None)
        if directive is not None:
            if len(words) < 2:
                fail(line, f"{words[0]} needs a value")
            directive(line, words[1:])
        elif key in _OTHERS:
            self.draft.other(line, _OTHERS[key])
        else:
            self.draft.more(line, "this directive is not known, nor what it restricts")

    # -- directives, by their names in lower case ----------------------------------------------------------------------

    def do_port(self, line: Line, words: Sequence[str]) -> None:
        self.port = number(line, words[0], "Port", 1, 65535)

    def do_listen(self, line: Line, words: Sequence[str]) -> None:
        self.listen.append(an_address(line, words[0]))

    def do_bind(self, line: Line, words: Sequence[str]) -> None:
        self.external.append(an_address(line, words[0]))
        versions = [":" in one for one in self.external]
        if len(set(versions)) < len(versions):
            self.external.pop()
            self.draft.other(line, "external has one address of each family")

    def do_bindsame(self, line: Line, words: Sequence[str]) -> None:
        if _is_yes(words[0]):
            self.external = ["same"]

    def do_timeout(self, line: Line, words: Sequence[str]) -> None:
        seconds = float(number(line, words[0], "Timeout"))
        timeouts = self.draft.config.timeouts
        if seconds:
            timeouts.idle = timeouts.answer = seconds
            timeouts.half_closed = min(seconds, 300.0)

    def do_maxclients(self, line: Line, words: Sequence[str]) -> None:
        self.draft.config.limits.connections = number(line, words[0], "MaxClients", 1)

    def do_allow(self, line: Line, words: Sequence[str], allow: bool = True) -> None:
        self.has_access = True  # which denies the others, even if this one is left out
        try:
            self.access.append(Entry(line, allow, Match(clients=networks(line, words[0]))))
        except ValueError:
            host_name(line, words[0])
            self.draft.left_out(line, allow, "clients are not known by names here")

    def do_deny(self, line: Line, words: Sequence[str]) -> None:
        self.do_allow(line, words, False)

    def do_basicauth(self, line: Line, words: Sequence[str]) -> None:
        if len(words) != 2:
            fail(line, "BasicAuth needs a user and a password")
        self.users[words[0]] = words[1]

    def do_connectport(self, line: Line, words: Sequence[str]) -> None:
        self.connect_ports.append((line, number(line, words[0], "ConnectPort", 0, 65535)))

    def do_viaproxyname(self, line: Line, words: Sequence[str]) -> None:
        try:
            check_pseudonym(words[0])
        except ValueError:
            self.draft.other(line, "http.pseudonym must be a word")
            return
        self.draft.config.http.pseudonym = words[0]

    def do_disableviaheader(self, line: Line, words: Sequence[str]) -> None:
        if _is_yes(words[0]):
            self.draft.config.http.via = "off"

    def do_filter(self, line: Line, words: Sequence[str]) -> None:
        self.filter = line

    def do_filterdefaultdeny(self, line: Line, words: Sequence[str]) -> None:
        self.filter_denies = _is_yes(words[0])

    def do_anonymous(self, line: Line, words: Sequence[str]) -> None:
        self.draft.more(
            line, "other header fields than these are not removed (http.forwarded removes those about clients)"
        )

    def do_reverseonly(self, line: Line, words: Sequence[str]) -> None:
        if _is_yes(words[0]):
            self.nothing = line

    def do_upstream(self, line: Line, words: Sequence[str]) -> None:
        kind, *rest = words
        kind = kind.lower()
        if kind not in ("http", "socks4", "socks5", "none") or not 1 <= len(rest) <= 2:
            # Before 1.10: "upstream host:port".
            kind, rest = "http", list(words)
        name = "direct"
        if kind != "none":
            name = f"upstream-{len(self.draft.config.upstream) + 1}"
            self.draft.config.upstream[name] = UpstreamTable(
                url=_url(line, kind, rest[0]), resolve="here" if kind == "socks4" else "there"
            )
        site = rest[-1] if kind == "none" or len(rest) > 1 else "any"
        if site == ".":
            self.draft.more(line, "rules have no word for names without a dot: these take another way")
            return
        if site[:1].isdigit():
            self.draft.other(line, "names are looked up first, here, and their addresses count")
        self.upstreams += [(name, one) for one in _site(line, site)]

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, end: Line) -> None:
        draft = self.draft
        if self.port is None:
            fail(end, "there is no Port: is this a tinyproxy.conf?")
        for host in self.listen or ["*"]:
            listener = add_listener(draft, listen=listen_address(host, self.port), speaks="http")
            listener.external = "same" if self.external == ["same"] else self.external or "auto"
        users = () if self.users else None
        if self.users:
            draft.add_users({name: hash_password(password.encode()) for name, password in self.users.items()})
        for line, ports in self._closed_ports():
            draft.entries.append(Entry(line, False, Match(ports=ports, commands=frozenset(["connect"]))))
        if self.filter is not None:
            if self.filter_denies:
                self.nothing = self.filter
            draft.left_out(
                self.filter, self.filter_denies, "rules have names and .domains, no patterns: add destination rules"
            )
        if self.nothing is not None:
            if self.nothing != self.filter:
                draft.less(self.nothing, "this proxy does not stand in front of servers")
            draft.entries.append(Entry(self.nothing, False))
        for entry in self.access:
            match = Match(clients=entry.match.clients, users=users if entry.allow else None)
            draft.entries.append(Entry(entry.line, entry.allow, match))
        if self.has_access:
            close(draft, end, False)
        else:
            draft.entries.append(Entry(end, True, Match(users=users)))
            draft.entries += [Entry(end, False)] if self.users else []
        draft.finish()
        # The last one that matches decides there.
        draft.config.rules.upstreams = [f"through {name} {site}" for name, site in reversed(self.upstreams)]

    def _closed_ports(self) -> Iterable[tuple[Line, tuple[tuple[int, int], ...] | None]]:
        if self.connect_ports:
            closed = other_ports(tuple((port, port) for _, port in self.connect_ports if port))
            yield self.connect_ports[0][0], closed


def _is_yes(word: str) -> bool:
    return word.lower() in _YES


def _site(line: Line, site: str) -> list[str]:
    if site == "any":
        return [site]
    try:
        return [f"[{one}]" if one.version == 6 else word_of(one) for one in networks(line, site)]
    except ValueError:
        return [host_name(line, site)]


def _url(line: Line, kind: str, text: str) -> str:
    user, at, place = text.rpartition("@")
    host, _, port = place.rpartition(":")
    number(line, port, "the port of an upstream", 1, 65535)
    try:
        host = str(networks(line, host.strip("[]"))[0].network_address)
    except ValueError:
        host = host_name(line, host)
    name, colon, password = user.partition(":")
    if kind == "socks4":
        colon = password = ""
    return f"{kind}://{quote(name, safe='')}{colon}{quote(password, safe='')}{at}{listen_address(host, int(port))}"


def read_tinyproxy(draft: Draft, lines: Iterable[Line], read: Callable[[Line, str], Iterable[Line]]) -> None:
    """Make a configuration from the lines of a tinyproxy.conf. Raise ConfigError."""
    reader = _Reader(draft)
    line = Line("tinyproxy.conf", 1, "")
    for line in lines:
        reader.read(line)
    reader.finish(replace(line, text=""))
