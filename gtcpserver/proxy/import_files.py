"""Import the configuration of another proxy: danted, 3proxy, squid or tinyproxy."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

from gtcpserver.errors import ConfigError

from .import_danted import SECRETS as DANTED_SECRETS
from .import_danted import read_danted
from .import_draft import Draft, fail, read_lines, shown
from .import_rules import Line
from .import_squid import SECRETS as SQUID_SECRETS
from .import_squid import read_squid
from .import_threeproxy import SECRETS as THREEPROXY_SECRETS
from .import_threeproxy import read_threeproxy
from .import_tinyproxy import SECRETS as TINYPROXY_SECRETS
from .import_tinyproxy import read_tinyproxy

Program = Literal["danted", "3proxy", "squid", "tinyproxy"]
PROGRAMS: tuple[Program, ...] = get_args(Program)

Reader = Callable[[Draft, Iterable[Line], Callable[[Line, str], Iterable[Line]]], None]

_READERS: dict[Program, tuple[Reader, frozenset[str]]] = {
    "danted": (read_danted, DANTED_SECRETS),
    "3proxy": (read_threeproxy, THREEPROXY_SECRETS),
    "squid": (read_squid, SQUID_SECRETS),
    "tinyproxy": (read_tinyproxy, TINYPROXY_SECRETS),
}


def program_of(path: str) -> Program | None:
    """Return whose configuration a file is, by its name; None: it does not say."""
    name = os.path.basename(path).lower()
    names: tuple[tuple[str, Program], ...] = (
        *((program, program) for program in PROGRAMS),
        ("dante", "danted"),
        ("sockd", "danted"),
    )
    return next((program for word, program in names if word in name), None)


def import_file(path: str, program: Program) -> Draft:
    """Make a configuration from a file, and from those that it includes.

    Raises:
        ConfigError: a file cannot be read or has a mistake; with its line.
    """
    return import_lines(read_lines(path), program)


def import_lines(lines: Iterable[Line], program: Program) -> Draft:
    """Make a configuration from lines. Raise ConfigError, with the line."""
    reader, secrets = _READERS[program]
    draft = Draft(secrets)
    reader(draft, lines, _read_others)
    return draft


def _read_others(line: Line, path: str) -> Iterator[Line]:
    """Yield the lines of a file that a line names, or of several, by a pattern (glob(7))."""
    paths = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    for one in paths:
        try:
            yield from read_lines(one)
        except ConfigError as error:
            fail(line, shown(str(error), 400))
