"""Two clocks: durations and decisions use the monotonic one, people read the wall clock.

The wall clock can be set: by a person, by NTP after a start with the wrong time, by a machine that is resumed. A stop
that relied on it would wait an hour for first requests when it is set back by an hour.
"""

from __future__ import annotations

from time import monotonic, time

#: Seconds: if the two clocks differ by more than this, the wall clock was set; less is the time between the two calls
#: that read them.
STEP_SECONDS = 0.01

_offset = time() - monotonic()


def wall_time(moment: float) -> float:
    """Return the time of a monotonic moment in seconds since the epoch, by the wall clock as currently set."""
    global _offset
    offset = time() - monotonic()
    # Otherwise the same moment would differ by a microsecond at each call.
    if abs(offset - _offset) > STEP_SECONDS:
        _offset = offset
    return moment + _offset
