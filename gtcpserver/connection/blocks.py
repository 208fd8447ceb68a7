"""The ``with`` blocks of a connection: :meth:`Connection.deadline` and :meth:`Connection.idle`."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (blocks.pxd).
    from time import monotonic

    from .stream import Stream

if TYPE_CHECKING:
    from types import TracebackType

    from .connection import Connection


class Deadline:
    """The ``with`` block of :meth:`Connection.deadline`."""

    __slots__ = ("_seconds", "_stream", "_until")

    def __init__(self, stream: Stream, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def __enter__(self) -> None:
        stream = self._stream
        self._until = until = monotonic() + self._seconds
        if stream.deadline is None:
            stream.deadlines = (until,)
            stream.deadline = until
        else:
            stream.deadlines += (until,)
            stream.deadline = min(stream.deadlines)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # Not simply the previous one: a reading greenlet and a writing greenlet may have overlapping blocks.
        stream = self._stream
        if len(stream.deadlines) == 1:
            stream.deadlines = ()
            stream.deadline = None
        else:
            others = list(stream.deadlines)
            others.remove(self._until)
            stream.deadlines = tuple(others)
            stream.deadline = min(others)
        if stream.deadline is None and stream.timeout is None:
            stream.forget_bounds()


class Idle:
    """The ``with`` block of :meth:`Connection.idle`; one reusable object per connection.

    Attributes:
        active: the connection is idle now.
    """

    __slots__ = ("active", "connection")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.active = False

    def __enter__(self) -> None:
        self.active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.active = False
