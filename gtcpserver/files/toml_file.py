"""Read a TOML file so that each mistake in it can be reported with its line."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from typing import Any

from gtcpserver.errors import ConfigError

from .lent import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Maximum nesting of values and tables: ours need at most four levels. Code that follows them, here and in the parsers,
#: is recursive, and would exhaust its stack.
DEEPEST = 32

#: The range that TOML guarantees (v1.0.0, "Integer"). Python's integers are unlimited, but cannot be printed beyond
#: 4300 digits.
LEAST_INTEGER, LARGEST_INTEGER = -(2**63), 2**63 - 1

_LONG_NUMBER = re.compile(r"[0-9][0-9_]{1000,}")

#: A value over more lines than this is only delimited by its brackets: parsing after each line takes quadratic time.
MOST_LINES_TRIED = 200


def read_text(path: str) -> str:
    """Read the text of a file. Raise ConfigError: it cannot be read, or is not UTF-8."""
    try:
        return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding="utf-8").read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be UTF-8") from None


def parse_text(text: str, path: str) -> dict[str, Any]:
    """Parse the text of a file. Raise ConfigError, with the line: it is not TOML, or has values that cannot be used
    here."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}{_described(str(error), text)}") from None
    except RecursionError:
        raise ConfigError(f"{path}{_line_that_nests(text)}: {_TOO_DEEP}") from None
    except ValueError:  # from int(), which has its own limit, and since Python 3.12 not only for decimal numbers
        found = _LONG_NUMBER.search(text)
        line = f" line {text.count(chr(10), 0, found.start()) + 1}" if found is not None else ""
        raise ConfigError(f"{path}{line}: {_TOO_LARGE}") from None
    _check_values(data, text, path)
    return data


_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def _described(said: str, text: str) -> str:
    """Return " line 3: what is wrong (column 5)" for the parser's message, in the form of all other mistakes."""
    found = _PLACE.search(said)
    if found is None:
        return f": {said[:1].lower()}{said[1:]}"
    line = found[1] or len(text.rstrip().split("\n"))
    where = f"column {found[2]}" if found[2] else "at the end of the file"
    return f" line {line}: {said[:1].lower()}{said[1 : found.start()]} ({where})"


_TOO_DEEP = f"values must not be nested deeper than {DEEPEST}"
_TOO_LARGE = f"whole numbers must be {LEAST_INTEGER} to {LARGEST_INTEGER}"


def _check_values(data: dict[str, Any], text: str, path: str) -> None:
    """Raise ConfigError for values that are out of range or too deep."""
    waiting: list[tuple[str, Any, int]] = [("", data, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, dict):
            inner = [(f"{name}.{key}" if name else key, one) for key, one in value.items()]
        elif isinstance(value, list):
            inner = [(f"{name}[{place}]", one) for place, one in enumerate(value)]
        elif isinstance(value, int) and not LEAST_INTEGER <= value <= LARGEST_INTEGER:
            line = Lines(text).of(name)
            raise ConfigError(f"{path}{'' if line is None else f' line {line}'}: {_TOO_LARGE} (at {name})")
        else:
            continue
        if depth >= DEEPEST:
            raise ConfigError(f"{path}{_line_that_nests(text)}: {_TOO_DEEP}")
        waiting += [(key, one, depth + 1) for key, one in inner]


def _line_that_nests(text: str) -> str:
    """Return " line N" of excessive nesting of brackets or dots, as far as possible without parsing them."""
    depth = 0
    for number, line in enumerate(text.split("\n"), 1):
        depth = max(0, depth + line.count("[") + line.count("{") - line.count("]") - line.count("}"))
        if max(depth, line.count("["), line.count("{"), line.partition("=")[0].count(".")) >= DEEPEST:
            return f" line {number}"
    return ""


class Lines:
    """The line numbers of a file's keys.

    Args:
        text: contents of a valid TOML file.
    """

    def __init__(self, text: str) -> None:
        self._found: dict[str, int] = {}
        self._tables: Counter[str] = Counter()
        table = ""
        chunk: list[str] = []
        depth = 0
        # The parser itself finds the end of a statement: add lines until the text can be parsed.
        for number, line in enumerate(text.split("\n"), 1):
            chunk.append(line.rstrip("\r"))
            depth += line.count("[") - line.count("]")
            if len(chunk) > MOST_LINES_TRIED and depth > 0:
                continue
            try:
                said = tomllib.loads("\n".join(chunk))
            except (ValueError, RecursionError):  # ValueError: it is not TOML yet
                continue
            first = number - len(chunk) + 1
            if chunk[0].lstrip().startswith("["):
                table = self._note_table(said, first)
            else:
                self._note_keys(table, said, first)
            chunk, depth = [], 0

    def of(self, keys: str) -> int | None:
        """Return the line of a key such as "listener[1].port", or of the table it would be in; None: not found."""
        while keys:
            if keys in self._found:
                return self._found[keys]
            keys = keys[: max(keys.rfind("."), keys.rfind("["), 0)]
        return None

    def _note_table(self, said: dict[str, Any], line: int) -> str:
        name = ""
        while said:
            key, value = next(iter(said.items()))
            name = f"{name}.{key}" if name else key
            if isinstance(value, list):
                name, value = f"{name}[{self._tables[name]}]", value[0]
                self._tables[name.rpartition("[")[0]] += 1
            elif self._tables[name]:
                name = f"{name}[{self._tables[name] - 1}]"
            # [a.b] also counts for a, unless a has an earlier line.
            self._found.setdefault(name.rpartition("[")[0] if name.endswith("]") else name, line)
            said = value
        self._found.setdefault(name, line)
        return name

    def _note_keys(self, table: str, said: dict[str, Any], line: int, depth: int = 0) -> None:
        for key, value in said.items():
            name = f"{table}.{key}" if table else key
            self._found.setdefault(name, line)
            if isinstance(value, dict) and depth < DEEPEST:
                self._note_keys(name, value, line, depth + 1)
