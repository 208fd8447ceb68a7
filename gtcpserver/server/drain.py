"""Drain: accept what the kernel has queued on listening sockets that get no new connections, and close them.

Also `Steps`, the list of steps of a stop, of which this is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event

from gtcpserver.connection.connection import Connection
from gtcpserver.listening.draining import HANDSHAKE_SECONDS, handshakes_under_way, queue_length
from gtcpserver.plural import counted

from .acceptor import Acceptor

log = logging.getLogger("gtcpserver")

#: Most seconds that a stop waits for handshakes under way. Distant clients need a round trip. With defer_accept, and
#: where the system refuses socket filters (see draining), a client that has sent nothing comes through only after the
#: kernel repeats its SYN-ACK, 1 s later.
LONGEST_DRAIN = 1.0
LONGEST_DRAIN_OF_DEFERRED = 2.5


class Steps:
    """The steps of a stop: each is done even if those before it failed.

    Attributes:
        failures: the steps that failed, with the error of each.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    def do(self, what: str, step: Callable[..., Any], *arguments: Any) -> Any:
        """Do a step; return its result, or None if it failed."""
        try:
            return step(*arguments)
        except Exception as error:
            self.failed(what, error)
            return None

    def failed(self, what: str, error: BaseException | str) -> None:
        """Record that a step failed, and log it once."""
        failure = f"{what}: {str(error) or type(error).__name__}"
        if failure not in self.failures:
            self.failures.append(failure)
            log.error("stopping: %s", failure)


def drain_and_close(
    acceptors: Sequence[Acceptor],
    admit: Callable[[Connection, Any], Any],
    longest: float,
    hurry: Event,
    steps: Steps | None = None,
) -> None:
    """Accept what the kernel has queued until no handshake is under way, and close.

    Args:
        acceptors: accept loops whose sockets get no new connections (muted, or steered away from).
        admit: called with each connection and its address; it must not wait.
        longest: most seconds to wait for handshakes.
        hurry: event that ends the wait.
        steps: records what fails; None when a single accept loop is closed.
    """
    steps = steps or Steps()
    for acceptor in acceptors:
        acceptor.leaving = True
        steps.do("accept no more", acceptor.stop_accepting)
        steps.do("drain", acceptor.drain, admit)
    give_up = monotonic() + longest
    while True:
        # Handshakes that were under way join the queue now.
        steps.do("wait for handshakes", gevent.sleep, HANDSHAKE_SECONDS)
        for acceptor in acceptors:
            steps.do("drain", acceptor.drain, admit)
        if monotonic() > give_up or hurry.is_set() or not any(map(_expects_more, acceptors)):
            break
    for acceptor in acceptors:
        steps.do("drain", acceptor.drain, admit)
        listener = acceptor.listener
        if listener.owned and not acceptor.closed and (left := queue_length(listener.socket)):
            steps.failed(
                "drain", f"{counted(left, 'connection')} in the queue of {listener.address} could not be accepted"
            )
        steps.do("close the accept loop", acceptor.close)
        steps.do("close the listening socket", listener.close)


def _expects_more(acceptor: Acceptor) -> bool:
    # If another process has the socket too, that one serves its queue.
    if not acceptor.listener.owned or acceptor.closed:
        return False
    # After a drain, only connections for which descriptors ran out are queued: handlers that end free some.
    sock = acceptor.listener.socket
    return bool(handshakes_under_way(sock)) or queue_length(sock) > 0
