"""The pipes that spliced bytes pass through, kept for use again.

splice(2) moves bytes between a socket and a pipe, so each transfer needs a pipe, but only while bytes are in it: a pipe
is taken, filled, emptied and put back within one event, and ten thousand idle relays hold none. Only a transfer whose
receiving side takes no more keeps its pipe until it does. A pipe with bytes in it is closed, never put back: they
would come out in somebody else's connection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
from collections import deque
from time import monotonic
from weakref import WeakSet

from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.process.descriptors import close_descriptor

from .ends import has_ended

#: Bytes asked of one splice, and the size of a large pipe: fs.pipe-max-size is 1 MiB unless an operator changed it.
LARGEST = 1 << 20

#: (pipes in existence, size of the next). All pipes of a user together may have fs.pipe-user-pages-soft pages (64 MiB)
#: before the kernel hands out tiny ones; this staircase gives the few that are busy the large ones, and makes about 600
#: within that limit.
SIZES = ((16, LARGEST), (64, 256 * 1024))

#: The size of all further ones, and the least worth having; also what pipe(2) gives anyway.
SMALLEST = 64 * 1024

#: Empty pipes kept. One is enough while every receiver keeps up, since none is held from one event to the next.
MOST_IDLE = 16

#: After the system refused a pipe (EMFILE, or the limit above) or splice, do without for so many seconds.
PAUSE_AFTER_REFUSAL = 1.0

#: What splice(2) says that need not come from the other end of the socket: a sandbox that does not allow it (seccomp,
#: systemd's SystemCallFilter: EPERM, ENOSYS, EACCES), a kernel short of memory, or one that cannot do it with this pair
#: of descriptors. To copy goes on from the same byte.
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

log = own_logger("gtcpserver.transfer")

_NONBLOCK = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE if hasattr(os, "splice") else 0


class Pipe:
    """A non-blocking pipe: ``input`` and ``output`` are its descriptors, ``size`` its capacity in bytes."""

    __slots__ = ("__weakref__", "input", "output", "size")

    def __init__(self, size: int) -> None:
        self.output, self.input = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.input, fcntl.F_GETPIPE_SZ)
            while size > self.size:
                try:
                    self.size = fcntl.fcntl(self.input, fcntl.F_SETPIPE_SZ, size)
                except OSError:
                    size //= 2  # EPERM: more than this user may have; ENOMEM: than there is
        except BaseException:
            self.close()
            raise

    def fill(self, source: int, size: int) -> int:
        """Splice up to ``size`` bytes from a descriptor into the pipe."""
        return os.splice(source, self.input, size, None, None, _NONBLOCK)

    def empty(self, sink: int, size: int) -> int:
        """Splice up to ``size`` bytes from the pipe into a descriptor."""
        return os.splice(self.output, sink, size, None, None, _NONBLOCK)

    def take_out(self, size: int) -> bytes:
        """Read all that is in the pipe, for whoever cannot splice it: ``size`` bytes."""
        taken = bytearray()
        while len(taken) < size:
            piece = os.read(self.output, size - len(taken))
            if not piece:
                raise OSError(errno.EIO, f"the pipe gave {len(taken)} of {size} bytes")
            taken += piece
        return bytes(taken)

    def close(self) -> None:
        """Close both ends; the bytes in between are lost. May be called again."""
        ends = self.output, self.input
        self.output = self.input = -1
        for end in ends:
            if end >= 0:
                close_descriptor(end)


class PipePool:
    """Pipes for all transfers of this process.

    Attributes:
        taken: pipes in use.
        refused: how often the system gave none, or none worth having.
        refused_splices: how often splice(2) itself was refused.
    """

    def __init__(self) -> None:
        self._idle: deque[Pipe] = deque()
        self._made: WeakSet[Pipe] = WeakSet()  # all there are, for a forked child
        self._refused_at = -PAUSE_AFTER_REFUSAL
        self.taken = 0
        self.refused = 0
        self.refused_splices = 0

    @property
    def idle(self) -> int:
        """Empty pipes kept for the next."""
        return len(self._idle)

    def take(self) -> Pipe | None:
        """An empty pipe, or None where splice or a pipe is not to be had: copy then."""
        # Hot: once an event of a bulk transfer.
        try:
            pipe = self._idle.pop()
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
        if len(self._idle) >= MOST_IDLE:
            pipe.close()
        elif pipe.size >= LARGEST:
            self._idle.append(pipe)
        else:
            self._idle.appendleft(pipe)  # the large ones go out first

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe that may have bytes in it."""
        self.taken -= 1
        pipe.close()

    def refuse(self, error: OSError) -> None:
        """splice(2) was refused: give no pipe for a while, so that transfers copy."""
        if not self.refused_splices:
            log.warning("splice(2) was refused (%s): copying instead", error.strerror or error)
        self.refused_splices += 1
        self._refused_at = monotonic()
        self.close_idle()

    def close_idle(self) -> None:
        """Close the pipes that are kept."""
        while self._idle:
            self._idle.pop().close()

    def _make(self) -> Pipe | None:
        if not _NONBLOCK or monotonic() - self._refused_at < PAUSE_AFTER_REFUSAL:
            return None
        with contextlib.suppress(OSError):
            # Each pipe is two descriptors, and together they may be a quarter of them: connections come first.
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
        """In a forked child: close them there. The parent goes on to use these very pipes, which does them no harm."""
        for pipe in self._made:
            pipe.close()
        self._made.clear()
        self._idle.clear()
        self.taken = self.refused = self.refused_splices = 0


def check_source(sock: socket.socket, refusal: OSError) -> None:
    """After a splice from a socket was refused: raise if that may have been an error of the connection.

    The kernel tells such an error once. If the splice got it, a read gets the end, like that of a complete stream.

    Raises:
        OSError: ``refusal``, or what the socket says now.
    """
    try:
        if sock.recv(1, socket.MSG_PEEK):
            return
    except BlockingIOError:
        return
    # Also after an end in order, if ours had been sent before. In doubt it is broken.
    if has_ended(sock):
        raise refusal


PIPES = PipePool()
os.register_at_fork(after_in_child=PIPES.left_in_child)
