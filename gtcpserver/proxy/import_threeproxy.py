"""3proxy.cfg(3), 3proxy 0.9, as a configuration of ours. The file is a script: a service has what comes before it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

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
    ports_of,
)
from .import_rules import ANY_USER, Entry, Line, Match, NotHere, word_of
from .import_threeproxy_ways import Access, Ways
from .passwords import hash_password
from .target import IPNetwork

SECRETS = frozenset({"users", "parent", "log"})

#: Services that are here, their names for listeners, and their default ports.
_SERVICES = {"proxy": ("http", 3128), "socks": ("socks", 1080), "auto": ("mixed", 8080)}

_NO_SERVICES = (
    "pop3p",
    "imapp",
    "smtpp",
    "ftppr",
    "admin",
    "dnspr",
    "tcppm",
    "udppm",
    "icqpr",
    "msnpr",
    "tlspr",
    "sslpr",
    "ppm",
)

#: Commands that are no matter of who may do what.
_OTHERS = {
    "archiver": "logrotate: log.file is reopened",
    "config": "",
    "daemon": "the service manager",
    "log": "log.file and log.style",
    "logdump": 'log.at = "both" logs the beginning of a tunnel, too',
    "logformat": "log.style",
    "monitor": "a reload (SIGHUP) reads the file again",
    "nolog": "",
    "nscache": "20,000 answers are kept",
    "nscache6": "20,000 answers are kept",
    "pidfile": "the option --pid-file",
    "rotate": "logrotate: log.file is reopened",
    "service": "",
    "setgid": "the option --worker-user",
    "setuid": "the option --worker-user",
    "stacksize": "",
    "chroot": "the service manager",
    "weight": "",
    "authcache": "a correct password is remembered for 60 s (auth.NAME.remember)",
    "dialer": "",
    "fakeresolve": 'resolve = "there" of an upstream',
    "force": "a reload (reload.end_forbidden)",
    "noforce": "a reload (reload.end_forbidden)",
    "filtermaxsize": "",
    "counter": "",
    "backlog": "the option --backlog",
    "maxseg": "",
    "writable": "",
    "system": "the service manager",
}

#: Operations of access lists, by what speaks them here.
_OPERATIONS = {
    "socks": {"CONNECT": "connect", "BIND": "bind", "UDPASSOC": "udp"},
    "http": {"HTTP_CONNECT": "connect", "HTTPS": "connect", "HTTP": "forward"},
}
_OPERATIONS["mixed"] = _OPERATIONS["socks"] | _OPERATIONS["http"]
_HTTP = frozenset({"HTTP_GET", "HTTP_PUT", "HTTP_POST", "HTTP_HEAD", "HTTP_OTHER"})
_ABSENT = frozenset(
    {
        "ICMPASSOC",
        "FTP_GET",
        "FTP_PUT",
        "FTP_LIST",
        "FTP_DATA",
        "FTP",
        "ADMIN",
        "DNSRESOLVE",
        "IM_ICQ",
        "IM_MSN",
        "POP3",
    }
)


class _Reader(Ways):
    def __init__(self, draft: Draft, read: Callable[[Line, str], Iterable[Line]]) -> None:
        super().__init__(draft)
        self.read_file = read
        self.access: list[Access] = []
        self.auth: list[str] = ["none"]
        self.users: dict[str, str] = {}
        self.internal = ""
        self.external: list[str] = []
        self.max_connections: int | None = None
        self.counts: list[tuple[Line, int]] = []
        self.ended = False
        self.entries: list[Entry] = []
        self.refused: list[Entry] = []

    def read(self, lines: Iterable[Line], depth: int = 0) -> Line | None:
        line = None
        for line in lines:
            text = line.text
            if self.ended or not text.strip() or text[0] in "# \t":
                continue
            line = replace(line, text=text.strip())
            check_encoding(line)
            words = self._words(line)
            key, rest = words[0].lower(), words[1:]
            if key == "include":
                if depth >= 8:
                    fail(line, "include must not be nested deeper than 8")
                self.read(self.read_file(line, self._first(line, rest)), depth + 1)
            elif key == "end":
                self.ended = True
            else:
                self._command(line, key, rest)
        return line

    def _words(self, line: Line) -> list[str]:
        """Return the words of a line. "" in quotes is a quote, and $FILE stands for the words of a file."""
        words = []
        for found in re.finditer(r'(\$?)"((?:[^"]|"")*)"|(\S+)', line.text):
            dollar, quoted, plain = found.groups()
            if plain is None and not dollar:
                words.append(quoted.replace('""', '"'))
            elif plain is None or plain.startswith("$"):
                for one in self.read_file(line, quoted if plain is None else plain[1:]):
                    check_encoding(one)
                    words += one.text.split()
            elif '"' in plain:
                fail(line, "a quote without its partner")
            else:
                words.append(plain)
        return words or [""]

    def _first(self, line: Line, words: Sequence[str]) -> str:
        if not words:
            fail(line, f"{line.text.split()[0]} needs a value")
        return words[0]

    def _command(self, line: Line, key: str, words: list[str]) -> None:
        directive = getattr(self, f"do_{key}", None)
        if key in _SERVICES:
            self._add_service(line, key, words)
        elif key in _NO_SERVICES:
            self.draft.less(line, f"there is no {key}")
        elif directive is not None:
            directive(line, words)
        elif key.startswith(("bandlim", "nobandlim")):
            self.draft.more(line, "limits.rate and limits.user_rate limit bytes a second")
        elif key.startswith(("count", "nocount")) and key != "counter":
            self.draft.more(line, "amounts of traffic are not limited")
        elif key in _OTHERS:
            self.draft.other(line, _OTHERS[key])
        else:
            self.draft.more(line, "this command is not known, nor what it restricts")

    # -- commands ------------------------------------------------------------------------------------------------------

    def do_allow(self, line: Line, words: list[str]) -> None:
        self.access.append(Access(line, True, words))

    def do_deny(self, line: Line, words: list[str]) -> None:
        self.access.append(Access(line, False, words))

    def do_flush(self, line: Line, words: list[str]) -> None:
        self.access = []

    def do_auth(self, line: Line, words: list[str]) -> None:
        self.auth = [word.lower() for word in words] or ["none"]
        for word in self.auth:
            if word not in ("none", "iponly", "strong", "cache", "useronly", "dnsname", "nbname"):
                self.draft.less(line, f"there is no authentication {word!r}: it is as strong")
            elif word in ("dnsname", "nbname"):
                self.draft.more(line, "names of clients are not looked up")
            elif word == "useronly":
                self.draft.less(line, "users have passwords here")

    def do_users(self, line: Line, words: list[str]) -> None:
        for word in words:
            name, _, rest = word.partition(":")
            kind, _, password = rest.partition(":")
            if kind.upper() == "CL" and name and password:
                self.users[name] = hash_password(password.encode())
            elif kind.upper() == "CR" and password.startswith(("$2", "$argon2")) and name:
                self.users[name] = password
            else:
                self.draft.less(line, f"the user {name[:40]!r} needs a password that is hashed with argon2 or bcrypt")

    def do_internal(self, line: Line, words: list[str]) -> None:
        self.internal = an_address(line, self._first(line, words))

    def do_external(self, line: Line, words: list[str]) -> None:
        address = an_address(line, self._first(line, words))
        same = [one for one in self.external if (":" in one) == (":" in address)]
        self.external = [one for one in self.external if one not in same]
        if address not in ("0.0.0.0", "::"):
            self.external.append(address)

    def do_maxconn(self, line: Line, words: list[str]) -> None:
        self.max_connections = number(line, self._first(line, words), "maxconn", 1)

    def do_connlim(self, line: Line, words: list[str]) -> None:
        self.draft.more(line, "limits.new_per_second and limits.client_connections limit clients")

    do_noconnlim = do_connlim

    def do_nserver(self, line: Line, words: list[str]) -> None:
        text = self._first(line, words)
        if text.lower().endswith("/tcp"):
            self.draft.other(line, "name servers are asked over UDP, and over TCP where that does not suffice")
            text = text[:-4]
        host, colon, port = text.rpartition(":") if text.count(":") == 1 or text.startswith("[") else (text, "", "")
        address = an_address(line, (host or text).strip("[]"))
        server = f"[{address}]" if ":" in address else address
        self.draft.config.resolver.servers.append(
            f"{server}:{number(line, port, 'a port', 1, 65535)}" if colon else server
        )

    def do_nsrecord(self, line: Line, words: list[str]) -> None:
        if len(words) != 2:
            fail(line, "nsrecord needs a name and an address")
        if words[1] in ("0.0.0.0", "::"):
            self.refused.append(Entry(line, False, Match(destinations=(host_name(line, words[0]),))))
        else:
            self.draft.other(line, "/etc/hosts is read")

    def do_timeouts(self, line: Line, words: list[str]) -> None:
        values = [number(line, word, "a time") for word in words]
        timeouts = self.draft.config.timeouts
        if len(values) > 3 and values[3]:
            timeouts.negotiate = float(values[3])
        if len(values) > 5 and values[5]:
            timeouts.idle = float(values[5])
        if len(values) > 6 and values[6]:
            self.draft.config.resolver.timeout = float(values[6])

    def do_parent(self, line: Line, words: list[str]) -> None:
        if not self.access or not self.access[-1].allow:
            fail(line, "parent must follow allow")
        if len(words) < 4:
            fail(line, "parent needs a weight, a type, an address and a port")
        self.access[-1].parents.append((line, words))

    def do_plugin(self, line: Line, words: list[str]) -> None:
        self.draft.more(line, "there are no plugins")

    # -- services ------------------------------------------------------------------------------------------------------

    def _add_service(self, line: Line, key: str, words: list[str]) -> None:
        speaks, port = _SERVICES[key]
        host, external, asks = self.internal, list(self.external), True
        for word in words:
            if word.startswith("-p") and word[2:]:
                port = number(line, word[2:], "-p", 1, 65535)
            elif word.startswith("-i"):
                host = an_address(line, word[2:])
            elif word.startswith("-e"):
                external = [one for one in (an_address(line, word[2:]),) if one not in ("0.0.0.0", "::")]
            elif word == "-u":
                asks = False
            elif re.fullmatch(r"-(n1?|u2|a1?|4|46|64|6|d|t|l.*|c.*|s.*|N.*|b\d+|\w*)", word) and not word.startswith(
                ("-r", "-R")
            ):
                self.draft.other(line, f"the option {word[:40]}")
            else:
                self.draft.less(line, f"a service with {word[:40]} is left out")
                return
        names = [listener.name for listener in self.draft.config.listener]
        name = next(one for one in (key, *(f"{key}-{count}" for count in range(2, 10_000))) if one not in names)
        host = "*" if host in ("", "0.0.0.0") else host
        address = listen_address(host, port)
        if address in [listener.listen for listener in self.draft.config.listener]:
            fail(line, f"two services must not have the same address, got {address} twice")
        listener = add_listener(self.draft, name=name, listen=address, speaks=speaks, external=external or "auto")
        if self.max_connections is not None:
            self.counts.append((line, self.max_connections))
        self.entries += self._entries(line, listener.name, speaks, asks)

    def _entries(self, line: Line, name: str, speaks: str, asks: bool) -> Iterator[Entry]:
        here = Match(listener=name)
        if "none" in self.auth:
            yield Entry(line, True, here, upstream="direct")
            return
        strong = asks and any(word not in ("iponly", "dnsname", "nbname", "cache") for word in self.auth)
        always = strong and "iponly" not in self.auth and "dnsname" not in self.auth
        for access in self.access:
            for entry in self._matches(access, speaks):
                match = replace(entry.match, listener=name)
                if match.users is not None and not strong:
                    # Nobody has a name here.
                    continue
                if always and match.users is None and access.allow:
                    match = replace(match, users=ANY_USER)
                yield replace(entry, match=match, upstream=self.way(access) if access.allow else None)
        yield Entry(line, not self.access, replace(here, users=ANY_USER if always and not self.access else None))
        if not self.access:
            yield Entry(line, False, here)

    def _matches(self, access: Access, speaks: str) -> Iterator[Entry]:
        lists = ["" if word == "*" else word for word in access.words] + [""] * 7
        users, sources, targets, ports, operations, days, times = lists[:7]
        line = access.line
        try:
            if days or times:
                raise NotHere("times are no conditions of rules")
            match = Match(
                clients=self._sources(line, sources),
                users=tuple(dict.fromkeys(users.split(","))) if users else None,
                ports=ports_of(line, ports.split(",")) if ports else None,
                commands=self._operations(line, operations, speaks),
            )
            if match.commands == frozenset():
                return
            yield from self._targets(access, targets, match)
        except NotHere as why:
            self.draft.left_out(line, access.allow, str(why))

    def _sources(self, line: Line, text: str) -> tuple[IPNetwork, ...] | None:
        found: list[IPNetwork] = []
        for word in text.split(",") if text else ():
            try:
                found += networks(line, word)
            except ValueError:
                fail(line, f"an address, a range or a network expected, got {word[:80]!r}")
        return tuple(dict.fromkeys(found)) or None

    def _operations(self, line: Line, text: str, speaks: str) -> frozenset[str] | None:
        if not text:
            return None
        words = {word.upper() for word in text.split(",")}
        known, found = _OPERATIONS[speaks], set()
        if words >= _HTTP:
            words = words - _HTTP | {"HTTP"}
        for word in words:
            if word in known:
                found.add(known[word])
            elif word in _HTTP:
                if speaks != "socks":
                    raise NotHere("methods of HTTP are no conditions of rules, CONNECT is")
            elif word not in _ABSENT and word not in _OPERATIONS["mixed"]:
                fail(line, f"there is no operation {word[:40]!r}")
        return frozenset(found)

    def _targets(self, access: Access, text: str, match: Match) -> Iterator[Entry]:
        """Yield the entries for a list of networks and names, which may have an asterisk at either end."""
        line, allow = access.line, access.allow
        found: list[str] = []
        tops: list[str] = []
        for word in text.split(",") if text else ():
            try:
                found += map(word_of, networks(line, word))
                continue
            except ValueError:
                name = word.removeprefix("*")
            if "*" in name or not name.strip("."):
                self.draft.left_out(line, allow, f"names have no patterns but .domain: {word[:80]}")
                continue
            if word.startswith("*") and not name.startswith("."):
                self.draft.left_out(
                    line, allow, f"{word[:80]} is .{name[:80]} here, other names that end so are not meant"
                )
                name = f".{name}"
            elif word.startswith("*") and allow:
                tops.append(host_name(line, name[1:]))  # which the pattern does not have
            found.append(host_name(line, name))
        if tops:
            yield Entry(line, False, replace(match, destinations=tuple(tops)))
        if found or not text:
            yield Entry(line, allow, replace(match, destinations=tuple(dict.fromkeys(found)) or None))

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, end: Line) -> None:
        draft = self.draft
        if not draft.config.listener:
            fail(end, "there is no proxy and no socks: is this a 3proxy.cfg?")
        if self.users:
            draft.add_users(self.users)
        if self.counts:
            if len(draft.config.listener) == 1:
                draft.config.limits.connections = self.counts[0][1]
            else:
                draft.config.limits.connections = sum(most for _, most in self.counts)
                draft.more(self.counts[0][0], "limits.connections is for all listeners together")
        draft.entries += [*self.refused, *self.entries]
        if not any(entry.upstream not in (None, "direct") for entry in draft.entries):
            draft.entries = [replace(entry, upstream=None) for entry in draft.entries]
        close(draft, end, False)
        draft.finish()


def read_threeproxy(draft: Draft, lines: Iterable[Line], read: Callable[[Line, str], Iterable[Line]]) -> None:
    """Make a configuration from the lines of a 3proxy.cfg.

    Args:
        read: returns the lines of another file that a line names.

    Raises:
        ConfigError: it has a mistake.
    """
    reader = _Reader(draft, read)
    reader.finish(replace(reader.read(lines) or Line("3proxy.cfg", 1, ""), text=""))
