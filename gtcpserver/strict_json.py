"""JSON that every parser accepts (RFC 8259), from whatever programs count and log.

Python's json writes NaN and Infinity, which are no JSON (RFC 8259 section 6): one such field makes a line unreadable to
jq, Go, JavaScript and every log collector. They become null, as in JSON.stringify (ECMA-262).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

MAX_DEPTH = 16  # of nested objects; log fields have two or three levels. Deeper ones become text

#: Larger whole numbers become text: Python does not print thousands of digits (sys.set_int_max_str_digits).
LARGEST_NUMBER = 2**256

SHORTEST = 16  # characters; texts are not cut any shorter


def _encoder(**options: Any) -> Callable[[Any], str]:
    encode: Callable[[Any], str] = json.JSONEncoder(allow_nan=False, default=str, **options).encode
    return encode


_encode = _encoder()


def to_json(value: Any, indent: int | None = None) -> str:
    """Write a value as JSON, in ASCII; unsupported values become text, numbers that are not finite null.

    Never raises for what a value is.
    """
    encode = _encode if indent is None else _encoder(indent=indent)
    try:
        return encode(value)
    except Exception:
        # Numbers, keys that are not strings, a value that refers to itself, or an object's own methods.
        return encode(_plain(value, MAX_DEPTH))


def to_short_json(fields: Mapping[str, Any], longest: int) -> str:
    """Write an object in at most ``longest`` bytes: the longest texts and names lose their middle, then other fields
    are left out."""
    line = to_json(fields)
    most = longest
    while len(line) > longest and most > SHORTEST:
        most //= 2
        fields = {_shorter(as_text(name), most): _shorter(value, most) for name, value in fields.items()}
        line = to_json(fields)
    while len(line) > longest and len(fields) > 1:
        fields = dict(list(fields.items())[: len(fields) // 2])
        line = to_json(fields)
    return line


def _shorter(value: Any, most: int) -> Any:
    text = value if isinstance(value, str) else to_json(value)
    if len(text) <= most:
        return value
    return f"{text[: most // 2]}... {len(text) - most} characters cut ...{text[-(most // 2) :]}"


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if -LARGEST_NUMBER < value < LARGEST_NUMBER else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > 0:
        with suppress(Exception):  # raised by the value's own methods
            if isinstance(value, Mapping):
                return {as_text(key): _plain(one, depth - 1) for key, one in value.items()}
            if isinstance(value, (list, tuple)):
                return [_plain(one, depth - 1) for one in value]
    return as_text(value)


def as_text(value: Any) -> str:
    """Return str(value), or the kind of value if that fails."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"
