"""danted.conf(5), Dante 1.4, as a configuration of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from .import_danted_words import Block, Place, host_and_port, is_address, place_of
from .import_draft import Draft, add_listener, check_encoding, close, fail, host_name, listen_address, networks, number
from .import_rules import Entry, Line, Match, NotHere, both, ports_text, word_of
from .settings import UpstreamTable

SECRETS: frozenset[str] = frozenset()

#: Settings that are no matter of who may do what.
_OTHERS = (
    "logoutput", "errorlog", "debug", "user", "compatibility", "extension", "cpu", "internal.log", "external.log",
    "internal.protocol", "external.protocol", "clientmethod", "child", "resolveprotocol", "udp.connectdst",
    "timeout.tcp_fin_wait", "external.rotation", "internal.socket", "external.socket", "internal.tcp", "external.tcp",
    "internal.udp", "external.udp", "internal.ip", "external.ip", "method",
)  # fmt: skip

#: Of a rule: actions, which restrict nothing.
_ACTIONS = ("log", "libwrap", "timeout", "tcp_fin_wait", "clientcompatibility", "gssapi", "pam", "bsdauth", "redirect",
            "udp", "internal", "external")  # fmt: skip

_PASSWORD = frozenset({"username", "pam", "pam.username", "pam.any", "bsdauth"})

_COMMANDS = {"connect": "connect", "bind": "bind", "udpassociate": "udp"}
_PROTOCOLS = {"tcp": frozenset(["connect", "bind"]), "udp": frozenset(["udp"])}
_ALL = frozenset(_COMMANDS.values())

_TOKEN = re.compile(r'"[^"]*"|[{}]|[^\s{}"]+')

#: A key in front of its first word; not an IPv6 address.
_KEY = re.compile(r"(?i)(from|to|via|command|log|protocol|proxyprotocol|\w*method|user|group|port):(.+)")
_BLOCK = re.compile(r"(?i)(client|socks|hostid)?\s*(pass|block)$|(route|monitor)$")


class _Reader:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.methods: list[str] | None = None
        self.internal: list[tuple[Line, str, int]] = []
        self.external: list[str] = []
        self.client: list[Block] = []
        self.socks: list[Block] = []
        self.routes: list[Block] = []
        self.block: Block | None = None
        self.head: list[str] = []
        self.key = ""
        self.rotation = "none"

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, line: Line) -> None:
        text = _without_comment(line.text)
        if not text:
            return
        line = Line(line.path, line.number, text)
        check_encoding(line)
        # A setting is a line: "name: words". Braces and what is in them may be on several.
        if self.block is None and not self.head and ":" in text and "{" not in text.partition(":")[0]:
            key, _, value = text.partition(":")
            self._setting(line, key.strip().lower(), value.split())
            return
        for token in _TOKEN.findall(text):
            found = _KEY.fullmatch(token)
            for word in (f"{found[1]}:", found[2]) if found else (token,):
                self._take(line, word)

    def _take(self, line: Line, token: str) -> None:
        if token == "{":
            kind = " ".join(self.head).lower()
            if self.block is not None or not _BLOCK.fullmatch(kind):
                fail(line, f"a rule expected before the brace, got {kind[:80]!r}")
            # "pass" alone is that of socks, as it was before 1.4.
            self.block, self.head, self.key = (
                Block(line, kind if " " in kind or kind in ("route", "monitor") else f"socks {kind}"),
                [],
                "",
            )
        elif token == "}":
            if self.block is None:
                fail(line, "a closing brace without an opening one")
            self._end_block(self.block)
            self.block = None
        elif self.block is None:
            if len(self.head) > 3:
                fail(line, f"a setting or a rule expected, got {' '.join(self.head)[:80]!r}")
            self.head.append(token)
            self.head_line = line
        elif token.endswith(":") and token != ":":
            self.key = token[:-1].lower()
            if self.key in ("from", "to", "via") and self.key in self.block.keys:
                fail(line, f"{self.key} twice in one rule")
            self.block.keys.setdefault(self.key, [])
        elif token == ":" and self.key and self.block.keys.get(self.key):
            # "from : any": the word before the colon is a key.
            word = self.block.keys[self.key].pop()
            self.key = word.lower()
            self.block.keys.setdefault(self.key, [])
        elif not self.key:
            self.key = token.lower()
            self.block.keys.setdefault(self.key, [])
        elif token != ":":
            self.block.keys[self.key].append(token.strip('"'))

    def _end_block(self, block: Block) -> None:
        if block.kind.startswith("client"):
            self.client.append(block)
        elif block.kind.startswith("socks"):
            self.socks.append(block)
        elif block.kind == "route":
            self.routes.append(block)
        elif block.kind == "monitor":
            self.draft.other(block.line, "monitors only log")
        else:
            self.draft.left_out(block.line, block.allow, "there are no host identities")

    def _setting(self, line: Line, key: str, words: Sequence[str]) -> None:
        if key in ("socksmethod", "method"):
            self.methods = [word.lower() for word in words]
        elif key == "internal":
            host, port = host_and_port(line, words)
            self.internal.append((line, host, port))
        elif key == "external":
            self._add_external(line, words)
        elif key == "external.rotation":
            self.rotation = words[0].lower() if words else "none"
        elif key in ("timeout.negotiate", "timeout.connect", "timeout.io", "timeout.io.tcp", "timeout.io.udp"):
            self._set_timeout(line, key, words)
        elif key == "srchost":
            for word in words:
                if word.lower() != "checkreplyauth":
                    self.draft.more(line, "names of clients are not looked up")
        elif key == "libwrap.hosts_access":
            if [word.lower() for word in words] != ["no"]:
                self.draft.more(line, "hosts.allow and hosts.deny are not read")
        elif any(key == one or key.startswith(f"{one}.") for one in _OTHERS):
            self.draft.other(line, "the option --worker-user, or the service manager" if key.startswith("user") else "")
        else:
            self.draft.more(line, "this setting is not known, nor what it restricts")

    def _set_timeout(self, line: Line, key: str, words: Sequence[str]) -> None:
        seconds = number(line, words[0] if words else "", key)
        timeouts = self.draft.config.timeouts
        if key == "timeout.negotiate":
            if seconds:
                timeouts.negotiate = float(seconds)
            else:
                self.draft.other(line, "negotiation always has an end")
        elif key == "timeout.connect":
            timeouts.connect = float(seconds) or 120.0
        elif key == "timeout.io.udp":
            self.draft.other(line, "timeouts.idle is for TCP and UDP")
        else:
            timeouts.idle = float(seconds) or None

    def _add_external(self, line: Line, words: Sequence[str]) -> None:
        try:
            address = str(networks(line, words[0] if words else "")[0].network_address)
        except ValueError:
            self.draft.other(line, 'an address expected, not an interface: external = "auto"')
            return
        if any((":" in one) == (":" in address) for one in self.external):
            self.draft.other(line, "external has one address of each family")
        else:
            self.external.append(address)

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _client_entries(self) -> Iterator[Entry]:
        for block in self.client:
            try:
                match = self._of_client(block, block.keys.get("from", []), "a client")
                to = place_of(block.line, block.keys.get("to") or ["0/0"])
                self._check_listener(block, to)
                self._check_keys(block, ("from", "to", "port"))
                yield Entry(block.line, block.allow, match)
            except NotHere as why:
                self.draft.left_out(block.line, block.allow, str(why))

    def _check_listener(self, block: Block, to: Place) -> None:
        if to.name is not None or to.ports is not None:
            raise NotHere("client rules name listeners, not addresses")
        if to.networks is not None and any(network.prefixlen for network in to.networks):
            raise NotHere("client rules name listeners, not addresses")

    def _of_client(self, block: Block, words: Sequence[str], what: str) -> Match:
        place = place_of(block.line, words or ["0/0"])
        if place.ports not in (None, ((1, 65535),)):
            raise NotHere(f"the port of {what} is no condition of rules")
        if place.name is not None:
            raise NotHere(f"{what} is known by its address, not by a name or an interface")
        return Match(clients=place.networks)

    def _check_keys(self, block: Block, known: Sequence[str]) -> None:
        for key, words in block.keys.items():
            first = key.partition(".")[0]
            if key in known or (first in _ACTIONS and key != "libwrap"):
                continue
            if key == "libwrap":
                self.draft.other(block.line, "no program is run")
            elif key == "proxyprotocol":
                if {word.lower() for word in words} < {"socks_v4", "socks_v5"}:
                    raise NotHere("the version of SOCKS is no condition of rules")
            elif key == "clientmethod" and {word.lower() for word in words} == {"none"}:
                continue
            elif key in ("bandwidth", "session") or first in ("bandwidth", "session"):
                self.draft.more(block.line, f"limits are for all clients, not for a rule: {key}")
            else:
                raise NotHere(f"{key} is no condition of rules")

    def _socks_entries(self) -> Iterator[Entry]:
        for block in self.socks:
            try:
                yield from self._of_rule(block)
            except NotHere as why:
                self.draft.left_out(block.line, block.allow, str(why))

    def _of_rule(self, block: Block) -> Iterator[Entry]:
        commands = self._commands(block)
        if not commands:
            return
        methods = block.keys.get("socksmethod", block.keys.get("method"))
        known = ("from", "to", "port", "command", "protocol", "socksmethod", "method", "user")
        self._check_keys(block, known)
        match = self._of_client(block, block.keys.get("from", []), "a client")
        to = place_of(block.line, block.keys.get("to") or ["0/0"])
        destinations = None if to.networks is None else tuple(map(word_of, to.networks))
        if to.name is not None:
            destinations = self._named(block, to.name)
        found = Match(
            match.clients,
            self._users(block, methods),
            destinations,
            to.ports,
            None if commands == _ALL else commands,
        )
        yield Entry(block.line, block.allow, found)

    def _named(self, block: Block, name: str) -> tuple[str, ...]:
        if re.fullmatch(r"lo\d*", name):
            return ("127.0.0.0/8", "::1")
        if "." not in name:
            raise NotHere(f"addresses of an interface ({name[:40]}) are no condition of rules")
        if not block.allow:
            self.draft.more(block.line, "danted also compares the addresses of this name")
        return (host_name(block.line, name),)

    def _commands(self, block: Block) -> frozenset[str]:
        """Return the commands that a rule is about; none: it is about replies alone."""
        words = [word.lower() for word in block.keys.get("command", [])]
        allowed = frozenset[str]()
        for word in block.keys.get("protocol", ["tcp", "udp"]):
            if word.lower() not in _PROTOCOLS:
                fail(block.line, f"protocol must be tcp or udp, got {word[:40]!r}")
            allowed |= _PROTOCOLS[word.lower()]
        for word in words:
            if word not in _COMMANDS and word not in ("bindreply", "udpreply"):
                fail(block.line, f"there is no command {word[:40]!r}")
        commands = frozenset(_COMMANDS[word] for word in words if word in _COMMANDS) if words else _ALL
        if not block.allow and {"bindreply", "udpreply"}.intersection(words):
            self.draft.more(block.line, "replies to BIND and UDP ASSOCIATE are let through")
        elif block.allow and not commands:
            self.draft.other(block.line, "replies to BIND and UDP ASSOCIATE need no rule")
        return commands & allowed

    def _users(self, block: Block, methods: Sequence[str] | None) -> tuple[str, ...] | None:
        names = tuple(dict.fromkeys(block.keys.get("user", [])))
        if names:
            return names
        if not block.allow and methods is None:
            return None
        chosen = [word.lower() for word in methods] if methods is not None else self.methods or []
        if not chosen:
            raise NotHere("there is no socksmethod, without which danted refuses everybody")
        if "none" in chosen:
            return None
        if not _PASSWORD.intersection(chosen):
            raise NotHere(f"clients authenticate by password or certificate, not by {', '.join(chosen)[:80]}")
        return ()

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, end: Line) -> None:
        draft = self.draft
        if self.block is not None:
            fail(self.block.line, "this rule has no closing brace")
        if self.head:
            fail(self.head_line, f"a setting or a rule expected, got {' '.join(self.head)[:80]!r}")
        self._add_listeners(end)
        admitted = [*self._client_entries(), Entry(end, False)]
        rules = [*self._socks_entries(), Entry(end, False)]
        draft.entries += _joined(admitted, rules)
        close(draft, end, False)
        self._drop_commands_without_replies()
        draft.finish()
        draft.config.rules.upstreams = list(self._ways())

    def _add_listeners(self, end: Line) -> None:
        draft = self.draft
        external = {"same-same": "same", "route": "system"}.get(self.rotation) or self.external or "auto"
        for line, host, port in self.internal:
            if host != "*" and not is_address(host):
                draft.less(line, f"it listens on 127.0.0.1: give listen an address of {host[:40]}")
                host = "127.0.0.1"
            address = listen_address("*" if host == "0.0.0.0" else host, port)
            if address not in [listener.listen for listener in draft.config.listener]:
                add_listener(draft, listen=address, speaks="socks", external=external)
        if not self.internal:
            draft.less(end, "there is no internal: it listens on 127.0.0.1:1080")
            add_listener(draft, speaks="socks", external=external)
        for listener in draft.config.listener:
            listener.commands = ["connect", "bind", "udp"]

    def _drop_commands_without_replies(self) -> None:
        """Turn off BIND and UDP, if no rule lets the replies through."""
        words = [[word.lower() for word in block.keys.get("command", [])] for block in self.socks if block.allow]
        for command, reply in (("bind", "bindreply"), ("udp", "udpreply")):
            if words and not any(not one or reply in one for one in words):
                for listener in self.draft.config.listener:
                    listener.commands = [one for one in listener.commands if one != command]

    def _ways(self) -> Iterator[str]:
        for place, block in enumerate(self.routes, 1):
            try:
                yield from self._way(block, f"upstream-{place}")
            except NotHere as why:
                self.draft.more(block.line, f"these connections take another way: {why}")

    def _way(self, block: Block, name: str) -> Iterator[str]:
        self._check_keys(
            block,
            ("from", "to", "via", "port", "protocol", "command", "proxyprotocol", "method", "socksmethod", "extension"),
        )
        if not block.keys.get("via"):
            fail(block.line, "a route needs via")
        clients = self._of_client(block, block.keys.get("from", []), "a client").clients
        to = place_of(block.line, block.keys.get("to") or ["0/0"])
        destinations = ("any",) if to.networks is None else tuple(map(word_of, to.networks))
        if to.name is not None:
            if "." not in to.name:
                raise NotHere("an interface is no destination of rules")
            destinations = (host_name(block.line, to.name),)
        if block.keys["via"][0].lower() == "direct":
            name = "direct"
        else:
            host, port = host_and_port(block.line, block.keys["via"])
            if not is_address(host):
                host = host_name(block.line, host)
            protocols = {word.lower() for word in block.keys.get("proxyprotocol", [])} or {"socks_v5"}
            scheme = (
                "socks5"
                if "socks_v5" in protocols
                else "http"
                if "http" in protocols or "http_v1.0" in protocols
                else "socks4"
            )
            if {"username", "gssapi"}.intersection(block.keys.get("method", block.keys.get("socksmethod", []))):
                self.draft.other(block.line, "an upstream has a user and password of its own")
            self.draft.config.upstream[name] = UpstreamTable(url=f"{scheme}://{listen_address(host, port)}")
        for client in map(word_of, clients) if clients else ("any",):
            for destination in destinations:
                where = f"[{destination}]" if ":" in destination else destination

                yield f"through {name} from {client} to {where}{ports_text(to.ports)}"


def _joined(admitted: Sequence[Entry], rules: Sequence[Entry]) -> Iterator[Entry]:
    """Yield one list: those of a client rule that blocks are denied, to the others the rules apply."""
    for entry in admitted:
        if not entry.allow:
            yield entry
            continue
        for rule in rules:
            match = both(entry.match, rule.match)
            if match is not None:
                yield Entry(rule.line, rule.allow, match)


def _without_comment(text: str) -> str:
    return re.sub(r"#.*", "", text).strip()


def read_danted(draft: Draft, lines: Iterable[Line], read: Callable[[Line, str], Iterable[Line]]) -> None:
    """Make a configuration from the lines of a danted.conf. Raise ConfigError."""
    reader = _Reader(draft)
    line = Line("danted.conf", 1, "")
    for line in lines:
        reader.read(line)
    reader.finish(replace(line, text=""))
