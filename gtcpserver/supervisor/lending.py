"""Lending: a master that runs as root opens files for workers that run as another user (`files.lent`).

While a new worker is still root, and before it runs the user's code, it names the files of its options to its
master. Then it becomes the other user, and says so: from then on it gets descriptors of these files, and can name no
others. The master opens them for reading, or for appending if they are access logs: nothing that this worker, with
these options, could not have opened as root. The master opens only paths that no other user can change
(`trusted_path`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from time import monotonic

import gevent
from gevent.event import AsyncResult
from gevent.hub import get_hub
from gevent.lock import BoundedSemaphore

from gtcpserver.files.trusted_path import UntrustedPath, open_file
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.server.access_log import FILE_FLAGS, FILE_MODE

from .channel import Channel
from .messages import Message

log = logging.getLogger("gtcpserver")

#: Seconds that a worker waits for a file. The master answers at once, unless it is stopped (SIGSTOP).
ANSWER_SECONDS = 5.0

#: Seconds after a question without an answer in which further questions fail at once, instead of waiting too.
PAUSE_SECONDS = 10.0

#: Paths in one packet: each has up to 4 KiB (PATH_MAX), and a character up to six bytes in JSON.
NAMES_AT_ONCE = 8

#: Flags of open. O_NONBLOCK: opening a FIFO would wait for its writer.
READ_FLAGS = os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK


@dataclass(frozen=True)
class NamedFiles:
    """Files that the options of a worker name.

    Attributes:
        read: files to read, and folders of files to read.
        append: files to append to: access logs.
    """

    read: Collection[str] = ()
    append: Collection[str] = ()


# -- in the master -----------------------------------------------------------------------------------------------------


@dataclass
class Loans:
    """The files that one worker may borrow.

    Attributes:
        read, append: absolute paths.
        complete: whether the worker may name no more: it is another user now, or stays root.
    """

    read: set[str] = field(default_factory=set)
    append: set[str] = field(default_factory=set)
    complete: bool = False
    _folders: set[str] = field(default_factory=set)

    def hear(self, message: Message, channel: Channel) -> None:
        """Obey "names" and "unprivileged", and answer "borrow"."""
        if message.kind == "unprivileged":
            self.complete = True
        elif message.kind == "names":
            if not self.complete:
                self.read.update(_texts(message.fields.get("read")))
                self.append.update(_texts(message.fields.get("append")))
        else:
            self._lend(message.text("path"), message.count("number"), channel)

    def _lend(self, path: str, number: int, channel: Channel) -> None:
        fd, error, why = -1, 0, ""
        try:
            fd = self._open(path)
        except UntrustedPath as refused:
            error, why = errno.EACCES, str(refused)
        except (OSError, ValueError) as failed:  # ValueError: a NUL in the path
            error = getattr(failed, "errno", None) or errno.EINVAL
        try:
            # Now or never: a queued descriptor number may belong to another file later. The worker asks again.
            channel.send_if_clear("lent", fd if fd >= 0 else None, number=number, error=error, why=why)
        finally:
            if fd >= 0:
                close_descriptor(fd)

    def _open(self, path: str) -> int:
        if path in self.append:
            return open_file(path, FILE_FLAGS, FILE_MODE)
        if path not in self.read and os.path.dirname(path) not in self._folders:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fd = open_file(path, READ_FLAGS)
        try:
            kind = os.fstat(fd).st_mode
            if stat.S_ISDIR(kind) and path in self.read:
                self._folders.add(path)
            elif not stat.S_ISREG(kind):
                raise OSError(errno.EINVAL, "not a regular file")
        except BaseException:
            close_descriptor(fd)
            raise
        return fd


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


# -- in a worker -------------------------------------------------------------------------------------------------------


class Borrower:
    """The worker's side; `files.lent` calls it.

    Args:
        channel: the channel to the master.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._names: set[str] = set()
        self._folders: set[str] = set()
        self._lock = BoundedSemaphore()
        self._number = 0
        self._answer: AsyncResult[tuple[Message, int | None]] | None = None
        self._again_at = 0.0
        self._hub = get_hub()

    def name(self, files: NamedFiles, seconds: float) -> None:
        """Name the files, while this process is root.

        Args:
            files: the files.
            seconds: time limit of each packet.

        Raises:
            TimeoutError: the master reads nothing.
        """
        read, append = _absolute(files.read), _absolute(files.append)
        self._names = {*read, *append}
        self._folders = {path for path in read if os.path.isdir(path)}
        for start in range(0, max(len(read), len(append)), NAMES_AT_ONCE):
            part = slice(start, start + NAMES_AT_ONCE)
            self._channel.send("names", read=read[part], append=append[part])
            if not self._channel.finish(seconds):
                raise TimeoutError(
                    errno.ETIMEDOUT, "the master does not read the names of files that this worker needs"
                )

    def __call__(self, path: str) -> int:
        """Return a descriptor of a named file. Waits in gevent: do not call it in the hub or in other threads.

        Raises:
            OSError: the file was not named, or the master cannot open it, or does not answer.
        """
        path = os.path.abspath(path)
        if path not in self._names and os.path.dirname(path) not in self._folders:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if get_hub() is not self._hub or gevent.getcurrent() is self._hub:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with self._lock:
            if monotonic() < self._again_at:
                raise TimeoutError(errno.ETIMEDOUT, "the master does not answer")
            self._number += 1
            answer = self._answer = AsyncResult()
            taken = False
            try:
                self._channel.send("borrow", number=self._number, path=path)
                message, fd = answer.get(timeout=ANSWER_SECONDS)
                taken = True
            except gevent.Timeout:
                self._again_at = monotonic() + PAUSE_SECONDS
                raise TimeoutError(errno.ETIMEDOUT, "the master does not answer") from None
            finally:
                self._answer = None
                # The answer may have arrived in the same turn of the loop as the event that ended the wait.
                if not taken and answer.ready() and answer.value[1] is not None:
                    close_descriptor(answer.value[1])
        if fd is None:
            number = message.count("error") or errno.EMFILE  # this process could not take the descriptor
            raise OSError(number, message.text("why") or os.strerror(number))
        return int(fd)

    def hear(self, message: Message, fd: int | None) -> None:
        """Handle the master's answer, in the event loop."""
        if self._answer is not None and not self._answer.ready() and message.count("number") == self._number:
            self._answer.set((message, fd))
        elif fd is not None:
            close_descriptor(fd)  # nobody waits for the answer any more


def _absolute(paths: Iterable[str]) -> list[str]:
    return [os.path.abspath(path) for path in paths]
