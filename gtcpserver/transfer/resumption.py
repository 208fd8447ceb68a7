"""Resumption: what a relay needs to go on in another process (``relay(..., handover=True)``).

1. The old process pauses the relay: its watchers stop, and bytes that a receiver has not taken yet go into a pipe.
2. Both sockets, the pipes, and a description (counters, ends, times) are offered; whatever touches them ends the pause.
3. Once the new process is ready, the relay is given away here: it ends by ``HandedOver``, and closes nothing.
4. There the handler begins anew with both connections, and its call of ``relay`` goes on where this one was paused.
5. If the other process dies before it serves them, steps 3 and 4 happen in this one, with the same descriptors.

The options (timeouts, pace) are those of the new call; times that have passed count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from .pipes import PIPES, Pipe


@dataclass(slots=True)
class FlowState:
    """One direction.

    Attributes:
        moved: bytes given to the sink.
        done: it has ended.
        size: bytes under way, which are in the pipe.
        rest_until: monotonic time until which a paced flow rests.
        pipe: the pipe; None without bytes under way.
    """

    moved: int = 0
    done: bool = False
    size: int = 0
    rest_until: float = 0.0
    pipe: Pipe | None = None


@dataclass(slots=True)
class Resumption:
    """A relay between a client's connection and another one.

    Attributes:
        other: the other connection.
        there, back: the flows from the client, and to it.
        began: monotonic time of the relay's beginning.
        moved_at: monotonic time of the last progress; None: unknown.
        broken: the side that was reset, "client" or "other", and the error number; None: none was.
    """

    other: Any
    there: FlowState
    back: FlowState
    began: float
    moved_at: float | None
    broken: tuple[str, int] | None

    def discard(self) -> None:
        """Close the pipes."""
        for flow in (self.there, self.back):
            if flow.pipe is not None:
                PIPES.discard(flow.pipe)
                flow.pipe = None


def write(resumption: Resumption) -> dict[str, Any]:
    """Return the description, as JSON values; the pipes' descriptors go apart (`descriptors`)."""
    flows = [[flow.moved, flow.done, flow.size, flow.rest_until] for flow in (resumption.there, resumption.back)]
    return {
        "flows": flows,
        "began": resumption.began,
        "moved_at": resumption.moved_at,
        "broken": resumption.broken,
    }


def descriptors(resumption: Resumption) -> list[int]:
    """Return the descriptors of the pipes with bytes under way, which are to be sent to another process."""
    pipes = [flow.pipe for flow in (resumption.there, resumption.back) if flow.pipe is not None]
    for pipe in pipes:
        pipe.foreign = True  # whether it is taken there or not
    return [fd for pipe in pipes for fd in (pipe.output, pipe.input)]


def read(state: Mapping[str, Any], other: Any, fds: list[int]) -> Resumption:
    """Make a resumption of its description.

    Args:
        other: the other connection.
        fds: the descriptors of the pipes, which are taken out of this list.

    Raises:
        KeyError, TypeError, ValueError, OverflowError, OSError: it is none. No descriptor stays open but those in the
            list.
    """
    flows: list[FlowState] = []
    moved_at, broken, now = state["moved_at"], state["broken"], monotonic()
    if broken is not None:
        os.strerror(int(broken[1]))  # as the relay will call it
    resumption = Resumption(
        other,
        FlowState(),
        FlowState(),
        min(_time(state["began"]), now),
        None if moved_at is None else min(_time(moved_at), now),
        None if broken is None else (str(broken[0]), int(broken[1])),
    )
    for moved, done, size, rest_until in state["flows"]:
        flows.append(FlowState(int(moved), done is True, int(size), _time(rest_until)))
    resumption.there, resumption.back = flows
    if all(flow.done for flow in flows) or any(flow.done and flow.size for flow in flows):
        raise ValueError("a relay that has ended")
    try:
        for flow in flows:
            if flow.size:
                output, input_ = fds[:2]
                flow.pipe = PIPES.adopt(output, input_, flow.size)
                del fds[:2]
    except BaseException:
        resumption.discard()
        raise
    return resumption


def _time(value: Any) -> float:
    if not math.isfinite(found := float(value)):
        raise ValueError(f"not a time: {value!r}")
    return found
