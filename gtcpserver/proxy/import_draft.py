"""A configuration of ours that is made from another proxy's, and what it does not have of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any, Literal, NoReturn

from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import read_file
from gtcpserver.networks import parse_network

from .config_text import config_text
from .errors import BadTarget
from .import_rules import Entry, Line, Match, Ports, make_rules, without_exceptions
from .passwords import hash_password
from .settings import AuthTable, ListenerTable, ProxyConfig
from .target import IPNetwork, canonical_name

#: The authenticator of an imported configuration.
AUTH = "users"

#: A user that stands for those who are not in the file: nobody knows the password.
STAND_IN = "replace-this-user"

#: Longest text of a line that a comment repeats.
MOST_SHOWN = 160

#: "more": this file allows more; "less": it allows less; "other": no matter of access.
Kind = Literal["more", "less", "other"]

_TITLES: dict[Kind, str] = {
    "more": "RESTRICTIONS OF THE ORIGINAL THAT THIS FILE DOES NOT HAVE:",
    "less": "What the original allows, and this file does not:",
    "other": "No equivalent, and no matter of who may do what:",
}


def fail(line: Line, message: str) -> NoReturn:
    """Raise ConfigError, with the place."""
    raise ConfigError(f"{line}: {message}")


@dataclass(slots=True)
class Draft:
    """What is being made.

    Attributes:
        secrets: words that lines of passwords begin with: comments do not repeat the others.
    """

    secrets: frozenset[str] = frozenset()
    config: ProxyConfig = field(default_factory=ProxyConfig)
    entries: list[Entry] = field(default_factory=list)
    notes: dict[tuple[Kind, Line, str], None] = field(default_factory=dict)

    def more(self, line: Line, why: str) -> None:
        """Note a restriction that is not there any more."""
        self.notes[("more", line, why)] = None

    def less(self, line: Line, why: str) -> None:
        """Note something that is not allowed any more."""
        self.notes[("less", line, why)] = None

    def other(self, line: Line, why: str = "") -> None:
        """Note a line that has no equivalent."""
        self.notes[("other", line, why)] = None

    def left_out(self, line: Line, allow: bool, why: str) -> None:
        """Note an entry of an access list that cannot be expressed."""
        (self.less if allow else self.more)(line, why)

    @property
    def differs(self) -> list[str]:
        """Return a message for each difference in who may do what."""
        words = {"more": "a restriction is missing", "less": "allows less"}
        return [
            f"{line}: {words[kind]}: {why} ({self._shown(line)})" for kind, line, why in self.notes if kind != "other"
        ]

    def add_users(self, users: dict[str, str]) -> None:
        """Add users, with hashed passwords."""
        self.config.auth.setdefault(AUTH, AuthTable(users={})).users.update(users)

    def stand_in(self, line: Line, why: str) -> None:
        """Add a user in place of those that the original knows from elsewhere."""
        if AUTH not in self.config.auth:
            self.add_users({STAND_IN: hash_password(secrets.token_bytes(16))})
            self.less(line, why)

    def finish(self, challenges: bool = False) -> None:
        """Make the rules; the last entry must apply to everything."""
        entries = without_exceptions(self.entries, self.less)
        about_users = [entry for entry in entries if entry.match.users is not None]
        if about_users and AUTH not in self.config.auth:
            self.stand_in(about_users[0].line, "the users are not in this file: add them to [auth.users]")
        rules = make_rules(entries, AUTH, self.less, self.more, challenges=challenges)
        self.set_rules(rules.clients, rules.destinations, rules.upstreams)

    def set_rules(self, clients: list[str], destinations: list[str], upstreams: list[str]) -> None:
        rules = self.config.rules
        rules.clients, rules.destinations, rules.upstreams = clients, destinations, upstreams
        everybody = ("from any to", "from 0.0.0.0/0 to", "from ::/0 to")
        # It was open, too. Those on a loopback address are refused by nothing.
        self.config.allow_open = any(
            "with auth" not in rule and any(one in rule for one in everybody) and rule.startswith("allow")
            for rule in clients
        )

    def text(self, path: str) -> str:
        """Return the file, with its comments."""
        lines = [f'From {shown(path)}, by "gtcpserver proxy import".']
        if any("@" in (table.url or "") for table in self.config.upstream.values()):
            lines.append("It contains a password: keep the file from others (mode 600).")
        if self.config.allow_open:
            lines.append("IT SERVES EVERYBODY WITHOUT A PASSWORD, as the original does: see allow_open.")
        if any(rule.startswith("allow ") for rule in self.config.rules.destinations or ()):
            lines += [
                "Private, loopback and other special addresses, and this host, are only open to rules that name them:",
                'if clients need them, put rules such as "allow private" where they belong.',
            ]
        for kind, title in _TITLES.items():
            notes = [(line, why) for one, line, why in self.notes if one == kind]
            if notes:
                lines += ["", title]
            for line, why in notes:
                lines.append(f"  {line}: {self._shown(line)}")
                lines += [f"    {why}"] * bool(why)
        comment = "".join(f"# {shown(line, 400)}".rstrip() + "\n" for line in lines)
        return f"{comment}\n{config_text(self.config)}"

    def _shown(self, line: Line) -> str:
        if not line.text.strip():
            return "the end of the file"
        first = line.text.split(None, 1)[0].lower()
        return f"{first} ..." if first in self.secrets else shown(line.text)


def shown(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text for a comment or message: one line, without control characters, not too long."""
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text.replace("\t", " "))
    return text if len(text) <= most else f"{text[: most - 3]}..."


# -- reading -----------------------------------------------------------------------------------------------------------


def read_lines(path: str, shown_as: str | None = None) -> Iterator[Line]:
    """Read the lines of a file. Raise ConfigError: it cannot be read."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ConfigError(f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}") from None
    return split_lines(data, path if shown_as is None else shown_as)


def split_lines(data: bytes, path: str) -> Iterator[Line]:
    for number, text in enumerate(data.split(b"\n"), 1):
        # Comments may be in any encoding; `check_encoding` is for the others.
        yield Line(path, number, text.decode("utf-8", "surrogateescape").rstrip("\r"))


def check_encoding(line: Line) -> None:
    try:
        line.text.encode()
    except UnicodeEncodeError:
        fail(line, "must be UTF-8")
    if "\0" in line.text:
        fail(line, "must be text, has a zero byte")


def number(line: Line, text: str, what: str, least: int = 0, most: int = 2**31) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        fail(line, f"{what} must be a number from {least} to {most}, got {shown(text)!r}")
    return int(text)


def port_range(line: Line, text: str) -> tuple[int, int]:
    """Parse "80" or "8000-8999". Port 0, which no client can ask for, is port 1."""
    first, dash, last = text.partition("-")
    low, high = number(line, first, "a port", 0, 65535), number(line, last if dash else first, "a port", 0, 65535)
    if low > high:
        fail(line, f"the lower port must come first, got {shown(text)!r}")
    return max(low, 1), max(high, 1)


def ports_of(line: Line, words: Sequence[str]) -> Ports:
    return tuple(sorted({port_range(line, word) for word in words}))


def networks(line: Line, text: str) -> tuple[IPNetwork, ...]:
    """Parse an address, a network (also with a mask in the place of bits), or a range of addresses.

    Raises:
        ValueError: it is none of them.
    """
    low, dash, high = text.partition("-")
    if not dash:
        return (parse_network(str(ip_network(text, strict=False))),)
    high, _, mask = high.partition("/")
    low = low.partition("/")[0]
    if mask not in ("", "32", "128", "255.255.255.255"):
        # The whole networks from the first to the last.
        low = str(ip_network(f"{low}/{mask}", strict=False)[0])
        high = str(ip_network(f"{high}/{mask}", strict=False)[-1])
    first: Any = ip_address(low)
    last: Any = ip_address(high)
    try:
        found = tuple(parse_network(str(one)) for one in summarize_address_range(first, last))
    except TypeError:
        raise ValueError("both ends of a range must be of one family") from None
    return found


def an_address(line: Line, text: str) -> str:
    """Check that a text is one address, and return it in its usual form."""
    try:
        (network,) = networks(line, text)
        if network.num_addresses != 1:
            raise ValueError
    except ValueError:
        fail(line, f"an address expected, got {text[:80]!r}")
    return str(network.network_address)


def host_name(line: Line, text: str) -> str:
    """Return a name, or a domain with a leading dot, as in our rules."""
    dot = "." * text.startswith(".")
    try:
        return dot + canonical_name(text[len(dot) :]).removesuffix(".")
    except BadTarget as error:
        fail(line, f"a host name expected, got {shown(text)!r} ({error})")


def listen_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def add_listener(draft: Draft, **fields: Any) -> ListenerTable:
    draft.config.listener.append(ListenerTable(**fields))
    return draft.config.listener[-1]


def close(draft: Draft, line: Line, allow: bool) -> None:
    """Add the entry for what no other one applies to."""
    draft.entries.append(Entry(line, allow, Match()))
