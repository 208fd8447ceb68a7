"""What keeps a server's certificates up to date: looks at their files, and orders by ACME."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gevent import Greenlet

from gtcpserver.tls import Credentials
from gtcpserver.tls.acme import ACMESettings, keep_certificate


def credentials_of(handler: Any) -> tuple[Credentials, ...]:
    """Return the certificates that a handler has itself: a proxy, each of whose listeners may have its own."""
    found = getattr(handler, "tls_credentials", ())
    return found if isinstance(found, tuple) else ()


class Certificates:
    """The certificates of a server that serves.

    Args:
        spawn: starts a task of the server (`Server.spawn`).
    """

    def __init__(self, spawn: Callable[..., Any]) -> None:
        self._spawn = spawn
        self._kept: tuple[Credentials, ...] = ()
        self._tasks: dict[ACMESettings, Greenlet[..., Any]] = {}

    def keep(self, credentials: Iterable[Credentials]) -> None:
        """Look after these, and leave those of the last call alone. Listeners with one certificate have one task."""
        self.leave()
        self._kept = tuple(credentials)
        for one in self._kept:
            if one.config is None:
                continue
            if one.config.watch is not None:
                one.watch(one.config.watch)
            managed = one.config.managed
            if managed is not None and managed not in self._tasks:
                self._tasks[managed] = self._spawn(keep_certificate, one, managed)

    def leave(self) -> None:
        """Look after none. A helper process that orders for one of them is ended."""
        for one in self._kept:
            one.stop_watching()
        for task in self._tasks.values():
            task.kill(block=False)
        self._kept, self._tasks = (), {}

    def left_in_child(self) -> None:
        """Forget them in a forked child, which has another event loop."""
        for one in self._kept:
            one.left_in_child()
        self._kept, self._tasks = (), {}
