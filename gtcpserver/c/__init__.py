"""What compiled modules call in C: the .pxd files in here. This file is for those that are not compiled.

A module that may be compiled begins ::

    try:
        import cython
    except ImportError:
        from gtcpserver.c import cython
    if not cython.compiled:
        from time import monotonic  # and what else its .pxd imports from here in C

Cython leaves out what an ``if cython.compiled`` excludes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class cython:
    """Stands in for Cython's module of this name where it is not installed."""

    compiled = False


if TYPE_CHECKING:
    # Only compiled modules call these.
    def accept(sock: Any) -> tuple[int, Any] | None: ...
    def control(epoll: int, operation: int, fd: int, events: int) -> None: ...
    def create() -> int: ...
    def discard(fd: int) -> int: ...
    def fetch(epoll: int, events: Any, most: int) -> int: ...
    def import_greenlet() -> None: ...
    def receive(fd: int, size: int) -> bytes | None: ...
    def shut_write(fd: int) -> bool: ...
    def switch_with(target: Any, first: Any, second: Any) -> Any: ...
    def transmit(fd: int, data: bytes) -> int: ...
