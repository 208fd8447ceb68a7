"""Standard descriptors: 0, 1 and 2 are open before we open anything.

A program may be started without some of them (`<&-`, cron-like and embedded service managers). The next descriptors
that are opened would get their numbers: a listening socket becomes "standard input", a client gets printed text, and
child processes of a program hang or inherit the wrong files. POSIX lets execve(2) open something there for the same
reason, and glibc does so for set-user-ID programs.
"""

from __future__ import annotations

import os
import sys

from .descriptors import close_descriptor


def open_standard_descriptors() -> None:
    """Open /dev/null as each closed standard descriptor, and create the streams of `sys` that Python then lacks.

    If there is no /dev/null (in a chroot), a pipe without a writer takes the number: reading finds the end, writing
    fails (EBADF) as on a closed descriptor.

    Raises:
        OSError: neither can be opened.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if _is_open(fd):
            continue
        is_null = _open(fd)
        # Python has None for a stream whose descriptor was closed at startup, to which print() writes nothing.
        if getattr(sys, name) is None and (is_null or fd == 0):
            stream = open(fd, "w" if fd else "r", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _open(fd: int) -> bool:
    """Open something as the lowest free number; return whether it is /dev/null."""
    try:
        got, is_null = os.open(os.devnull, os.O_RDWR), True
    except OSError:
        try:
            got, other = os.pipe()
        except OSError as error:
            raise OSError(error.errno, f"descriptor {fd} is closed, and cannot be opened: {error.strerror}") from None
        close_descriptor(other)
        is_null = False
    if got == fd:
        os.set_inheritable(fd, True)  # as standard descriptors are
    else:
        close_descriptor(got)  # another thread has opened something meanwhile
    return is_null and got == fd
