"""Formats of messages, byte by byte."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import ConfigError, FramingError, LengthPrefix, LimitExceeded, Lines, Netstrings
from gtcpserver.framing import Found

FORMATS: list[Any] = [
    *(LengthPrefix(size) for size in (1, 2, 4, 8, "varint")),  # type: ignore[arg-type]
    LengthPrefix(4, byteorder="little"),
    Netstrings(),
    Lines(b"\r\n"),
    Lines(b"aab"),
]


@given(
    framing=st.sampled_from(FORMATS),
    messages=st.lists(
        st.binary(max_size=200).map(lambda data: data.replace(b"\n", b"").replace(b"b", b"")), max_size=4
    ),
    cuts=st.lists(st.integers(1, 60), max_size=30),
)
def test_messages_come_out_as_they_went_in_however_they_arrive(framing, messages, cuts) -> None:
    stream = b"".join(map(framing.encode, messages))
    data, place, searched, found = bytearray(), 0, 0, []
    pieces = iter([*cuts, *[len(stream)] * (len(stream) + 1)])
    while len(found) < len(messages):
        one = framing.find(data, searched)
        if isinstance(one, Found):
            found.append(bytes(data[one.start : one.end]))
            del data[: one.after]
            searched = 0
            continue
        assert one > len(data)
        assert place < len(stream)
        searched = len(data)
        data += stream[place : (place := place + next(pieces))]
    assert found == messages
    assert not data[:0] + data or place < len(stream) or not data


@pytest.mark.parametrize(
    ("framing", "framed"),
    [
        (LengthPrefix(1), b"\5hello"),
        (LengthPrefix(2), b"\0\5hello"),
        (LengthPrefix(4), struct.pack("!I", 5) + b"hello"),
        (LengthPrefix(8), struct.pack("!Q", 5) + b"hello"),
        (LengthPrefix(4, byteorder="little"), struct.pack("<I", 5) + b"hello"),
        (LengthPrefix("varint"), b"\5hello"),
        (Netstrings(), b"5:hello,"),
        (Lines(), b"hello\n"),
    ],
)
def test_frames_are_those_of_the_specifications(framing, framed) -> None:
    assert framing.encode(b"hello") == framed
    start, end, after = framing.find(framed + b"more", 0)
    assert (framed[start:end], after) == (b"hello", len(framed))


@pytest.mark.parametrize(
    ("number", "groups"),
    [(0, b"\0"), (1, b"\1"), (127, b"\x7f"), (128, b"\x80\1"), (300, b"\xac\2"), (16384, b"\x80\x80\1")],
)
def test_varints_of_protocol_buffers(number, groups) -> None:
    framing = LengthPrefix("varint")
    assert framing.encode(bytes(number))[: len(groups)] == groups
    assert framing.find(groups, 0) == (Found(1, 1, 1) if not number else len(groups) + number)
    padded = groups[:-1] + bytes([groups[-1] | 0x80]) + b"\0"  # as some encoders reserve its room
    assert framing.find(padded, 0) == (Found(2, 2, 2) if not number else len(padded) + number)


@pytest.mark.parametrize(
    ("framing", "data", "error"),
    [
        (LengthPrefix(4, 10), b"\0\0\0\x0b", LimitExceeded),
        (LengthPrefix(8, 10), b"\xff" * 8, LimitExceeded),
        (LengthPrefix("varint", 10), b"\x0b", LimitExceeded),
        (LengthPrefix("varint"), b"\xff" * 9 + b"\1", LimitExceeded),
        (LengthPrefix("varint"), b"\xff" * 9 + b"\2", FramingError),
        (LengthPrefix("varint"), b"\xff" * 10, FramingError),
        (Netstrings(10), b"11:", LimitExceeded),
        (Netstrings(10), b"123", LimitExceeded),
        (Netstrings(10), b"01:", FramingError),
        (Netstrings(10), b":", FramingError),
        (Netstrings(10), b"-1:", FramingError),
        (Netstrings(10), b"x", FramingError),
        (Netstrings(10), b"\xb2:", FramingError),  # a digit of Latin-1
        (Netstrings(10), b"2:ab;", FramingError),
        (Lines(limit=3), b"abcd", LimitExceeded),
        (Lines(limit=3), b"abcd\n", LimitExceeded),
        (Lines(b"\r\n", limit=3), b"abcd\r", LimitExceeded),
    ],
)
def test_what_a_peer_must_not_send(framing, data, error) -> None:
    with pytest.raises(LimitExceeded) as caught:
        framing.find(data, 0)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("framing", "data", "needed"),
    [
        (LengthPrefix(4), b"", 4),
        (LengthPrefix(4), b"\0\0\0", 4),
        (LengthPrefix(4), b"\0\0\0\5ab", 9),
        (LengthPrefix("varint"), b"\x80", 2),
        (Netstrings(), b"", 1),
        (Netstrings(), b"5", 2),
        (Netstrings(), b"0", 2),
        (Netstrings(), b"5:", 8),
        (Netstrings(), b"5:hello", 8),
        (Lines(limit=3), b"abc", 4),
        (Lines(b"\r\n", limit=3), b"abc\r", 5),
    ],
)
def test_an_unfinished_message_says_how_much_is_missing(framing, data, needed) -> None:
    assert framing.find(data, 0) == needed


@pytest.mark.parametrize(
    ("framing", "message", "error"),
    [
        (LengthPrefix(1, 1000), bytes(256), LimitExceeded),
        (LengthPrefix(4, 10), bytes(11), LimitExceeded),
        (Netstrings(10), bytes(11), LimitExceeded),
        (Lines(limit=10), bytes(11), LimitExceeded),
        (Lines(), b"a\nb", FramingError),
        (Lines(b"aba"), b"ab", FramingError),  # "ababa" would end earlier
    ],
)
def test_what_cannot_be_sent(framing, message, error) -> None:
    with pytest.raises(LimitExceeded) as caught:
        framing.encode(message)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LengthPrefix(3), 'prefix must be 1, 2, 4, 8 or "varint", got 3'),
        (lambda: LengthPrefix(True), 'prefix must be 1, 2, 4, 8 or "varint", got True'),
        (lambda: LengthPrefix(4.0), 'prefix must be 1, 2, 4, 8 or "varint", got 4.0'),
        (lambda: LengthPrefix(byteorder="middle"), 'byteorder must be "big" or "little"'),
        (lambda: LengthPrefix(limit=-1), "limit must be"),
        (lambda: Netstrings(None), "limit must be"),
        (lambda: Lines(""), "separator must be one or more bytes"),
        (lambda: Lines(b""), "separator must be one or more bytes"),
    ],
)
def test_arguments_that_make_no_format(make, told) -> None:
    with pytest.raises(ConfigError, match=told):
        make()
