"""What fuzzers share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any


class Choices:
    """Decisions taken from the beginning of an input, and the rest of it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)

    def number(self, most: int) -> int:
        """0 to ``most``, from one byte or two; 0 when all are used up."""
        size = 1 if most < 256 else 2
        return int.from_bytes(self.bytes(size), "big") % (most + 1)

    def bytes(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.bytes(len(self._data))


def random_of(data: bytes) -> Random:
    """The same choices for the same input."""
    return Random(zlib.crc32(data))


def cuts_of(data: bytes, most: int = 4) -> list[int]:
    """Some places to cut it at, in order."""
    return sorted({random_of(data).randrange(len(data) + 1) for _ in range(most)})


def pieces_of(data: bytes, most: int = 4) -> list[bytes]:
    """The input in pieces, none of them empty."""
    places = [0, *cuts_of(data, most), len(data)]
    return [data[start:end] for start, end in pairwise(places) if start < end]


REFUSED = object()


def outcome(call: Callable[[], Any], refusals: type[Exception] | tuple[type[Exception], ...]) -> Any:
    """What it returns; REFUSED if it raises one of these."""
    try:
        return call()
    except refusals:
        return REFUSED


def check_prefixes(parse: Callable[[bytes], Any], data: bytes, refusals: type[Exception]) -> Any:
    """A parser that returns (message, size), None for "more must come", or raises, says the same however much has come.

    Returns:
        The message and its size, None or REFUSED.
    """
    whole = outcome(lambda: parse(data), refusals)
    cuts: Sequence[int] = cuts_of(data)
    if whole is not None and whole is not REFUSED:
        size = whole[1]
        assert 0 < size <= len(data), f"a message of {size} of {len(data)} bytes"
        assert parse(data[:size]) == whole, "bytes behind the message change it"
        assert parse(data[: size - 1]) is None, "the message was complete before its end"
        cuts = [cut % size for cut in cuts]
    for cut in cuts:
        part = outcome(lambda cut=cut: parse(data[:cut]), refusals)
        if part is None:
            assert whole is None or whole is REFUSED or whole[1] > cut
        elif part is REFUSED:
            assert whole is REFUSED, f"refused after {cut} bytes, taken after {len(data)}"
        else:
            assert part == whole, f"another message after {cut} bytes"
    return whole
