"""Passwords from a file or standard input: every user of the host can read those on a command line (ps)."""

from __future__ import annotations

import os
import stat
import sys
from typing import BinaryIO

from gtcpserver.errors import ConfigError

#: A longer file is some other file, or endless.
LARGEST = 1024 * 1024

STANDARD_INPUT = "-"


def read_users(path: str) -> list[tuple[str, str]]:
    """Read lines of NAME:PASSWORD, as pairs; ignore empty lines and those that begin with "#". Raise ConfigError."""
    users = []
    for number, line in enumerate(read_secret(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        name, _, password = line.partition(":")
        if not name or not password:
            raise ConfigError(f"line {number} of {_shown(path)} must be NAME:PASSWORD")
        users.append((name, password))
    if not users:
        raise ConfigError(f"{_shown(path)} must have lines with NAME:PASSWORD")
    return users


def read_url(path: str) -> str:
    """Read the one line of a file, a URL. Raise ConfigError."""
    words = read_secret(path).split()
    if len(words) != 1:
        raise ConfigError(f"{_shown(path)} must be one line with a URL, got {len(words)} words")
    return words[0]


def read_secret(path: str) -> str:
    """Read the text of a file that no other user can use; "-" is standard input.

    Users other than the owner must be able neither to read nor to write it; the group may read a file of root's, such
    as a mounted secret. PostgreSQL has this rule for its key (ssl_key_file), ssh and libpq (~/.pgpass) a similar one.

    Raises:
        ConfigError: it cannot be read, or others can use it, too. The message has none of the text, which may be a
            password.
    """
    try:
        if path == STANDARD_INPUT:
            return _text_of(sys.stdin.buffer)
        with open(path, "rb") as file:
            _check_private(os.fstat(file.fileno()))
            return _text_of(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use {_shown(path)}: {getattr(error, 'strerror', None) or error}") from None


def _shown(path: str) -> str:
    return "standard input" if path == STANDARD_INPUT else repr(path)


def _check_private(status: os.stat_result) -> None:
    # A pipe, as from the shell's <(command), can only be read by the processes it was given to.
    others = 0o027 if status.st_uid == 0 else 0o077
    if stat.S_ISREG(status.st_mode) and status.st_mode & others:
        mode = stat.S_IMODE(status.st_mode)
        raise ValueError(f"its mode is {mode:04o}, and others than its owner can use the passwords in it: chmod 600")


def _text_of(file: BinaryIO) -> str:
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it must have at most {LARGEST} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("it must be UTF-8") from None
