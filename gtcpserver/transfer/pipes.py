"""A pool of the pipes that spliced bytes pass through.

splice(2) moves bytes between a socket and a pipe, so each transfer needs a pipe, but only while bytes are in it: a pipe
is taken, filled, emptied and put back within one event, and ten thousand idle relays hold none. Only a transfer whose
receiver takes no more keeps its pipe until it does. A pipe with bytes in it is closed, never put back: the bytes would
come out in another connection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import sys
import termios
from collections import deque
from time import monotonic
from weakref import WeakSet

from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.linux import HAS_SPLICE, grow_pipe, has_ended, make_pipe, pipe_size, reopen_pipe, splice
from gtcpserver.process.descriptors import close_descriptor

#: Bytes asked of one splice, and the size of a large pipe: fs.pipe-max-size is 1 MiB unless an operator changed it.
LARGEST = 1 << 20

#: (pipes in existence, size of the next). All pipes of a user together may have fs.pipe-user-pages-soft pages (64 MiB)
#: before the kernel hands out tiny ones; these steps give the large pipes to the few busy transfers, and allow about
#: 600 pipes within that limit.
SIZES = ((16, LARGEST), (64, 256 * 1024))

#: Bytes of all further pipes, and the smallest useful size; also the default of pipe(2).
SMALLEST = 64 * 1024

#: Empty pipes kept. One is enough while every receiver keeps up: then no pipe is held between events.
MOST_UNUSED = 16

#: Seconds without pipes after the system refused a pipe (EMFILE, or the limit above) or splice.
PAUSE_AFTER_REFUSAL = 1.0

#: Errors of splice(2) that may not come from the peer: a sandbox forbids it (seccomp, systemd's SystemCallFilter:
#: EPERM, ENOSYS, EACCES), the kernel is short of memory, or cannot splice this pair of descriptors. Copying goes on
#: from the same byte.
REFUSALS = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EIO,
    }
)

#: Errors of opening a pipe anew that do not pass: there is no /proc, or it is another user's.
_NOT_OPENED = (errno.ENOENT, errno.EACCES)

log = own_logger("gtcpserver.transfer")


class Pipe:
    """A non-blocking pipe.

    Attributes:
        input, output: its descriptors.
        size: its capacity in bytes.
        foreign: another process has had it, and may have it still: it serves no other transfer, whose bytes that
            process would get.
    """

    __slots__ = ("__weakref__", "foreign", "input", "output", "size")

    def __init__(self, size: int) -> None:
        self.foreign = False
        self.output, self.input = make_pipe()
        try:
            self.size = pipe_size(self.input)
            while size > self.size:
                try:
                    self.size = grow_pipe(self.input, size)
                except OSError:
                    size //= 2  # EPERM: over this user's limit; ENOMEM: out of memory
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, output: int, input_: int, content: int) -> Pipe:
        """Return a pipe of another process, whose descriptors belong to it from now on.

        Its ends are opened anew: whoever has the old ones cannot make these blocking.

        Raises:
            OSError, ValueError: they are no pipe, or one with another number of bytes in it: a flow that waits for
                more would occupy the event loop.
        """
        size = pipe_size(input_)
        pipe_size(output)
        if not os.path.sameopenfile(output, input_):
            raise ValueError("these are not the two ends of one pipe")
        there = _bytes_in(output)
        if there != content:
            raise ValueError(f"the pipe has {there} bytes, not {content}")
        ends = _opened_anew(output, input_)
        pipe = cls.__new__(cls)
        pipe.output, pipe.input = ends
        pipe.size = size
        pipe.foreign = True
        return pipe

    def check(self, content: int) -> None:
        """Raise OSError if another process has taken bytes out: the flow would try again without end."""
        if self.foreign and (there := _bytes_in(self.output)) < content:
            raise OSError(errno.EIO, f"the pipe has {there} of {content} bytes")

    def fill(self, source: int, size: int) -> int:
        """Splice up to ``size`` bytes from a descriptor into the pipe."""
        return splice(source, self.input, size)

    def empty(self, sink: int, size: int) -> int:
        """Splice up to ``size`` bytes from the pipe into a descriptor."""
        return splice(self.output, sink, size)

    def put_in(self, data: memoryview) -> int:
        """Write into the empty pipe; return the number of bytes that it took."""
        try:
            return os.write(self.input, data)
        except OSError:
            return 0  # ENOMEM

    def take_out(self, size: int) -> bytes:
        """Read the whole content of the pipe, ``size`` bytes, for a sink that cannot splice."""
        if self.foreign:
            os.set_blocking(self.output, False)
        taken = bytearray()
        while len(taken) < size:
            try:
                piece = os.read(self.output, size - len(taken))
            except BlockingIOError:
                piece = b""  # another process has taken it
            if not piece:
                raise OSError(errno.EIO, f"the pipe gave {len(taken)} of {size} bytes")
            taken += piece
        return bytes(taken)

    def close(self) -> None:
        """Close both ends; bytes in the pipe are lost. Idempotent."""
        ends = self.output, self.input
        self.output = self.input = -1
        for end in ends:
            if end >= 0:
                close_descriptor(end)


class PipePool:
    """Pipes for all transfers of this process.

    Attributes:
        taken: pipes in use.
        refused: times that the system gave no pipe, or a useless one.
        refused_splices: times that splice(2) itself was refused.
    """

    def __init__(self) -> None:
        self._unused: deque[Pipe] = deque()
        self._made: WeakSet[Pipe] = WeakSet()  # all existing pipes, for a forked child
        self._refused_at = -PAUSE_AFTER_REFUSAL
        self.taken = 0
        self.refused = 0
        self.refused_splices = 0

    @property
    def unused(self) -> int:
        """Number of empty pipes kept."""
        return len(self._unused)

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None if splice or pipes are unavailable: copy then."""
        # Hot path: once per event of a bulk transfer.
        try:
            pipe = self._unused.pop()
        except IndexError:
            made = self._make()
            if made is None:
                return None
            pipe = made
        self.taken += 1
        return pipe

    def put(self, pipe: Pipe) -> None:
        """Give back an empty pipe."""
        self.taken -= 1
        if pipe.foreign or len(self._unused) >= MOST_UNUSED:
            pipe.close()
        elif pipe.size >= LARGEST:
            self._unused.append(pipe)
        else:
            self._unused.appendleft(pipe)  # large pipes are handed out first

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe that may have bytes in it."""
        self.taken -= 1
        pipe.close()

    def adopt(self, output: int, input_: int, content: int) -> Pipe:
        """Take over a pipe of another process, with so many bytes in it. Raise OSError, ValueError: it is none."""
        pipe = Pipe.of(output, input_, content)
        self._made.add(pipe)
        self.taken += 1
        return pipe

    def let_go(self, pipe: Pipe) -> None:
        """Forget a pipe, whose descriptors stay open, and belong to the caller from now on."""
        self.taken -= 1
        pipe.output = pipe.input = -1

    def refuse(self, error: OSError) -> None:
        """Note that splice(2) was refused: hand out no pipe for a while, so that transfers copy."""
        if not self.refused_splices:
            log.warning("splice(2) was refused (%s): copying instead", error.strerror or error)
        self.refused_splices += 1
        self._refused_at = monotonic()
        self.close_unused()

    def close_unused(self) -> None:
        """Close the empty pipes kept."""
        while self._unused:
            self._unused.pop().close()

    def _make(self) -> Pipe | None:
        if not HAS_SPLICE or monotonic() - self._refused_at < PAUSE_AFTER_REFUSAL:
            return None
        with contextlib.suppress(OSError):
            # Each pipe takes two descriptors; pipes may take a quarter of all descriptors: connections come first.
            most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if most_descriptors == resource.RLIM_INFINITY or self.taken < most_descriptors // 8:
                size = next((size for until, size in SIZES if self.taken < until), SMALLEST)
                pipe = Pipe(size)
                self._made.add(pipe)
                if pipe.size >= SMALLEST:
                    return pipe
                pipe.close()
        self._refused_at = monotonic()
        self.refused += 1
        return None

    def left_in_child(self) -> None:
        """Close the pipes in a forked child. The parent still uses these pipes and is not affected."""
        for pipe in self._made:
            pipe.close()
        self._made.clear()
        self._unused.clear()
        self.taken = self.refused = self.refused_splices = 0


def _bytes_in(output: int) -> int:
    return int.from_bytes(fcntl.ioctl(output, termios.FIONREAD, bytes(4)), sys.byteorder)


def _opened_anew(output: int, input_: int) -> tuple[int, int]:
    """Open both ends of a pipe anew, and close these; return the new ones. Raise OSError: all is as it was."""
    try:
        reading = reopen_pipe(output, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
        return output, input_  # `take_out` cares
    try:
        writing = reopen_pipe(input_, os.O_WRONLY)
    except BaseException:
        close_descriptor(reading)
        raise
    for fd in (output, input_):
        close_descriptor(fd)
    return reading, writing


def check_source(sock: socket.socket, refusal: OSError) -> None:
    """Raise if a refused splice from a socket may have been an error of the connection.

    The kernel reports such an error once. If the splice got it, a read returns the end, as for a complete stream.

    Raises:
        OSError: ``refusal``, or the socket's current error.
    """
    try:
        if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return
    except BlockingIOError:
        return
    # Also true after an orderly end, if ours was sent before. When in doubt, treat it as broken.
    if has_ended(sock):
        raise refusal


PIPES = PipePool()
os.register_at_fork(after_in_child=PIPES.left_in_child)
