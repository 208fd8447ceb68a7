"""An example conversation: what a good client sends, and what it expects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

from gtcpserver.errors import ConfigError

from .client import Client

#: b"...": exactly these bytes; a pattern: bytes that it matches from their start.
Expected: TypeAlias = "bytes | re.Pattern[bytes]"

#: (bytes that the client sends, the answer it expects).
Turn: TypeAlias = "tuple[bytes, Expected]"

#: Bytes within which a pattern must match.
MOST_FOR_A_PATTERN = 1 << 20


class WrongAnswer(Exception):
    """The server did not send the expected answer."""


class Conversation:
    """The turns of an example, validated.

    Args:
        turns: (bytes to send, expected) pairs; b"" sends nothing, or expects nothing.

    Attributes:
        sent: all bytes that the client sends.

    Raises:
        ConfigError: ``turns`` has another form.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        self.turns: list[Turn] = []
        for turn in turns:
            match turn:
                case (bytes(), bytes() | re.Pattern()) if not isinstance(turn[1], re.Pattern) or isinstance(
                    turn[1].pattern, bytes
                ):
                    self.turns.append(turn)
                case _:
                    raise ConfigError(
                        f"conversation must be (bytes to send, bytes or pattern of bytes to expect) pairs, got {turn!r}"
                    )
        self.sent = b"".join(data for data, _ in self.turns)
        if not self.turns or not (self.sent or any(expected != b"" for _, expected in self.turns)):
            raise ConfigError("conversation must send or expect something, got nothing")

    def play(self, client: Client) -> None:
        """Send each turn after the answer to the previous one.

        Raises:
            WrongAnswer: a wrong answer or none, or the connection ended.
        """
        for data, expected in self.turns:
            self._send(client, data)
            self.expect(client, expected, data)

    def expect_all(self, client: Client) -> None:
        """Read the answers to all turns, after all were sent. Raises WrongAnswer."""
        for data, expected in self.turns:
            self.expect(client, expected, data)

    def expect(self, client: Client, expected: Expected, after: bytes) -> None:
        """Read the next expected answer. Raises WrongAnswer."""
        got = b""
        try:
            if isinstance(expected, bytes):
                while len(got) < len(expected) and expected.startswith(got) and (more := _read(client)):
                    got += more
                if got.startswith(expected):
                    client.unread(got[len(expected) :])
                    return
            else:
                while not (found := expected.match(got)) and len(got) < MOST_FOR_A_PATTERN and (more := _read(client)):
                    got += more
                if found:
                    client.unread(got[found.end() :])
                    return
        except TimeoutError:
            raise WrongAnswer(f"{_expected(expected, after)}, got {short(got)} and no more") from None
        except OSError as error:
            raise WrongAnswer(f"{_expected(expected, after)}, got {short(got)} and {error}") from error
        raise WrongAnswer(f"{_expected(expected, after)}, got {short(got)}")

    def _send(self, client: Client, data: bytes) -> None:
        try:
            client.sendall(data)
        except OSError as error:
            raise WrongAnswer(f"could not send {short(data)}: {str(error) or type(error).__name__}") from error


def _read(client: Client) -> bytes:
    return client.recv()


def _expected(expected: Expected, after: bytes) -> str:
    what = short(expected) if isinstance(expected, bytes) else f"what matches {expected.pattern!r}"
    return f"expected {what} after {short(after)}" if after else f"expected {what}"


def short(data: bytes) -> str:
    """Return the repr of bytes, without the middle if it is long."""
    if not data:
        return "nothing"
    return repr(data) if len(data) <= 80 else f"{data[:40]!r}...{data[-20:]!r} ({len(data)} bytes)"
