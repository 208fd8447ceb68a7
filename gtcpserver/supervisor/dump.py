"""The stacks of a process that does not answer: those of every thread and greenlet, identical ones once."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from types import CodeType, FrameType

from gevent import monkey
from greenlet import greenlet

from gtcpserver.diagnostics.frames import frames_of_threads

# The original one: in a monkey-patched program the replacement numbers greenlets.
_get_ident = monkey.get_original("_thread", "get_ident")

Place = tuple[tuple[CodeType, int], ...]

#: Maximum number of different stacks printed. Thousands of connections stand in a handful of places.
MAX_STACKS = 40


def format_stacks(interrupted: FrameType | None = None) -> str:
    """Return all stacks of this process as text.

    Args:
        interrupted: the frame that a signal handler interrupted: the place where the event loop is blocked.
    """
    parts = []
    if interrupted is not None:
        parts.append("running now:\n" + "".join(traceback.format_stack(interrupted)))
    current = _get_ident()  # a signal handler runs in the main thread
    for thread, frame in frames_of_threads().items():
        if thread != current:
            parts.append(f"thread {thread}:\n" + "".join(traceback.format_stack(frame)))
    waiting: Counter[Place] = Counter()
    example: dict[Place, FrameType] = {}
    for one in gc.get_objects():
        if isinstance(one, greenlet) and (frame := one.gr_frame) is not None:  # None: it is running, or has not started
            place = _place(frame)
            waiting[place] += 1
            example[place] = frame
    for place, count in waiting.most_common(MAX_STACKS):
        stack = "".join(traceback.format_stack(example[place]))
        parts.append(f"{count} greenlet{'s' if count > 1 else ''}:\n{stack}")
    left_out = len(waiting) - MAX_STACKS
    if left_out > 0:
        parts.append(f"and greenlets at {left_out} other places\n")
    return "\n".join(parts)


def _place(frame: FrameType | None) -> Place:
    place = []
    while frame is not None:
        place.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(place)
