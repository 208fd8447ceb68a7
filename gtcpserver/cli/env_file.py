"""--env-file: a file of environment variables, read before anything looks at the environment.

Without click: the variables may say whether to patch the standard library, which precedes click's import.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping, Sequence

#: The commands that have the option.
COMMANDS = ("serve", "echo", "forward", "files", "proxy", "config")

#: Names of the variables that come from the file: the next master of an upgrade, which inherits them, reads it again.
FROM_FILE = "GTCPSERVER_FROM_ENV_FILE"

#: A longer file is some other file, or endless. The same as of files with passwords (`secret_files`).
LARGEST = 1024 * 1024

_LINE = re.compile(
    r"""(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*
    (?: '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<bare>(?!['"]).*?) )
    (?: \s+\#.* | \s* )""",
    re.VERBOSE | re.ASCII,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


class BadEnvFile(Exception):
    """The file cannot be read, or a line of it makes no sense; the message says which."""


def load(arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Read the file that the arguments or GTCPSERVER_ENV_FILE name, if any, into the environment.

    Variables that are set already stay. Raise BadEnvFile.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    given = _path(arguments)
    path = environment.get("GTCPSERVER_ENV_FILE", "") if given is None else given
    for name in environment.pop(FROM_FILE, "").split():
        environment.pop(name, None)
    if command not in COMMANDS or {"-h", "--help"} & {*arguments}:
        return
    if not path:
        if given is not None:
            raise BadEnvFile("must name a file, got ''")
        return
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a mark
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        raise BadEnvFile(f"cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > LARGEST:
        raise BadEnvFile(f"cannot read {path!r}: it must have at most {LARGEST} characters")
    new = {name: value for name, value in parse(text, path).items() if name not in environment}
    environment.update(new)
    if new:
        environment[FROM_FILE] = " ".join(new)


def _path(arguments: Sequence[str]) -> str | None:
    path = None
    for place, argument in enumerate(arguments):
        if argument == "--env-file" and place + 1 < len(arguments):
            path = arguments[place + 1]
        elif argument.startswith("--env-file="):
            path = argument.partition("=")[2]
    return path


def parse(text: str, path: str) -> dict[str, str]:
    """Return the variables of a file's text. Raise BadEnvFile, which names the line."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        if match is None or "\0" in stripped:
            # Not the line itself: it may be a secret.
            raise BadEnvFile(f"{path} line {number}: must be NAME=VALUE")
        value = match["single"] if match["single"] is not None else match["bare"]
        if match["double"] is not None:
            value = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), match["double"])
        found[match["name"]] = value
    return found
