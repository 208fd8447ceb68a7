"""squid.conf (squid 5 and 6), as a configuration of ours: http_access and what belongs to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn
from urllib.parse import quote, unquote

from .import_draft import (
    AUTH,
    Draft,
    add_listener,
    check_encoding,
    close,
    fail,
    host_name,
    listen_address,
    networks,
    number,
    ports_of,
)
from .import_rules import Entry, Line, Match, NotHere, both, other_ports, word_of
from .import_squid_settings import SquidSettings
from .import_squid_words import NEVER, NO_PROTOCOLS, OTHER_PREFIXES, OTHERS, RESTRICTIONS, seconds
from .settings import AuthTable, UpstreamTable
from .target import IPNetwork

SECRETS = frozenset({"cache_peer"})

#: Files within files, as in squid.
DEEPEST = 16


#: An acl that no file can name: everybody with a password.
_ANYBODY = " "


#: Options of listeners that are not here.
_OTHER_LISTENERS = ("intercept", "tproxy", "transparent", "accel", "ssl-bump", "require-proxy-header")


class Unknown(Exception):
    """A condition that rules do not have."""


@dataclass(slots=True)
class _Acl:
    kind: str
    words: list[str] = field(default_factory=list)


class _Reader(SquidSettings):
    def __init__(self, draft: Draft, read: Callable[[Line, str], Iterable[Line]]) -> None:
        super().__init__(draft)
        self.read_file = read
        self.acls: dict[str, _Acl] = {
            "all": _Acl("src", ["all"]),
            "localhost": _Acl("src", ["127.0.0.1/32", "::1"]),
            "to_localhost": _Acl("dst", ["127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"]),
            "to_linklocal": _Acl("dst", ["169.254.0.0/16", "fe80::/10"]),
            "CONNECT": _Acl("method", ["CONNECT"]),
            "manager": _Acl("manager"),
            _ANYBODY: _Acl("proxy_auth", ["REQUIRED"]),
        }
        self.access: list[tuple[Line, bool, Sequence[str]]] = []
        self.helper: list[str] = []
        self.auth: dict[str, float] = {}
        self.peers: dict[str, list[str]] = {}
        self.never_direct = False
        self.places: set[str] = set()

    def read(self, lines: Iterable[Line], depth: int = 0) -> Line | None:
        line, begun = None, ""
        for line in lines:
            text = begun + line.text
            if text.endswith("\\") and not text.lstrip().startswith("#"):
                begun = text[:-1] + " "
                continue
            begun = ""
            self._read_line(replace(line, text=text.strip()), depth)
        if begun and line is not None:
            self._read_line(replace(line, text=begun.strip()), depth)
        return line

    def _read_line(self, line: Line, depth: int) -> None:
        text = line.text
        if not text or text.startswith("#"):
            return
        words = _words(text)
        line = replace(line, text=" ".join(words))
        check_encoding(line)
        key, rest = words[0].lower(), words[1:]
        if key == "include":
            if depth >= DEEPEST:
                fail(line, f"include must not be nested deeper than {DEEPEST}")
            for path in rest:
                if self.read(self.read_file(line, path), depth + 1) is None:
                    self.draft.more(line, "there is no such file here: what it restricts is not known")
            return
        directive = getattr(self, f"do_{key}", None)
        if directive is not None:
            if not rest:
                fail(line, f"{key} needs a value")
            directive(line, rest)
        elif key in RESTRICTIONS:
            self.draft.more(line, RESTRICTIONS[key])
        elif key in OTHERS:
            self.draft.other(line, OTHERS[key])
        elif key.startswith(OTHER_PREFIXES):
            self.draft.other(line, "this proxy has no cache and no such protocol")
        else:
            self.draft.more(line, "this directive is not known, nor what it restricts")

    # -- access lists --------------------------------------------------------------------------------------------------

    def do_acl(self, line: Line, words: Sequence[str]) -> None:
        if len(words) < 2:
            fail(line, "acl needs a name and a type")
        name, kind, *rest = words
        kind = kind.lower()
        acl = self.acls.get(name)
        if acl is not None and acl.words and acl.kind != kind:
            fail(line, f"the acl {name} was of the type {acl.kind}, and is of the type {kind}")
        acl = self.acls[name] = acl or _Acl(kind)
        acl.kind = kind
        for word in rest:
            if len(word) > 2 and word[0] == word[-1] == '"':
                for one in self.read_file(line, word[1:-1]):
                    check_encoding(one)
                    acl.words += one.text.partition("#")[0].split()
            else:
                acl.words.append(word)
        self._condition_or_note(line, acl)

    def _condition_or_note(self, line: Line, acl: _Acl) -> None:
        try:
            self._condition(line, acl)  # reports mistakes here
        except Unknown as why:
            self.draft.other(line, str(why))

    def do_http_access(self, line: Line, words: Sequence[str]) -> None:
        action, *names = words
        if action not in ("allow", "deny") or not names:
            fail(line, "http_access needs allow or deny, and names of acls")
        allow = action == "allow"
        for name in names:
            if name.removeprefix("!") not in self.acls:
                fail(line, f"there is no acl {name.removeprefix('!')!r}")
        self.access.append((line, allow, names))

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries, at the end: an acl may have got more values after its use."""
        for line, allow, names in self.access:
            kinds = [self.acls[name.removeprefix("!")].kind for name in names]
            asks = kinds.index("proxy_auth") if "proxy_auth" in kinds else None
            try:
                if asks is not None and asks < len(names) - 1:
                    # Whatever follows, clients without a password are asked for one.
                    entry = self._entry(line, False, [*names[:asks], f"!{_ANYBODY}"])
                    if entry is not None:
                        yield entry
                entry = self._entry(line, allow, names)
            except (Unknown, NotHere) as why:
                self.draft.left_out(line, allow, str(why))
                if allow and asks is not None:
                    self.draft.more(line, "clients without a password are not asked for one")
                continue
            if entry is not None:
                yield entry

    def _entry(self, line: Line, allow: bool, names: Sequence[str]) -> Entry | None:
        """Return the entry of a list of acls; None: it never applies. Raise Unknown."""
        if not allow and self._is_limit(line, names):
            return None
        match, excluded = Match(), []
        for name in names:
            negated, acl = name.startswith("!"), self.acls[name.removeprefix("!")]
            if acl.kind in NEVER or (acl.kind == "proto" and not {word.upper() for word in acl.words} - NO_PROTOCOLS):
                if negated:
                    continue
                return None
            condition = self._condition(line, acl)
            if not negated:
                common = both(match, condition)
                if common is None:
                    return None
                match = common
            elif condition == Match():
                return None
            elif condition == Match(ports=condition.ports) and condition.ports:
                ports = other_ports(condition.ports)
                common = both(match, Match(ports=ports)) if ports else None
                if common is None:
                    return None
                match = common
            else:
                excluded.append(condition)
        return Entry(line, allow, match, tuple(excluded))

    def _is_limit(self, line: Line, names: Sequence[str]) -> bool:
        """Set the limit that an entry stands for: "deny X", or "deny X all", where X is of the type maxconn."""
        limits = [self.acls[name] for name in names if name in self.acls and self.acls[name].kind == "maxconn"]
        if len(limits) != 1 or set(names) - {"all"} != {name for name in names if self.acls.get(name) is limits[0]}:
            return False
        if line != self.access[0][0]:
            self.draft.less(line, "this limit is for all clients here, also of those allowed before")
        most = number(line, (limits[0].words or [""])[-1], "maxconn", 1)
        self.draft.config.limits.client_connections = most
        return True

    def _condition(self, line: Line, acl: _Acl) -> Match:
        words = [word for word in acl.words if word not in ("-n", "--")]
        kind = acl.kind
        if kind in NEVER:
            return Match()
        if kind in ("src", "dst"):
            return self._networks(line, kind, words)
        if kind == "dstdomain":
            if not words:
                _nothing(line)
            return Match(destinations=tuple(dict.fromkeys(host_name(line, word) for word in words)))
        if kind == "port":
            if not words:
                _nothing(line)
            return Match(ports=ports_of(line, words))
        if kind == "method":
            methods = {word.upper() for word in words}
            if methods == {"CONNECT"}:
                return Match(commands=frozenset(["connect"]))
            raise Unknown("CONNECT is a condition of rules here, other methods are not")
        if kind == "proxy_auth":
            names = [word for word in words if word not in ("-i", "+i")]
            if not names:
                _nothing(line)
            return Match(users=() if "REQUIRED" in names else tuple(dict.fromkeys(names)))
        raise Unknown(f"acls of the type {kind} are no conditions of rules here")

    def _networks(self, line: Line, kind: str, words: Sequence[str]) -> Match:
        if not words:
            _nothing(line)
        if "all" in words:
            return Match()
        found: list[IPNetwork] = []
        for word in words:
            try:
                found += networks(line, {"ipv4": "0.0.0.0/0", "ipv6": "::/0"}.get(word.lower(), word))
            except ValueError:
                host_name(line, word)
                raise Unknown("names of hosts are looked up at the start there, and are no networks here") from None
        unique = tuple(dict.fromkeys(found))
        return Match(clients=unique) if kind == "src" else Match(destinations=tuple(map(word_of, unique)))

    # -- listeners and ways --------------------------------------------------------------------------------------------

    def do_http_port(self, line: Line, words: Sequence[str], tls: bool = False) -> None:
        place, *options = words
        host, _, port = place.rpartition(":")
        host = host.strip("[]") or "*"
        if host != "*":
            try:
                host = str(networks(line, host)[0].network_address)
            except ValueError:
                host = host_name(line, host)
        address = listen_address(host, number(line, port, "a port", 1, 65535))
        special = [one for one in options if one.partition("=")[0] in _OTHER_LISTENERS]
        if special:
            self.draft.less(line, f"a listener with {special[0]} is left out")
            return
        files = {key: value for key, _, value in (one.partition("=") for one in options)}
        certificate = files.get("tls-cert") or files.get("cert")
        if tls and not certificate:
            fail(line, "https_port needs tls-cert=FILE")
        if address in self.places:
            fail(line, f"two listeners must not have the same address, got {address} twice")
        self.places.add(address)
        listener = add_listener(self.draft, listen=address, speaks="http")
        if tls:
            listener.tls_certfile, listener.tls_keyfile = certificate, files.get("tls-key") or files.get("key")
            if "clientca" in files or "tls-ca" in files:
                listener.tls_client_ca = files.get("clientca") or files.get("tls-ca")
        elif options:
            self.draft.other(line, f"these options: {' '.join(options)}")

    def do_https_port(self, line: Line, words: Sequence[str]) -> None:
        self.do_http_port(line, words, tls=True)

    def do_tcp_outgoing_address(self, line: Line, words: Sequence[str]) -> None:
        if len(words) > 1:
            self.draft.other(line, "listeners have an address to connect from (external), rules have none")
            return
        try:
            self.external = str(networks(line, words[0])[0].network_address)
        except ValueError:
            fail(line, f"an address expected, got {words[0]!r}")

    external: str | None = None

    def do_cache_peer(self, line: Line, words: Sequence[str]) -> None:
        if len(words) < 4:
            fail(line, "cache_peer needs a host, a type and two ports")
        host, kind, port, _, *options = words
        if kind.lower() != "parent" or "originserver" in options:
            self.draft.other(line, "only proxies of the type parent are upstreams")
            return
        given = {key: value for key, _, value in (one.partition("=") for one in options)}
        try:
            where = str(networks(line, host)[0].network_address)
        except ValueError:
            where = host_name(line, host)
        login = given.get("login", "")
        user = ""
        if login and (login.startswith(("PASS", "NEGOTIATE", "*")) or ":" not in login):
            self.draft.other(line, "an upstream has a user and password of its own")
        elif login:
            name, _, password = map(unquote, login.replace("%%", "%25").partition(":"))
            user = f"{quote(name, safe='')}:{quote(password, safe='')}@"
        scheme = "https" if "tls" in options or "ssl" in options else "http"
        table = UpstreamTable(url=f"{scheme}://{user}{listen_address(where, number(line, port, 'a port', 1, 65535))}")
        table.resolve = "there"
        if scheme == "https":
            table.tls_ca, table.tls_name = given.get("tls-cafile") or given.get("sslcafile"), given.get("ssldomain")
        name = f"upstream-{len(self.peers) + 1}"
        self.peers[given.get("name", host)] = [name]
        self.draft.config.upstream[name] = table

    def do_cache_peer_access(self, line: Line, words: Sequence[str]) -> None:
        self.draft.more(line, "write rules.upstreams for this: here all requests go through the upstreams")

    def do_never_direct(self, line: Line, words: Sequence[str]) -> None:
        if list(words) == ["allow", "all"]:
            self.never_direct = True
        else:
            self.draft.other(line, "write rules.upstreams for this: here all requests go through the upstreams")

    # -- users ---------------------------------------------------------------------------------------------------------

    def do_auth_param(self, line: Line, words: Sequence[str]) -> None:
        scheme, *rest = words
        if scheme.lower() != "basic":
            self.draft.less(line, f"clients authenticate by Basic, not by {scheme}")
            return
        key, *values = rest or [""]
        if key == "program" and values:
            self.helper = values
        elif key == "children" and values:
            self.auth["processes"] = number(line, values[0], "children", 1, 1000)
        elif key == "credentialsttl" and values:
            self.auth["remember"] = seconds(line, values)
        else:
            self.draft.other(line)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, end: Line) -> None:
        draft = self.draft
        if not draft.config.listener:
            add_listener(draft, listen="127.0.0.1:3128", speaks="http")
            draft.less(end, "there is no http_port that can be used: it listens on 127.0.0.1:3128")
        if self.external is not None:
            for listener in draft.config.listener:
                listener.external = self.external
        draft.entries += self._entries()
        # The opposite of the last entry, or deny.
        close(draft, end, bool(self.access) and not self.access[-1][1])
        self._note_reverse_names()
        self._add_helper(end)
        draft.finish(challenges=True)
        self._go_through_peers(draft)

    def _note_reverse_names(self) -> None:
        for entry in self.draft.entries:
            conditions = [entry.match, *entry.excluded]
            if not entry.allow and any(one.destinations and not one.destinations[0][0].isdigit() for one in conditions):
                self.draft.more(entry.line, "squid also compares the reverse name of an address that a client asks for")
                return

    def _add_helper(self, end: Line) -> None:
        if not self.helper:
            return
        if shutil.which(self.helper[0]) is None:
            self.draft.stand_in(end, f"the program of auth_param is not on this host: auth.{AUTH}.command may name it")
            return
        table = self.draft.config.auth[AUTH] = AuthTable(command=self.helper)
        table.processes, table.remember = int(self.auth.get("processes", 5)), self.auth.get("remember", 60.0)

    def _go_through_peers(self, draft: Draft) -> None:
        if not self.peers:
            return
        members = [name for names in self.peers.values() for name in names]
        name = members[0]
        if len(members) > 1:
            name = "upstreams"
            draft.config.upstream[name] = UpstreamTable(members=members)
        draft.config.rules.upstreams = [f"through {name} any"]
        if not self.never_direct:
            draft.other(
                Line(draft.entries[-1].line.path, 1, "cache_peer ..."),
                "squid may also connect directly; here all requests go through the upstreams",
            )


def _nothing(line: Line) -> NoReturn:
    raise Unknown(f"{line}: an acl without values")


def _words(text: str) -> list[str]:
    """Return the words of a line; a comment may follow them, a word in quotes keeps these."""
    words: list[str] = []
    for word in text.split():
        if word.startswith("#"):
            break
        words.append(word)
    return words or [text]


def read_squid(draft: Draft, lines: Iterable[Line], read: Callable[[Line, str], Iterable[Line]]) -> None:
    """Make a configuration from the lines of a squid.conf.

    Args:
        read: returns the lines of another file that a line names, or of several by a pattern.

    Raises:
        ConfigError: it has a mistake.
    """
    reader = _Reader(draft, read)
    reader.finish(replace(reader.read(lines) or Line("squid.conf", 1, ""), text=""))
