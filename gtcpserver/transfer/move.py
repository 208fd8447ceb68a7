"""Move: the common part of relay and pipe: flows, a sleeping greenlet, and one timer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from time import monotonic
from typing import Any

from gevent.hub import Waiter, get_hub

from gtcpserver.errors import DeadlineExceeded

from .buffered import BufferedFlow
from .ends import End, Stopped, is_plain, note_error, stream_of
from .flow import Flow

AnyFlow = Flow | BufferedFlow


class Move:
    """The flows of one transfer, and the greenlet that waits for them.

    Args:
        sockets: the two sockets of the flows.
        idle_timeout: seconds without progress until ``idle`` is called; None: never.
        watched: flows must ``tell`` each piece.
        lifetime: seconds until ``lived`` is called, regardless of progress; None: never.

    Attributes:
        flows: set by the derived class.
        timed: flows must set ``moved_at``, the monotonic time at which the last bytes were written.
        watched: as above.
        finished: the move has ended, for any reason.
        given_away: it goes on in another process.
        freeze: what stands in for the sockets while it is paused; None: nothing does.
    """

    flows: tuple[AnyFlow, ...]

    def __init__(
        self, sockets: tuple[Any, Any], idle_timeout: float | None, watched: bool, lifetime: float | None = None
    ) -> None:
        check_seconds("idle_timeout", idle_timeout)
        check_seconds("lifetime", lifetime)
        a, b = sockets
        a_is_plain, b_is_plain = is_plain(a), is_plain(b)  # check both before lending either
        self._ends: dict[Any, End] | None = None
        if a_is_plain and b_is_plain:
            end = End(a)
            self._ends = {a: end, b: end if a is b else End(b)}
        self._sockets = sockets
        self._buffered = False
        hub = get_hub()
        self._loop = hub.loop
        self._waiter = Waiter(hub)
        self._idle_timeout = idle_timeout
        self._deadline = min(deadline_of(a), deadline_of(b))
        self._lives_until = inf if lifetime is None else monotonic() + lifetime
        self._timer: Any = None
        self.finished = False
        self._error: BaseException | None = None
        self.timed = idle_timeout is not None
        self.watched = watched
        self.moved_at = 0.0
        self.given_away = False
        self.freeze: Any = None
        self._timeouts: list[tuple[Any, float | None]] = []

    def make_flow(
        self, source: Any, sink: Any, count: int | None = None, pace: Callable[[int], float] | None = None
    ) -> AnyFlow:
        if self._ends is None or pace is not None:
            self._buffered = True
            return BufferedFlow(self, source, sink, count, pace)
        return Flow(self, self._ends[source], self._ends[sink], count)

    def sleep(self) -> None:
        """Run the flows until ``finish`` or ``fail``."""
        self.moved_at = self.moved_at or monotonic()
        # An End has already suspended its socket's timeout.
        self._timeouts = [(sock, sock.gettimeout()) for sock in self._sockets] if self._buffered else []
        broke = True
        try:
            for sock, _ in self._timeouts:
                sock.settimeout(None)
            for flow in self.flows:
                flow.start()
            self._start_timer()
            self._waiter.get()
            broke = self._error is not None and not isinstance(self._error, TimeoutError)
        finally:
            self._stop()
            for flow in self.flows:
                flow.join()
                if broke and not self.given_away:
                    flow.pass_on_reset()
            for sock, timeout in self._timeouts:
                sock.settimeout(timeout)
            # Break the references between flows and sockets: no work for the garbage collector.
            self.flows = ()
            self._ends = None
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Stop the flows and wake the greenlet. Idempotent."""
        if not self.finished:
            self._stop()
            # Scheduled, not switched to at once: the caller may not be finished.
            self._loop.run_callback(self._waiter.switch, None)

    def fail(self, error: BaseException) -> None:
        """Finish and raise the error in the waiting greenlet."""
        if not self.finished:
            self._error = error
            self.finish()

    def _stop(self) -> None:
        self.finished = True
        if self.freeze is not None:
            self.freeze.touched()
        for flow in self.flows:
            flow.stop()
        self._stop_timer()

    # -- in another process (resumption.py), all in the hub ------------------------------------------------------------

    def pause(self) -> bool:
        """Neither read nor write until `go_on`; return False, and do nothing, if that is not possible now."""
        paused: list[AnyFlow] = []
        for flow in self.flows:
            try:
                is_paused = flow.pause()
            except MemoryError:
                is_paused = False
            if not is_paused:
                self._go_on(paused)
                return False
            paused.append(flow)
        self._stop_timer()
        return True

    def go_on(self) -> None:
        """End the pause; do nothing if the move has ended meanwhile."""
        if not self.finished:
            self._go_on(self.flows)
            self._stop_timer()
            self._start_timer()

    def _go_on(self, flows: Iterable[AnyFlow]) -> None:
        try:
            for flow in flows:
                flow.go_on()
        except Exception as error:  # closed meanwhile, another greenlet reads from it, or memory ran out
            self.fail(error)

    def give_away(self) -> None:
        """End the paused flows: their sockets and pipes, which stay open, belong to another process."""
        self.finished = self.given_away = True
        for flow in self.flows:
            flow.give_away()

    def timeout_of(self, sock: Any) -> float | None:
        """Return the timeout that a socket has outside of the move."""
        for one, timeout in self._timeouts:
            if one is sock:
                return timeout
        timeout_now: float | None = sock.gettimeout()
        return timeout_now

    def tell(self, flow: AnyFlow, size: int) -> None:
        """Note that the sink took ``size`` bytes. Called only if ``watched``."""
        try:
            self.moved(flow, size)
        except BaseException as error:
            self.fail(error)
            raise Stopped from None

    # -- told by flows, answered by the derived class -----------------------------------------------------------------

    def moved(self, flow: AnyFlow, size: int) -> None:
        """Note that the sink took ``size`` bytes."""
        raise NotImplementedError

    def flow_ended(self, flow: AnyFlow) -> None:
        """Note that the source has ended and the sink has everything."""
        raise NotImplementedError

    def read_failed(self, flow: AnyFlow, error: OSError) -> None:
        raise NotImplementedError

    def write_failed(self, flow: AnyFlow, error: OSError) -> None:
        raise NotImplementedError

    def idle(self) -> None:
        """Handle that nothing moved for ``idle_timeout``."""
        raise NotImplementedError

    def lived(self) -> None:
        """Handle that the lifetime is over."""
        raise NotImplementedError

    # -- time --------------------------------------------------------------------------------------------------------

    def be_idle_after(self, seconds: float) -> None:
        """Change the idle timeout from now on."""
        self._idle_timeout = seconds
        self.moved_at = monotonic()
        self._stop_timer()
        self._start_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _start_timer(self) -> None:
        until = min(self._deadline, self._lives_until)
        if self._idle_timeout is not None:
            until = min(until, self.moved_at + self._idle_timeout)
        if until < inf and not self.finished:
            # One timer for the whole move: when it fires early it is restarted for the remaining time.
            self._timer = self._loop.timer(max(0.0, until - monotonic()))
            self._timer.start(self._on_timer, update=True)

    def _on_timer(self) -> None:
        self._stop_timer()
        now = monotonic()
        if now >= self._deadline:
            error = DeadlineExceeded("the deadline for this block of calls has passed")
            note_error(min(self._sockets, key=deadline_of), error)
            self.fail(error)
        elif now >= self._lives_until:
            self.lived()
        elif self._idle_timeout is not None and now >= self.moved_at + self._idle_timeout:
            # After the loop was blocked, the timer fires before the events that would have prevented it.
            if not any(flow.pending() for flow in self.flows):
                self.idle()
            else:
                self.moved_at = now
                self._start_timer()
        else:
            self._start_timer()


def check_seconds(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be more than 0 seconds, or None, got {value!r}")


def deadline_of(sock: Any) -> float:
    """Return the monotonic deadline of a Connection; inf without one, or for any other socket."""
    stream = stream_of(sock)
    return inf if stream is None or stream.deadline is None else stream.deadline
