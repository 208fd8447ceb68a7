"""Accepted file arguments: a path, a descriptor, a file object, or any object that reads or writes."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.watcher import watch

if TYPE_CHECKING:
    from typing import Protocol

    from _typeshed import FileDescriptorOrPath, SupportsWrite
    from typing_extensions import Buffer  # which type checkers have

    class _Reads(Protocol):
        def read(self, size: int, /) -> Buffer: ...

    Readable = FileDescriptorOrPath | _Reads
    Writable = FileDescriptorOrPath | SupportsWrite[bytes]


def descriptor_of(file: Any) -> int | None:
    """Return the descriptor of a descriptor or file object if its bytes are those of the file; otherwise None.

    (A GzipFile has a ``fileno()``, too, but that refers to the compressed file.)

    Raises:
        ValueError: a file opened in text mode.
    """
    if isinstance(file, int) and not isinstance(file, bool):
        return file
    if isinstance(file, io.TextIOBase) or isinstance(getattr(file, "encoding", None), str):
        raise ValueError(f"the file must be opened in binary mode, got {file!r}")
    # A plain FileIO, a buffered file on top of it, or tempfile's wrapper of either.
    raw = getattr(file, "raw", file)
    return raw.fileno() if isinstance(raw, io.FileIO) else None


@contextlib.contextmanager
def opened(file: Any, flags: int) -> Iterator[Any]:
    """Yield the file itself or, for a path, a descriptor that is closed at the end."""
    if not isinstance(file, (str, bytes, os.PathLike)):
        yield file
        return
    # Non-blocking: opening a FIFO would otherwise wait for its other end. No effect on a regular file.
    fd = os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        yield fd
    finally:
        close_descriptor(fd)


def is_seekable_file(fd: int) -> bool:
    """Return whether a descriptor is a regular file or a block device; False: a FIFO, terminal, socket ..."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def wait_for(fd: int, event: int) -> None:
    """Wait until a FIFO or device is readable (event 1) or writable (event 2)."""
    hub = get_hub()
    watcher = watch(hub.loop, fd, event)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()
