"""Framing: where a message ends in a stream of bytes. Without I/O: connection/frames.py reads and writes."""

from .formats import DEFAULT_LIMIT, Found, Framing, LengthPrefix, Lines, Netstrings

__all__ = ["DEFAULT_LIMIT", "Found", "Framing", "LengthPrefix", "Lines", "Netstrings"]
