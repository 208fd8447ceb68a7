"""AgentCheck: tells haproxy how this machine is (agent-check, haproxy's configuration manual section 5.2).

Haproxy connects every few seconds, and gets one line. The master answers itself: it reads nothing that could matter,
and knows everything that it says.

| answer | means | when |
| --- | --- | --- |
| `ready up 80%` | new connections, by this part of the server's weight in haproxy | it serves |
| `drain` | no new connections | from the first moment of a stop on |
| `maint` | neither connections nor health checks | `gtcpserver ctl maint on` |
| `stopped` | it is down | a stop is nearly over: no connection is left |
| `down` | it is down | no worker is ready |

`ready` ends what an earlier `drain` or `maint` began; without it haproxy would never send a connection again.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gevent import monkey

from gtcpserver.listening.listener import ListenConfig

from .config import check_agent_address
from .slots import LAG_SECONDS, Slot
from .sockets import Inherited

if TYPE_CHECKING:
    from .master import Master

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

#: Connections at once: one of each haproxy, and some more. The oldest makes room for the newest.
MOST_CLIENTS = 16

#: Connections accepted in one turn of the master.
MOST_IN_A_TURN = 8

#: Seconds until a client that does not close is closed.
CLIENT_SECONDS = 1.0

#: Most reads from one client: haproxy sends one line (agent-send), and closes. One that goes on sending would wake the
#: master without pause.
MOST_READS = 8

#: Seconds without accepting after a failed accept (no descriptors, no memory).
PAUSE_SECONDS = 0.25

#: A worker with more free places in its pool than this part counts in full: below it has less and less to offer.
ENOUGH_ROOM = 0.5

#: Percent.
STEP = 5


@dataclass(eq=False)
class _Client:
    """A client that has its answer.

    Attributes:
        until: monotonic time at which it is closed.
        reads: how often it was read from.
    """

    sock: socket.socket
    until: float
    reads: int = 0


class AgentCheck:
    """Answers agent checks.

    Args:
        master: the master to tell about.
        address: address to listen on.
        inherited: the listening sockets of the last master.

    Raises:
        ConfigError, OSError: the address cannot be used.
    """

    def __init__(self, master: Master, address: str | int, inherited: Sequence[Inherited]) -> None:
        self._master = master
        self._sockets = master.system.listening_sockets(ListenConfig(reuse_port=False))
        try:
            self._sockets.open([check_agent_address(address)], [0], inherited)
        except OSError as error:
            raise OSError(error.errno, f"agent check: {error.strerror or error}") from None
        self._clients: dict[int, _Client] = {}
        self._pause_until = 0.0
        log.info("agent checks on %s", ", ".join(self._sockets.addresses))

    def handover(self) -> list[Inherited]:
        """Return the sockets that the next master inherits."""
        return self._sockets.handover()

    def watched(self, now: float) -> Iterator[tuple[int, Callable[[int], None]]]:
        """Yield the descriptors to wait for input on, each with the function to call then."""
        if self._master.owns_metrics and now >= self._pause_until:
            for one in self._sockets.shared:
                yield one.listener.fileno(), self._acceptor(one.listener.socket)
        for fd in self._clients:
            yield fd, self._closer(fd)

    def look_after(self, now: float) -> None:
        """Close clients whose time is over."""
        for fd, client in list(self._clients.items()):
            if now >= client.until:
                self._close_client(fd)

    def _acceptor(self, sock: socket.socket) -> Callable[[int], None]:
        return lambda _events: self._accept(sock)

    def _closer(self, fd: int) -> Callable[[int], None]:
        return lambda _events: self._discard(fd)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(MOST_IN_A_TURN):
            try:
                # Not socket.accept: as in `control`.
                fd, _ = sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001
            except BlockingIOError:
                return
            except OSError:
                self._pause_until = self._master.system.monotonic() + PAUSE_SECONDS
                return
            client = _socket_class(sock.family, socket.SOCK_STREAM, 0, fileno=fd)
            try:
                client.setblocking(False)
                client.send(self.line().encode())  # it fits into an empty buffer
                client.shutdown(socket.SHUT_WR)
            except OSError:  # it has left
                client.close()
                continue
            # Closed when haproxy has: a close before it has read could reset the connection.
            if len(self._clients) >= MOST_CLIENTS:
                self._close_client(next(iter(self._clients)))
            self._clients[fd] = _Client(client, self._master.system.monotonic() + CLIENT_SECONDS)

    def _discard(self, fd: int) -> None:
        if fd not in self._clients:
            return  # it has made room for another one in this turn
        client = self._clients[fd]
        client.reads += 1
        try:
            if client.sock.recv(4096) and client.reads < MOST_READS:  # agent-send, which tells us nothing
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close_client(fd)

    def _close_client(self, fd: int) -> None:
        self._clients.pop(fd).sock.close()

    def line(self) -> str:
        """Return the answer of this moment."""
        master = self._master
        if master.stopping:
            left = any(worker.stats.get("active", 0) or not worker.drained for worker in master.fleet.workers.values())
            return "drain\n" if left else "stopped\n"
        if master.in_maintenance:
            return "maint\n"
        if not master.ready:
            return f"down#{'starting' if master.state.value == 'starting' else 'no worker is ready'}\n"
        return f"ready up {room(master.fleet.active())}%\n"

    def close(self, *, keep_paths: bool) -> None:
        """Close everything; `keep_paths` leaves a Unix socket's path to another master."""
        for fd in list(self._clients):
            self._close_client(fd)
        with contextlib.suppress(OSError):
            self._sockets.close(keep_paths=keep_paths)

    def close_in_child(self) -> None:
        """Close the copies. Called in a forked process."""
        for client in self._clients.values():
            client.sock.close()
        self._sockets.close_copies()


def room(slots: Sequence[Slot]) -> int:
    """Return how much these slots can take on, in percent of what they could when idle; at least 1.

    In steps, so that a loop that is a millisecond late changes no weights.
    """
    if not slots:
        return 1
    return max(1, STEP * round(100 / STEP * sum(map(_room_of, slots)) / len(slots)))


def _room_of(slot: Slot) -> float:
    worker = slot.current if slot.current is not None and slot.current.ready_at else slot.next
    if worker is None or not slot.serves():
        return 0.0
    size, taken = worker.stats.get("pool_size"), worker.stats.get("handlers", 0)
    free = 1.0 - taken / size if size else 1.0
    # A loop that is LAG_SECONDS late counts half.
    return min(1.0, max(0.0, free) / ENOUGH_ROOM) * LAG_SECONDS / (LAG_SECONDS + worker.lag)
