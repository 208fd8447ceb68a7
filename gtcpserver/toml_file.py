"""Read a TOML file so that each mistake in it can be told with its line."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: A value over more lines than this is looked for by its brackets alone: to try each line anew takes their square.
MOST_LINES_TRIED = 200


def read_text(path: str) -> str:
    """The text of a file. Raises ConfigError: it cannot be read, or is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be UTF-8") from None


def parse_text(text: str, path: str) -> dict[str, Any]:
    """What the text of a file says. Raises ConfigError: it is not TOML, with line and column."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


class Lines:
    """Where the keys of a file are.

    Args:
        text: of a file that is TOML.
    """

    def __init__(self, text: str) -> None:
        self._found: dict[str, int] = {}
        self._tables: Counter[str] = Counter()
        table = ""
        chunk: list[str] = []
        depth = 0
        # The parser itself says where a statement ends: a line is taken with those behind it until it can be parsed.
        for number, line in enumerate(text.split("\n"), 1):
            chunk.append(line.rstrip("\r"))
            depth += line.count("[") - line.count("]")
            if len(chunk) > MOST_LINES_TRIED and depth > 0:
                continue
            try:
                said = tomllib.loads("\n".join(chunk))
            except tomllib.TOMLDecodeError:
                continue
            first = number - len(chunk) + 1
            if chunk[0].lstrip().startswith("["):
                table = self._note_table(said, first)
            else:
                self._note_keys(table, said, first)
            chunk, depth = [], 0

    def of(self, keys: str) -> int | None:
        """The line of a key such as "listener[1].port", or else of the table it would be in; None: it is nowhere."""
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
            # [a.b] is where a is, too, if nothing before it was.
            self._found.setdefault(name.rpartition("[")[0] if name.endswith("]") else name, line)
            said = value
        self._found.setdefault(name, line)
        return name

    def _note_keys(self, table: str, said: dict[str, Any], line: int) -> None:
        for key, value in said.items():
            name = f"{table}.{key}" if table else key
            self._found.setdefault(name, line)
            if isinstance(value, dict):
                self._note_keys(name, value, line)
