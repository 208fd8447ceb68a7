"""Lines of logs, and what clients can have put into them."""

from __future__ import annotations

import json
import logging
import re
import sys
import unicodedata
from typing import Any

from fuzz.engine import Target
from fuzz.targets.helpers import Choices
from gtcpserver.diagnostics.logs import JsonFormatter, NonBlockingHandler, TextFormatter
from gtcpserver.server.access_log import write_line
from gtcpserver.strict_json import as_text

RECORD_BEGINS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ gtcpserver: ")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


_DEEP = _nested(20_000)
_HUGE = 1 << 20_000


def _value(choices: Choices, depth: int = 0) -> Any:
    """Of any type that a handler may note, or a logging call have in its `extra`."""
    kind = choices.number(11)
    if kind <= 3:
        return _text(choices.bytes(choices.number(40)))
    if kind == 4:
        return choices.number(65535) - 100
    if kind == 5:
        return [float("nan"), float("inf"), -float("inf"), 1.5, 1e300][choices.number(4)]
    if kind == 6:
        return [None, True, False, ..., object, _HUGE][choices.number(5)]
    if kind == 7:
        return choices.bytes(choices.number(10))
    if depth > 3:
        return ""
    if kind == 8:
        return [_value(choices, depth + 1) for _ in range(choices.number(3))]
    if kind == 9:
        return {
            _value(choices, 9) if choices.number(1) else "k": _value(choices, depth + 1)
            for _ in range(choices.number(3))
        }
    if kind == 10:
        endless: list[Any] = []
        endless.append(endless)
        return endless
    return _DEEP


def _not_in_json(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def _read_json(line: str) -> Any:
    assert line.isascii()
    assert line.isprintable(), "not one line"
    return json.loads(line, parse_constant=_not_in_json)


def _check_safe(line: str) -> None:
    """Nothing that ends a line, drives a terminal, or turns the direction of writing."""
    for character in line:
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp"), f"{character!r}"
        assert unicodedata.bidirectional(character) not in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )


_HANDLER = NonBlockingHandler(-1)


def log_line(data: bytes) -> None:
    choices = Choices(data)
    words = _text(choices.bytes(choices.number(300))) * (400 if choices.number(15) == 15 else 1)
    form = ("%s", "%d", "%s %s")[max(0, choices.number(7) - 5)]
    record = logging.LogRecord("gtcpserver", logging.WARNING, __file__, 1, form, (words,), None)
    if choices.number(2) == 2:
        try:
            raise ValueError(_text(choices.bytes(choices.number(300))))
        except ValueError:
            record.exc_info = sys.exc_info()
    for _ in range(choices.number(4)):
        name = _text(choices.bytes(choices.number(8)))
        record.__dict__.setdefault(f"x{name}", _value(choices))
    text = TextFormatter().format(record)
    first, *indented = text.split("\n")
    assert RECORD_BEGINS.match(first)
    for line in (first, *indented):
        _check_safe(line)
    assert all(line.startswith("    ") for line in indented)
    assert bool(indented) == bool(record.exc_info)
    fields = _read_json(JsonFormatter().format(record))
    assert form != "%s" or len(words) > 5000 or fields["message"] == words
    assert fields["logger"] == "gtcpserver"
    # As it goes out: a line, which JSON still is when a long record is cut.
    _HANDLER.setFormatter(JsonFormatter())
    written = _HANDLER._encode(record).decode("ascii")
    assert written.endswith("\n")
    assert len(written) <= 70_000
    assert set(_read_json(written[:-1])) == set(fields)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def access_line(data: bytes) -> None:
    """The text can be taken apart again into the same fields; JSON is JSON."""
    choices = Choices(data)
    fields = {"time": "2026-01-31", "client": _text(choices.bytes(choices.number(60)))}
    for _ in range(choices.number(5)):
        fields.setdefault(_text(choices.bytes(choices.number(20))), _value(choices))
    log = logging.Logger("access", logging.INFO)
    kept = _Lines()
    log.addHandler(kept)
    write_line(log, fields, "text")
    write_line(log, fields, "json")
    text, line = kept.lines
    assert text.isascii()
    assert text.isprintable()
    expected = [(name, as_text(value)) for name, value in fields.items() if name != "time" and value is not None]
    assert _take_apart(text) == expected
    read = _read_json(line)
    assert list(read) == list(fields)
    for name, value in fields.items():
        if value is None or isinstance(value, (str, bool, int)):
            assert read[name] == value or (isinstance(value, int) and value.bit_length() > 1000)


def _take_apart(text: str) -> list[tuple[str, str]]:
    fields = []
    at = 0
    while at < len(text):
        name, at = _word(text, at)
        assert text[at : at + 1] == "=", f"no = at {at}"
        value, at = _word(text, at + 1)
        assert text[at : at + 1] in (" ", "")
        at += 1
        fields.append((name, value))
    return fields


def _word(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] == '"':
        value, end = json.JSONDecoder().raw_decode(text, at)
        assert isinstance(value, str)
        return value, end
    found = re.compile(r'[^ "=\\]*').match(text, at)
    assert found is not None
    return found[0], found.end()


_TEXTS = (
    *(
        b"\n",
        b"\r\n",
        b"\x1b[31m",
        b"\x85",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"\xe2\x80\xae",
        b"\xe2\x81\xa6",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(
        b'"',
        b"\\",
        b"=",
        b" ",
        b"a=b",
        b" result=ok",
        b'{"a":1}',
        b"\x7f",
        b"\0",
        b"%s",
        b"\x05\0",
        b"\x05\1",
        b"\x06\5",
        b"\x0a",
        b"\x0b\1",
    ),
)

TARGETS = [
    Target("log_line", log_line, tokens=_TEXTS, longest=4096, seconds=(0.3, 10e-6)),
    Target("access_line", access_line, tokens=_TEXTS, longest=4096, seconds=(0.3, 10e-6)),
]
