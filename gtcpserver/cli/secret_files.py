"""Passwords from a file or standard input: what stands on a command line is read by every user of the host (ps)."""

from __future__ import annotations

import os
import stat
import sys
from typing import BinaryIO

from gtcpserver.errors import ConfigError

#: More is another file, or one without an end.
LARGEST = 1024 * 1024

STANDARD_INPUT = "-"


def read_users(path: str) -> list[tuple[str, str]]:
    """Lines of NAME:PASSWORD, as pairs; empty ones and those that begin with "#" do not count. Raises ConfigError."""
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
    """The one line of a file, a URL. Raises ConfigError."""
    words = read_secret(path).split()
    if len(words) != 1:
        raise ConfigError(f"{_shown(path)} must be one line with a URL, got {len(words)} words")
    return words[0]


def read_secret(path: str) -> str:
    """The text of a file that nobody else can use; "-" is standard input.

    Others than the owner must be able neither to read nor to write it; the group may read what is root's, as of a
    mounted secret. PostgreSQL has this rule for its key (ssl_key_file), ssh and libpq (~/.pgpass) nearly.

    Raises:
        ConfigError: it cannot be read, or by others, too. None of the text is in the message: it may be a password.
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
    # A pipe, as the shell's <(command), has no readers but those that it was given to.
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
