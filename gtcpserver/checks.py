"""Checks of numbers given as options: one clear message that names the field, the value and what was expected."""

from __future__ import annotations

import math
from typing import Any

from .errors import ConfigError


def check_whole_number(name: str, value: Any, *, least: int, none: str | None = None) -> None:
    """Raise ConfigError unless ``value`` is a whole number from ``least`` (None too, if ``none`` says what it is)."""
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}{_or_none(none)}, got {value!r}")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, none: str | None = None
) -> None:
    """Raise ConfigError unless ``value`` is a finite number within its bound (or None, as above)."""
    if value is None and none is not None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if not good or (least is not None and value < least) or (above is not None and not value > above):
        bound = f"more than {above}" if above is not None else f"{least} or more"
        raise ConfigError(f"{name} must be a number, {bound}{_or_none(none)}, got {value!r}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _or_none(none: str | None) -> str:
    return f", or None {none}" if none is not None else ""
