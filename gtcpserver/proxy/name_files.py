"""The files that say how names are looked up: resolv.conf(5), hosts(5), nsswitch.conf(5)."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from time import monotonic
from typing import Any, Generic, TypeVar

import gevent
from gevent.lock import Semaphore

from gtcpserver.connection.connect import MOST_ADDRESSES

from .errors import BadTarget
from .target import LONGEST_NAME, IPAddress, canonical_name, unmapped

RESOLV_CONF = "/etc/resolv.conf"
HOSTS = "/etc/hosts"
NSSWITCH_CONF = "/etc/nsswitch.conf"

#: Seconds until a file is checked for changes again. glibc checks resolv.conf with each lookup.
CHECK_EVERY = 1.0

#: As glibc (resolv.h: MAXNS, RES_MAXNDOTS, RES_MAXRETRANS, RES_MAXRETRY) and Kubernetes (search domains).
MOST_SERVERS = 3
MOST_NDOTS = 15
MOST_TIMEOUT = 30
MOST_ATTEMPTS = 5
MOST_SEARCHED = 32

#: Lines of a hosts file parsed without a pause, 3 us each. Blocklists of advertisers have 200,000: parsed at once, they
#: hold up all other clients for 0.7 s.
LINES_AT_ONCE = 1000

#: Services of nsswitch.conf that find nothing which hosts and DNS do not have: `resolve` (systemd-resolved) is a name
#: server, too, and `myhostname` knows the names of this host.
_COVERED = frozenset(("files", "dns", "resolve", "myhostname"))

_T = TypeVar("_T")


class WatchedFile(Generic[_T]):
    """The contents of a file, parsed again after a change.

    Args:
        parse: makes the contents of the text; "" for a missing file. It may yield to the event loop.
    """

    def __init__(self, path: str, parse: Callable[[str], _T]) -> None:
        self.path = path
        self._parse = parse
        self._checked = float("-inf")
        self._seen: Any = None
        self._contents: _T | None = None
        self._parsing = Semaphore()

    def read(self) -> _T:
        """Return the contents. If the file cannot be read now, or is being parsed, those that were read last."""
        contents = self._contents
        if contents is None:
            with self._parsing:
                return self._newest() if self._contents is None else self._contents
        if monotonic() - self._checked >= CHECK_EVERY and self._parsing.acquire(blocking=False):
            try:
                return self._newest()
            finally:
                self._parsing.release()
        return contents

    def _newest(self) -> _T:
        self._checked = monotonic()
        try:
            stat = os.stat(self.path)
            seen: Any = stat.st_ino, stat.st_size, stat.st_mtime_ns
            if self._contents is None or seen != self._seen:
                with open(self.path, encoding="ascii", errors="replace") as file:
                    text = file.read()
                self._contents = self._parse(text)
                self._seen = seen
        except OSError as error:
            if self._contents is None or (isinstance(error, FileNotFoundError) and self._seen is not None):
                self._contents, self._seen = self._parse(""), None
        return self._contents


# -- resolv.conf -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """What resolv.conf says.

    Attributes:
        servers: addresses of name servers as for ``socket.connect``, in the order in which to ask them.
        search: domains in which to look for a name that is not absolute.
        ndots: a name with as many dots is looked for as it is before the search domains.
        timeout: seconds until the next server is asked; doubled with each round. c-ares has the same default, glibc 5.
        attempts: rounds through the servers.
        by_tcp: ask over TCP alone.
    """

    servers: tuple[Any, ...] = (("127.0.0.1", 53),)
    search: tuple[str, ...] = ()
    ndots: int = 1
    timeout: float = 2.0
    attempts: int = 3
    by_tcp: bool = False

    def candidates(self, host: str) -> list[str]:
        """Return the absolute names that a name may mean, without final dots, in the order in which to look them up.

        Args:
            host: in lower case, with a final dot if it is absolute.
        """
        if host.endswith("."):
            return [host[:-1]]
        below = [f"{host}.{domain}" if domain else host for domain in self.search]
        names = [host, *below] if host.count(".") >= self.ndots else [*below, host]
        return [name for name in dict.fromkeys(names) if len(name) <= LONGEST_NAME]


def parse_resolv_conf(text: str) -> ResolvConf:
    """Parse resolv.conf. What is invalid is ignored, as by glibc."""
    servers: list[Any] = []
    search: list[str] | None = None
    options: list[str] = []
    for keyword, *values in _fields(text):
        if keyword == "nameserver" and values:
            servers += _server(values[0])
        elif keyword == "domain" and values:
            search = values[:1]
        elif keyword == "search":
            search = values
        elif keyword == "options":
            options += values
    # The environment prevails, as for glibc.
    if "LOCALDOMAIN" in os.environ:
        search = os.environ["LOCALDOMAIN"].split()
    options += os.environ.get("RES_OPTIONS", "").split()
    if search is None:
        search = [socket.gethostname().partition(".")[2]] if "." in socket.gethostname() else []
    chosen: dict[str, Any] = {}
    for option in options:
        name, _, number = option.partition(":")
        if name == "use-vc":
            chosen["by_tcp"] = True
        elif name in _NUMBERS and number.isascii() and number.isdigit():
            least, most = _NUMBERS[name]
            chosen[name] = min(max(int(number[:6]), least), most)
    if servers:
        chosen["servers"] = tuple(servers[:MOST_SERVERS])
    return ResolvConf(search=tuple(_domains(search)), **chosen)


_NUMBERS = {"ndots": (0, MOST_NDOTS), "timeout": (1, MOST_TIMEOUT), "attempts": (1, MOST_ATTEMPTS)}


def _server(text: str) -> list[Any]:
    try:
        # Numbers alone: no lookup. An IPv6 address may have a zone.
        found = socket.getaddrinfo(text, 53, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):  # UnicodeError: Python's own, of labels that are empty or too long
        return []
    return [found[0][4]]


def _domains(texts: list[str]) -> Iterator[str]:
    for text in texts[:MOST_SEARCHED]:
        if text == ".":  # the root: the name as it is
            yield ""
            continue
        try:
            yield canonical_name(text.removeprefix("."))
        except BadTarget:
            continue


def _fields(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = line.split()
        if words and words[0][0] not in "#;":
            yield words


# -- hosts and nsswitch.conf -------------------------------------------------------------------------------------------


def parse_hosts(text: str) -> dict[str, tuple[IPAddress, ...]]:
    """Return the addresses of each name in a hosts file: of each family as many as are tried.

    What is invalid is ignored, as by glibc. Yields to the event loop regularly.
    """
    found: dict[str, tuple[IPAddress, ...]] = {}
    for number, line in enumerate(io.StringIO(text), 1):  # splitlines() takes 60 ms for 200,000
        if not number % LINES_AT_ONCE:
            gevent.sleep(0)
        words = line.partition("#")[0].split()
        if len(words) < 2:
            continue
        try:
            ip = unmapped(ip_address(words[0]))
        except ValueError:
            continue
        if "%" in words[0]:
            continue  # an address of one interface
        for word in words[1:]:
            name = word.lower().removesuffix(".")
            known = found.get(name, ())
            if ip not in known and sum(one.version == ip.version for one in known) < MOST_ADDRESSES:
                found[name] = (*known, ip)
    return found


def parse_nsswitch(text: str) -> bool:
    """Return whether names may have addresses that neither the hosts file nor DNS knows."""
    for line in text.splitlines():
        database, colon, services = line.partition("#")[0].partition(":")
        if colon and database.strip() == "hosts":
            return not _COVERED.issuperset(word for word in services.split() if not word.startswith("["))
    return False
