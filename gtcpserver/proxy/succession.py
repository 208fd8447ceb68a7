"""Succession: a reload replaces the gates of a proxy, and the clients of the old ones follow.

The next request of a client is judged by the new gate. Open tunnels go on, or are judged again (`end_forbidden`). What
an old configuration has started (authenticators, the resolver) ends when no client uses it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from gevent.hub import get_hub
from greenlet import getcurrent

from .errors import Cut


class Guest(Protocol):
    """A client of a configuration: a `Visitor`."""

    @property
    def tenure(self) -> Tenure:
        """Return the time in which its configuration is used."""
        ...

    def follow(self) -> bool:
        """Follow to the newest configuration; return whether it is another one."""
        ...

    def why_forbidden(self) -> Cut | None:
        """Return why its configuration does not allow what it has opened; None: it does."""
        ...


class Tenure:
    """The time in which one configuration is used; all of its gates share it.

    Args:
        end_forbidden: end the tunnels of the configuration before that are not allowed any more.

    Attributes:
        tunnels: clients with an open tunnel, UDP association or response, and the greenlet that waits for its end.
    """

    def __init__(self, end_forbidden: bool = False) -> None:
        self.end_forbidden = end_forbidden
        self.tunnels: dict[Guest, Any] = {}
        self._visitors = 0
        self._close: Callable[[], object] | None = None

    def enter(self) -> None:
        """Count a client that uses it; `leave` must be called."""
        self._visitors += 1

    def leave(self) -> None:
        """Count it off."""
        self._visitors -= 1
        self._close_if_unused()

    def end(self, close: Callable[[], object]) -> None:
        """Call `close` when no client uses it any more: its successor takes over. Its gates have been replaced."""
        self._close = close
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        close = self._close
        if close is not None and not self._visitors:
            self._close = None
            close()

    def move_tunnels(self) -> None:
        """Let the clients of open tunnels follow to the new gates, and end those that are not allowed any more."""
        for visitor in list(self.tunnels):
            visitor.follow()
            if not visitor.tenure.end_forbidden:
                continue
            why = visitor.why_forbidden()
            if why is not None:
                get_hub().loop.run_callback(end_tunnel, visitor, why)


class OpenTunnel:
    """The ``with`` block of an open tunnel, UDP association, or response on its way."""

    __slots__ = ("_visitor",)

    def __init__(self, visitor: Guest) -> None:
        self._visitor = visitor

    def __enter__(self) -> None:
        visitor = self._visitor
        visitor.tenure.tunnels[visitor] = getcurrent()
        if visitor.follow() and visitor.tenure.end_forbidden:  # a reload while it was being opened
            try:
                why = visitor.why_forbidden()
            except BaseException:
                self.__exit__()
                raise
            if why is not None:
                self.__exit__()
                raise why

    def __exit__(self, *error: object) -> None:
        self._visitor.tenure.tunnels.pop(self._visitor, None)


def end_tunnel(visitor: Guest, why: Cut) -> None:
    """End a tunnel if it is still open. Call in the hub only."""
    greenlet = visitor.tenure.tunnels.pop(visitor, None)
    if greenlet is not None:
        greenlet.throw(why)
