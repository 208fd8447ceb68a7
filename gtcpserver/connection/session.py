"""Session: the data of a connection that go with it when it moves to another worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtcpserver.transfer.relay import Relay
    from gtcpserver.transfer.resumption import Resumption

# The standard library's: the package depends on gevent alone. ASCII, so that text of any kind goes through.
_encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class Session(dict[str, Any]):
    """A dict whose values can be written as JSON. A value that cannot is refused when it is put there.

    A list or dict in it may be changed later, which is checked when the connection is about to move. JSON has no
    tuples: they arrive as lists.

    Attributes:
        resumed: the connection came from another worker; its handler began at its idle point.
        moved: the connection was given away: nothing of it is left here.
        stays: why no other worker can have it; "" if one may.
        not_before: monotonic time before which it is not offered again.
        relay: the relay that would move with the connection; None: it is in none.
        resumption: what a relay goes on from that has come with the connection; None: it has been taken, or none has.
    """

    __slots__ = ("moved", "not_before", "relay", "resumed", "resumption", "stays")

    def __init__(self) -> None:
        super().__init__()
        self.resumed = self.moved = False
        self.stays = ""
        self.not_before = 0.0
        self.relay: Relay | None = None
        self.resumption: Resumption | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name, value)
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(  # type: ignore[override]
        self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any
    ) -> None:
        for name, value in dict(values, **more).items():
            self[name] = value

    def __ior__(self, values: Any) -> Session:  # type: ignore[override,misc]
        self.update(values)
        return self


def _check(name: Any, value: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names in a session must be text, got {name!r}")
    try:
        _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"session[{name!r}] must be a JSON value, got {type(value).__name__}: {error}") from None
