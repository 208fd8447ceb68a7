"""The chunked coding (RFC 9112 section 7.1), parsed strictly. No I/O.

A proxy and an origin that disagree on where a body ends can be made to disagree on where the next request begins. So
nothing is guessed here: a size is hexadecimal digits and nothing else, every line ends with CR LF, and forwarded bodies
are rewritten, without the extensions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gtcpserver.errors import GtcpServerError

from .head import FIELD, MOST_FIELDS, Header

#: A size with its extensions, or a trailer field. h11: 16 KiB, nginx: 8 KiB.
LONGEST_LINE = 8 * 1024

#: All extensions of a body together, and all trailers. node.js accepts 16 KiB of extensions: chunks of one byte with an
#: extension each make the reader work for bytes that have no use (CVE-2024-22019).
MOST_OVERHEAD = 16 * 1024

# 15 digits are below 2**60: every 64-bit reader, signed or not, sees the same number.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?)")
_SIZE_OF_AN_ANSWER = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?| *)")

#: Lines in a piece passed to `feed`; each takes 1.5 us, whether its chunk has one byte or a thousand.
MANY_LINES = 500

LAST_CHUNK = b"0\r\n\r\n"


class ChunkError(GtcpServerError):
    """The body is malformed; its end is unknown."""


class ChunkReader:
    """Decode a chunked body, in whatever pieces it arrives.

    Args:
        of_answer: allow spaces after a size, with which some servers pad it to a fixed width.

    Attributes:
        done: the body is complete.
        rest: once it is: the bytes behind it.
        trailers: the fields after the last chunk.
        crowded: the last piece had more than MANY_LINES in it (at first: unknown, so True).
    """

    def __init__(self, of_answer: bool = False) -> None:
        self._size = _SIZE_OF_AN_ANSWER if of_answer else _SIZE
        self._kept = b""  # the beginning of a line
        self._left = 0  # of the chunk that is being read
        self._at_end_of_chunk = False
        self._in_trailers = False
        self._overhead = 0
        self.done = False
        self.crowded = True
        self.rest = b""
        self.trailers: list[Header] = []

    def feed(self, data: bytes) -> bytes:
        """Return the content in the next bytes.

        Raises:
            ChunkError: malformed. Nothing can follow.
        """
        if self._kept:
            data, self._kept = self._kept + data, b""
        pieces = []
        at = lines = 0
        while not self.done:
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                pieces.append(piece)
                if self._left:
                    break
                self._at_end_of_chunk = True
            elif self._at_end_of_chunk:
                mark = data[at : at + 2]
                if not b"\r\n".startswith(mark):
                    raise ChunkError("a chunk is longer than its size")
                if len(mark) < 2:
                    self._kept = mark
                    break
                at += 2
                self._at_end_of_chunk = False
            else:
                end = data.find(b"\n", at)
                if (len(data) if end < 0 else end) - at > LONGEST_LINE:
                    raise ChunkError(f"a line between chunks is longer than {LONGEST_LINE} bytes")
                if end < 0:
                    self._kept = data[at:]
                    break
                if data[end - 1 : end] != b"\r" or end == at:
                    raise ChunkError("a line between chunks does not end with CR LF")
                self._read_line(data[at : end - 1])
                lines += 1
                at = end + 1
        if data:
            self.crowded = lines > MANY_LINES
        if self.done:
            self.rest += data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_line(self, line: bytes) -> None:
        if self._in_trailers:
            self._read_trailer(line)
            return
        found = self._size.fullmatch(line)
        if found is None:
            raise ChunkError("the size of a chunk must be 1 to 15 hexadecimal digits")
        self._count(len(found[2]))
        self._left = int(found[1], 16)
        self._in_trailers = not self._left

    def _read_trailer(self, line: bytes) -> None:
        if not line:
            self.done = True
            return
        self._count(len(line))
        field = FIELD.fullmatch(line)
        if field is None or len(self.trailers) >= MOST_FIELDS:
            raise ChunkError(f"trailers must be at most {MOST_FIELDS} lines of the form Name: value")
        self.trailers.append((field[1], field[2].strip(b" \t")))

    def _count(self, overhead: int) -> None:
        self._overhead += overhead
        if self._overhead > MOST_OVERHEAD:
            raise ChunkError(f"extensions and trailers are longer than {MOST_OVERHEAD} bytes")


def chunk(data: bytes) -> bytes:
    """Return a chunk with this content, which must not be empty, since an empty chunk is the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Sequence[Header] = ()) -> bytes:
    """Return the end of a body."""
    if not trailers:
        return LAST_CHUNK
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in trailers) + b"\r\n"
