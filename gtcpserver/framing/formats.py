"""The formats of messages: length prefixes, netstrings, lines."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

from gtcpserver.checks import check_whole_number
from gtcpserver.errors import ConfigError, FramingError, LimitExceeded

#: Most bytes of a message, if none are given. The same as of ``recv_until``; asyncio's streams have it, too.
DEFAULT_LIMIT = 64 * 1024

#: Bytes of a length prefix; "varint": 1 to 10, as of Protocol Buffers (base 128, least significant group first).
PrefixSize = Literal[1, 2, 4, 8, "varint"]

#: Bytes of the longest varint, of a number of 64 bits (protobuf.dev, "Encoding").
LONGEST_VARINT = 10


class Found(NamedTuple):
    """A whole message in a buffer: its bytes are ``data[start:end]``, and the next one begins at ``after``.

    Example::

        from gtcpserver import Netstrings

        data = b"5:hello,5:wor"
        found = Netstrings().find(data, 0)
        print(data[found.start : found.end])  # b'hello'
        print(data[found.after :])  # b'5:wor'
    """

    start: int
    end: int
    after: int


class Framing(Protocol):
    """What :meth:`Connection.frames` needs of a format; your own may have it, too. No I/O, and no state.

    Example::

        from gtcpserver.framing import Found

        class Blocks:  # messages of 16 bytes
            def encode(self, message):
                return message.ljust(16)

            def find(self, data, searched):
                return Found(0, 16, 16) if len(data) >= 16 else 16

        def handle(conn):
            for block in conn.frames(Blocks()):
                conn.sendall(block)
    """

    def encode(self, message: bytes) -> bytes:
        """Return a message with its frame. Raise LimitExceeded or FramingError if it cannot be framed."""
        ...

    def find(self, data: bytes | bytearray, searched: int) -> Found | int:
        """Find the first message.

        Args:
            data: bytes received, from the start of a message on.
            searched: number of them that the last call for this message had already.

        Returns:
            where it is, or the least number of bytes that ``data`` must have for the next call, more than it has now.

        Raises:
            LimitExceeded: the message is longer than allowed.
            FramingError: this is no frame.
        """
        ...


class LengthPrefix:
    """Messages behind their length.

    Args:
        size: bytes of the prefix, 1, 2, 4 or 8; or "varint".
        limit: most bytes of a message, without its prefix.
        byteorder: of the prefix; network byte order is "big".

    Raises:
        ConfigError: an invalid argument.

    Example::

        from gtcpserver import LengthPrefix

        def handle(conn):
            frames = conn.frames(LengthPrefix(2, limit=1000, byteorder="little"))
            for message in frames:
                frames.send(message.upper())
    """

    def __init__(
        self, size: PrefixSize = 4, limit: int = DEFAULT_LIMIT, byteorder: Literal["big", "little"] = "big"
    ) -> None:
        if size not in get_args(PrefixSize) or not isinstance(size, (int, str)) or isinstance(size, bool):
            raise ConfigError(f'prefix must be 1, 2, 4, 8 or "varint", got {size!r}')
        if byteorder not in ("big", "little"):
            raise ConfigError(f'byteorder must be "big" or "little", got {byteorder!r}')
        check_whole_number("limit", limit, least=0)
        self.size = size
        self.byteorder = byteorder
        self.limit = limit if size == "varint" else min(limit, 256**size - 1)

    def encode(self, message: bytes) -> bytes:
        size = len(message)
        if size > self.limit:
            raise LimitExceeded(f"a message of {size} bytes, more than {self.limit}")
        prefix = _varint(size) if self.size == "varint" else size.to_bytes(self.size, self.byteorder)
        return prefix + message

    def find(self, data: bytes | bytearray, searched: int) -> Found | int:
        if self.size == "varint":
            read = _read_varint(data)
            if read is None:
                return len(data) + 1
            size, start = read
        else:
            start = self.size
            if len(data) < start:
                return start
            size = int.from_bytes(data[:start], self.byteorder)
        if size > self.limit:
            raise LimitExceeded(f"a message of {size} bytes, more than {self.limit}")
        end = start + size
        return Found(start, end, end) if len(data) >= end else end


class Netstrings:
    """Netstrings, ``5:hello,`` (cr.yp.to/proto/netstrings.txt).

    Args:
        limit: most bytes of a message.

    Raises:
        ConfigError: an invalid limit.

    Example::

        from gtcpserver import Netstrings

        def handle(conn):
            frames = conn.frames(Netstrings(limit=1000))
            for message in frames:
                frames.send(message.upper())  # "2:hi," is answered with "2:HI,"
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        check_whole_number("limit", limit, least=0)
        self.limit = limit
        self._most_digits = len(str(limit))

    def encode(self, message: bytes) -> bytes:
        if len(message) > self.limit:
            raise LimitExceeded(f"a message of {len(message)} bytes, more than {self.limit}")
        return b"%d:%b," % (len(message), message)

    def find(self, data: bytes | bytearray, searched: int) -> Found | int:
        head = bytes(data[: self._most_digits + 1])
        digits, colon, _ = head.partition(b":")
        if digits and not digits.isdigit():
            raise FramingError(f"no netstring: it begins with {head!r}")
        if len(digits) > 1 and digits.startswith(b"0"):
            raise FramingError(f"no netstring: its length begins with 0: {head!r}")
        if not colon:
            if len(head) > self._most_digits:
                raise LimitExceeded(f"a message of more than {self.limit} bytes")
            return len(data) + 1
        if not digits:
            raise FramingError("no netstring: it has no length")
        size, start = int(digits), len(digits) + 1
        if size > self.limit:
            raise LimitExceeded(f"a message of {size} bytes, more than {self.limit}")
        end = start + size
        if len(data) <= end:
            return end + 1
        if data[end] != 0x2C:
            raise FramingError(f"no netstring: {bytes(data[end : end + 1])!r} behind its {size} bytes, not a comma")
        return Found(start, end, end + 1)


class Lines:
    r"""Messages that end with a separator, which is not part of them.

    Args:
        separator: the bytes behind each message.
        limit: most bytes of a message, without the separator.

    Raises:
        ConfigError: an invalid argument.

    Example::

        from gtcpserver import Lines

        def handle(conn):
            lines = conn.frames(Lines(b"\r\n", limit=512))
            for line in lines:
                lines.send(line.upper())
    """

    def __init__(self, separator: bytes = b"\n", limit: int = DEFAULT_LIMIT) -> None:
        if not isinstance(separator, bytes) or not separator:
            raise ConfigError(f"separator must be one or more bytes, got {separator!r}")
        check_whole_number("limit", limit, least=0)
        self.separator = separator
        self.limit = limit

    def encode(self, message: bytes) -> bytes:
        if len(message) > self.limit:
            raise LimitExceeded(f"a message of {len(message)} bytes, more than {self.limit}")
        framed = message + self.separator
        if framed.find(self.separator) != len(message):
            raise FramingError(f"a message that contains its separator {self.separator!r}")
        return framed

    def find(self, data: bytes | bytearray, searched: int) -> Found | int:
        # Nothing is searched twice, however slowly a peer sends.
        end = data.find(self.separator, max(0, searched - len(self.separator) + 1))
        if end > self.limit or (end < 0 and len(data) >= self.limit + len(self.separator)):
            raise LimitExceeded(f"no {self.separator!r} within {self.limit} bytes")
        return Found(0, end, end + len(self.separator)) if end >= 0 else len(data) + 1


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _read_varint(data: bytes | bytearray) -> tuple[int, int] | None:
    """Return a number and the bytes it takes; None if it is not complete."""
    number = 0
    for place, byte in enumerate(data[:LONGEST_VARINT]):
        number |= (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            if number >= 1 << 64:
                break
            return number, place + 1
    else:
        if len(data) < LONGEST_VARINT:
            return None
    raise FramingError("no varint of 64 bits")
