"""Parents of 3proxy: the proxies that lead on from an entry of an access list, as upstreams of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from .import_draft import Draft, host_name, listen_address, networks, number
from .import_rules import Line
from .settings import UpstreamTable

_TYPES = {"socks5": "socks5", "socks5+": "socks5", "socks4": "socks4", "socks4+": "socks4a", "connect": "http",
          "connect+": "http", "http": "http", "socks5b": "socks5", "socks4b": "socks4"}  # fmt: skip


@dataclass(slots=True)
class Access:
    """An entry of an access list, with the proxies that lead on from it."""

    line: Line
    allow: bool
    words: list[str]
    parents: list[tuple[Line, list[str]]] = field(default_factory=list)


class Ways:
    """The upstreams of entries."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self._chains: dict[int, str] = {}

    def way(self, access: Access) -> str:
        """Return the upstream of an entry."""
        if not access.parents:
            return "direct"
        if id(access) not in self._chains:
            self._chains[id(access)] = self._chain(access)
        return self._chains[id(access)]

    def _chain(self, access: Access) -> str:
        through: str | None = None
        groups = self._groups(access)
        for place, (line, group) in enumerate(groups, 1):
            members = [self._upstream(one, words, through) for one, words in group]
            kept = [(name, weight) for name, weight in members if name is not None]
            if len(kept) < len(members):
                return "direct"
            name = kept[0][0]
            if len(kept) > 1:
                if place < len(groups):
                    self.draft.more(line, "a group must be the last of a chain: these connections take another way")
                    continue
                name = f"group-{len(self.draft.config.upstream) + 1}"
                table = UpstreamTable(members=[one for one, _ in kept], strategy="round-robin")
                table.weights = [weight for _, weight in kept]
                self.draft.config.upstream[name] = table
            through = name
        return through or "direct"

    def _groups(self, access: Access) -> list[tuple[Line, list[tuple[Line, list[str]]]]]:
        """Return the groups of a chain: their weights make up 1000."""
        groups: list[tuple[Line, list[tuple[Line, list[str]]]]] = []
        left = 0
        for line, words in access.parents:
            weight = number(line, words[0], "a weight", 1, 1000)
            if left <= 0:
                groups.append((line, []))
                left = 1000
            groups[-1][1].append((line, words))
            left -= weight
        return groups

    def _upstream(self, line: Line, words: Sequence[str], through: str | None) -> tuple[str | None, int]:
        weight, kind, host, port, *credentials = words
        kind = kind.lower()
        if kind not in _TYPES or host in ("0.0.0.0", "0", "::") or port == "0":
            self.draft.more(line, "no upstream of ours: these connections are direct")
            return None, 0
        try:
            host = str(networks(line, host)[0].network_address)
        except ValueError:
            host = host_name(line, host)
        userinfo = ""
        if credentials and credentials[0] == "*":
            self.draft.other(line, "an upstream has a user and password of its own")
        elif credentials:
            password = (
                f":{quote(credentials[1], safe='')}" if len(credentials) > 1 and _TYPES[kind][:6] != "socks4" else ""
            )
            userinfo = f"{quote(credentials[0], safe='')}{password}@"
        name = f"upstream-{len(self.draft.config.upstream) + 1}"
        self.draft.config.upstream[name] = UpstreamTable(
            url=f"{_TYPES[kind]}://{userinfo}{listen_address(host, number(line, port, 'a port', 1, 65535))}",
            through=through,
            resolve="there" if kind.endswith("+") else "here",
        )
        return name, number(line, weight, "a weight", 1, 1000)
