"""What may stand for a file: a path, a descriptor, a file object, or anything that reads or writes."""

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
    """The descriptor behind a descriptor or file object, if its bytes are those of the file; otherwise None.

    (A GzipFile has a ``fileno()``, too, but that is of the compressed file.)

    Raises:
        ValueError: a file opened in text mode.
    """
    if isinstance(file, int) and not isinstance(file, bool):
        return file
    if isinstance(file, io.TextIOBase) or isinstance(getattr(file, "encoding", None), str):
        raise ValueError(f"the file must be opened in binary mode, got {file!r}")
    # A plain FileIO, a buffered one on top of it, or a tempfile's wrapper of either.
    raw = getattr(file, "raw", file)
    return raw.fileno() if isinstance(raw, io.FileIO) else None


@contextlib.contextmanager
def opened(file: Any, flags: int) -> Iterator[Any]:
    """The file itself; or, of a path, a descriptor that is closed at the end."""
    if not isinstance(file, (str, bytes, os.PathLike)):
        yield file
        return
    # Non-blocking: to open a FIFO would otherwise wait for its other end. It changes nothing for a regular file.
    fd = os.open(file, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        yield fd
    finally:
        close_descriptor(fd)


def is_seekable_file(fd: int) -> bool:
    """Whether a descriptor is of a regular file or a block device; False: a FIFO, terminal, socket ..."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def wait_for(fd: int, event: int) -> None:
    """Wait until a FIFO or device can be read (event 1) or written (event 2)."""
    hub = get_hub()
    watcher = watch(hub.loop, fd, event)
    try:
        hub.wait(watcher)
    finally:
        watcher.close()
