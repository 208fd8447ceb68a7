"""Open files that only a more privileged process may open: it lends a descriptor.

Workers of `--user` are ordinary users, and the files that their options name are often root's: TLS keys of mode 0600,
access logs in a folder of mode 0700. Their master is still root. So a file is opened as usual, and if that is refused
(EACCES, EPERM), this process asks its lender (`supervisor.lending`), if it has one. Asking waits in gevent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from gtcpserver.linux import memory_file, path_of_descriptor
from gtcpserver.process.descriptors import close_descriptor

#: A longer file is some other file, or endless (/dev/zero). The largest useful ones are lists of revoked certificates,
#: and settings with 100,000s of rules: some 10 MiB.
LARGEST = 64 * 1024 * 1024

#: Bytes read at once.
PIECE = 64 * 1024

#: Returns a descriptor of a file that may be used; raises OSError.
Lender = Callable[[str], int]

_lender: Lender | None = None


def borrow_from(lender: Lender | None) -> None:
    """Set the lender of this process. None: no lender."""
    global _lender
    _lender = lender


def has_lender() -> bool:
    """Return whether this process has a lender."""
    return _lender is not None


def borrow(path: str) -> int:
    """Return a descriptor from the lender, as it was opened there: the borrower cannot choose its mode.

    Raises:
        OSError: there is no lender (EACCES), or the lender's error.
    """
    if _lender is None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return _lender(path)


def read_file(path: str) -> bytes:
    """Return the content of a file. Raise OSError: EFBIG if it has more than LARGEST bytes."""
    try:
        with open(path, "rb") as file:
            return _content_of(file, path)
    except PermissionError:
        if _lender is None:
            raise
    # An open() that fails leaves the descriptor open.
    with _borrowed(path) as fd, open(fd, "rb", closefd=False) as file:
        return _content_of(file, path)


def _content_of(file: BinaryIO, path: str) -> bytes:
    # In pieces: read(n) makes room for n bytes at once.
    content = bytearray()
    while piece := file.read(PIECE):
        content += piece
        if len(content) > LARGEST:
            raise OSError(errno.EFBIG, f"it has more than {LARGEST} bytes", path)
    return bytes(content)


def stat_file(path: str) -> os.stat_result:
    """Call os.stat. Raise OSError."""
    try:
        return os.stat(path)
    except PermissionError:
        if _lender is None:
            raise
    with _borrowed(path) as fd:
        return os.fstat(fd)


def is_folder(path: str) -> bool:
    """As os.path.isdir."""
    try:
        return stat.S_ISDIR(stat_file(path).st_mode)
    except (OSError, ValueError):
        return False


def files_in(folder: str) -> list[str]:
    """Return the paths of the files in a folder, sorted, without the hidden ones. Raise OSError."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_file()]
    except PermissionError:
        if _lender is None:
            raise
        with _borrowed(folder) as fd, os.scandir(fd) as entries:
            # Where a link leads cannot be seen from here: reading it will show.
            names = [entry.name for entry in entries if entry.is_symlink() or entry.is_file(follow_symlinks=False)]
    return sorted(os.path.join(folder, name) for name in names if not name.startswith("."))


@contextlib.contextmanager
def openable(path: str, content: bytes) -> Iterator[str]:
    """Yield a path from which a library can read this content: the file's own, or one in memory (memfd_create(2)).

    Raises:
        OSError: there is no memory, or no descriptor.
    """
    if _lender is None or os.access(path, os.R_OK):
        yield path
        return
    fd = memory_file("lent")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)  # where a path of a descriptor shares its position
        yield path_of_descriptor(fd)
    finally:
        close_descriptor(fd)


@contextlib.contextmanager
def _borrowed(path: str) -> Iterator[int]:
    fd = borrow(path)
    try:
        yield fd
    finally:
        close_descriptor(fd)
