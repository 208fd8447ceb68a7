"""Two clocks: durations and decisions go by the monotonic one, and what people read by the wall clock.

The wall clock is set: by a person, by NTP after a start with a wrong one, by a machine that is resumed. A stop that
went by it would wait an hour for first requests when it is set an hour back.
"""

from __future__ import annotations

from time import monotonic, time

#: A difference between the two clocks by more than so many seconds is the wall clock set anew, and not the time between
#: the two calls that read them.
STEP_SECONDS = 0.01

_offset = time() - monotonic()


def wall_time(moment: float) -> float:
    """When a moment of the monotonic clock was, in seconds since the epoch, by the wall clock as it is set now."""
    global _offset
    offset = time() - monotonic()
    # Otherwise the same moment would be another one at each call, by a microsecond.
    if abs(offset - _offset) > STEP_SECONDS:
        _offset = offset
    return moment + _offset
