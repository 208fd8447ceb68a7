"""The folder with the account, the keys and the certificate: what is where, and how it is written.

    AUTHORITY/                   its URL, percent-encoded
        lock                     held by the helper process
        account.json             key and URL of the account
        certificates/NAME/       the first of the names
            certificate.pem      key and chain, in use
            state.json           when to do what next
            order.json           URL and key of an order under way
            challenge-NAME.pem   what to answer to the authority, while it asks

Everything is for its owner alone (modes 700 and 600). Each file is written beside its place and moved there, so that a
reader, and a process that starts after a crash, find the old content or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from typing import Any
from urllib.parse import quote

from gtcpserver.errors import ConfigError
from gtcpserver.files.trusted_path import check_path
from gtcpserver.process.descriptors import close_descriptor

from .settings import ACMESettings

MAX_JSON = 1024 * 1024  # bytes; the files that we write have some hundred


class Folder:
    """The part of the folder that belongs to one certificate of one authority.

    Attributes:
        certificate: path of the PEM file with the private key and the certificate's chain.
        account, state, order: paths of JSON files.
    """

    def __init__(self, settings: ACMESettings) -> None:
        self._root = settings.folder
        self._authority = os.path.join(settings.folder, quote(settings.directory.partition("://")[2], safe=""))
        self._lock = os.path.join(self._authority, "lock")
        self._own = os.path.join(self._authority, "certificates", settings.names[0])
        self.account = os.path.join(self._authority, "account.json")
        self.certificate = os.path.join(self._own, "certificate.pem")
        self.state = os.path.join(self._own, "state.json")
        self.order = os.path.join(self._own, "order.json")

    def challenge(self, name: str) -> str:
        """Return the path of a challenge's certificate and key."""
        return os.path.join(self._own, f"challenge-{name}.pem")

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            ConfigError: another user may write to one of them.
            OSError: they cannot be made.
        """
        os.makedirs(self._root, 0o700, exist_ok=True)
        for path in (self._root, self._authority, os.path.dirname(self._own), self._own):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            found = os.stat(path)
            if found.st_uid not in (0, os.geteuid()):
                raise ConfigError(f'folder "{path}" belongs to user {found.st_uid}, expected {os.geteuid()}')
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(f'folder "{path}" may be written to by others, expected mode 700')
        check_path(self.state)

    def lock(self) -> int | None:
        """Take the lock of all that is ordered from this authority; None: another process has it.

        Returns:
            a descriptor. The lock is free when all its copies are closed (flock(2)).

        Raises:
            OSError: it cannot be taken.
        """
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            close_descriptor(fd)
            return None
        except BaseException:
            close_descriptor(fd)
            raise
        return fd


def certificate_of(settings: ACMESettings) -> str:
    """Return the path of the certificate, which may not be there yet."""
    return Folder(settings).certificate


def write_file(path: str, content: bytes) -> None:
    """Replace a file in one step, and make sure that it is on the disk. Only the holder of the lock may call this.

    Raises:
        OSError: nothing has changed.
    """
    new = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # of a process that was killed
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(fd)
    except BaseException:
        remove_file(new)
        raise
    finally:
        close_descriptor(fd)
    os.rename(new, path)
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    # The rename itself: after a crash of the machine the order's key must not be the one before.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        close_descriptor(fd)


def remove_file(path: str) -> None:
    """Remove a file, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def read_json(path: str) -> dict[str, Any]:
    """Return the object in a JSON file; {} if it is not there, or is none. Raise OSError."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(MAX_JSON))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: str, data: dict[str, Any]) -> None:
    """Replace a JSON file. Raise OSError."""
    write_file(path, json.dumps(data, indent=1).encode())
