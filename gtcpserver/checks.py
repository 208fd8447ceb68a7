"""Checks of numbers given as options: one clear message that names the field, the value and what was expected."""

from __future__ import annotations

import math
import sys
from typing import Any

from .errors import ConfigError

#: Digits of a number in a message: those of 64 bits have 20.
MOST_DIGITS = 40


def check_whole_number(name: str, value: Any, *, least: int, most: int = sys.maxsize, none: str | None = None) -> None:
    """Raise ConfigError unless ``value`` is a whole number within its bounds (None too, if ``none`` says what it is).

    Args:
        most: by default the largest that counters in C can hold.
    """
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        is_huge = isinstance(value, int) and value > most
        to = f" to {most}" if is_huge or most != sys.maxsize else ""
        raise ConfigError(f"{name} must be a whole number from {least}{to}{_or_none(none)}, got {shown(value)}")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, none: str | None = None
) -> None:
    """Raise ConfigError unless ``value`` is a finite number within its bound (or None, as above)."""
    if value is None and none is not None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if not good or (least is not None and value < least) or (above is not None and not value > above):
        bound = f"more than {above}" if above is not None else f"{least} or more"
        raise ConfigError(f"{name} must be a number, {bound}{_or_none(none)}, got {shown(value)}")


def shown(value: Any) -> str:
    """Return the repr() of a value for a message, shortened if it is a number without end."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a longer number"
    return text if len(text) <= MOST_DIGITS or not isinstance(value, int) else f"{text[:MOST_DIGITS]}..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _or_none(none: str | None) -> str:
    return f", or None {none}" if none is not None else ""
