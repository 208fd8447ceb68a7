"""Look names up with the system's resolver (getaddrinfo(3)), which knows all that nsswitch.conf(5) leads to.

It blocks, so it runs in native threads of its own: gevent's default pool has 10 for everything, and names whose server
does not answer (5 s and more each) fill it at once.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any, Literal

from gevent import monkey
from gevent.threadpool import ThreadPool

from .questions import Answer, answer_for
from .target import IPAddress

Wanted = Literal["any", "ipv4", "ipv6"]

_FAMILIES: dict[Wanted, int] = {"any": socket.AF_UNSPEC, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}

_getaddrinfo: Any = monkey.get_original("socket", "getaddrinfo")

#: Simultaneous lookups. Threads are created on demand, and cost 25 KiB and more each.
THREADS = 256

#: Seconds to keep a result. getaddrinfo does not return its TTL; browsers do the same (Chromium: 60).
KEEP = 60.0
KEEP_NEGATIVE = 5.0

# musl has no EAI_NODATA.
_NO_SUCH_NAME = frozenset((socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)))


class SystemNames:
    """The system's resolver, in threads."""

    def __init__(self) -> None:
        self._threads: ThreadPool | None = None

    def look_up(self, name: str, wanted: Wanted) -> Answer:
        """Return the answer about a name; one with a final dot is absolute."""
        if self._threads is None:
            self._threads = ThreadPool(THREADS)
        try:
            found = self._threads.spawn(_look_up, name, _FAMILIES[wanted]).get()
        except Exception:  # no other thread can be started
            return answer_for("broken")
        if isinstance(found, int):
            return answer_for("no-name" if found in _NO_SUCH_NAME else "failed", ttl=KEEP_NEGATIVE)
        return answer_for("found", tuple(found), KEEP)

    def close(self) -> None:
        """End the threads, after the lookups in progress."""
        if self._threads is not None:
            self._threads.kill()
            self._threads = None


def _look_up(name: str, family: int) -> list[IPAddress] | int:
    # In a native thread, where gevent would print any exception with a traceback: for each name that does not exist.
    try:
        found = _getaddrinfo(name, None, family, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return int(error.errno or socket.EAI_FAIL)
    except (OSError, UnicodeError):  # UnicodeError: not a valid DNS name
        return int(socket.EAI_NONAME)
    return [ip_address(sockaddr[0].split("%")[0]) for _, _, _, _, sockaddr in found]
