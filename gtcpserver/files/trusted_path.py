"""Open files as a privileged process: along a path that no other user can change.

If root opens /var/log/app/app.log, and /var/log/app belongs to the app's user, that user decides where root writes: by
a link in this folder, or another folder in its place (CVE-2016-1247, of nginx's packages; CWE-59). So as root each
component of a path is checked while it is followed, by descriptors (openat(2)), so that what was checked is what is
used:

- folders belong to root. Those that others may write to are sticky (/tmp; unlink(2)), or a system group's: /var/log is
  root:syslog 775 on Ubuntu;
- a symbolic link is followed if it is root's and only root may write to its folder: /var/run, /dev/stdout;
- in a folder that others may write to, the file is root's, and has no other name (link(2)).

For all other users these are plain calls: a user who may change the path gains no rights beyond those of its owner.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from gtcpserver.errors import ConfigError
from gtcpserver.linux import O_PATH
from gtcpserver.process.descriptors import close_descriptor

#: Groups below this are the system's (SYS_GID_MAX in login.defs(5)): of daemons, or of administrators.
FIRST_USERS_GROUP = 1000

MAX_LINKS = 40  # symbolic links in one path, as in the kernel (path_resolution(7))

#: Owner of everything outside the user namespace (user_namespaces(7)), including the host's root.
OVERFLOW_UID = 65534


class UntrustedPath(ConfigError):
    """Another user could redirect this process, which is root, to another file. The message says where and who."""


@dataclass(frozen=True)
class Place:
    """A name in a folder.

    Attributes:
        folder: descriptor of the folder (O_PATH), for `dir_fd`.
        name: name in the folder.
        shared: others may write to the folder, too.
        own: it is one of this process's own descriptors, by its name in /proc.
    """

    folder: int
    name: str
    shared: bool = False
    own: bool = False


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a file, as os.open does; close-on-exec.

    Raises:
        UntrustedPath: this process is root, and another user could change where the path leads.
        OSError: as open(2).
    """
    flags |= os.O_CLOEXEC
    if os.geteuid() != 0:
        return os.open(path, flags, mode)
    with trusted_place(path) as place:
        if place.own:
            return os.open(place.name, flags & ~os.O_CREAT, dir_fd=place.folder)
        if place.shared:
            # Checked before it is opened: opening a FIFO may wait forever.
            with contextlib.suppress(FileNotFoundError):
                _check_file(path, os.stat(place.name, dir_fd=place.folder, follow_symlinks=False))
        fd = os.open(place.name, flags | os.O_NOFOLLOW, mode, dir_fd=place.folder)
        try:
            if place.shared:
                _check_file(path, os.fstat(fd))
        except BaseException:
            close_descriptor(fd)
            raise
        return fd


@contextlib.contextmanager
def trusted_place(path: str, *, follow: bool = True) -> Iterator[Place]:
    """Hold the folder of a path open while in the block.

    For root, it is a folder that no other user can replace.

    Args:
        follow: follow the name if it is a symbolic link; False: the link itself is to be replaced or removed.

    Raises:
        UntrustedPath: this process is root, and another user could change where the path leads.
        OSError: there is no such folder.
    """
    if os.geteuid() != 0:
        folder, name = os.path.split(os.path.abspath(path))
        place = Place(_open_folder(folder), name)
    else:
        place = _walk(path, follow)
    try:
        yield place
    finally:
        close_descriptor(place.folder)


def check_path(path: str) -> None:
    """Raise UntrustedPath if this process is root and another user could change where the path leads."""
    if os.geteuid() == 0:
        close_descriptor(_walk(path).folder)


def check_content(path: str) -> None:
    """Raise UntrustedPath if this process is root and another user could change the content of a file; or OSError."""
    if os.geteuid() != 0:
        return
    with trusted_place(path) as place:
        found = os.stat(place.name, dir_fd=place.folder, follow_symlinks=place.own)
    if found.st_uid not in _trusted_users():
        raise _refused(path, f"it belongs to user {_user(found.st_uid)}")
    if stat.S_ISREG(found.st_mode):
        if found.st_mode & stat.S_IWOTH:
            raise _refused(path, "every user may write to it")
        if found.st_mode & stat.S_IWGRP and found.st_gid >= FIRST_USERS_GROUP:
            raise _refused(path, f"group {_group(found.st_gid)} may write to it")


def _walk(path: str, follow: bool = True) -> Place:
    rest = _parts(os.path.abspath(path))
    if not rest:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    links = 0
    where = "/"
    fd = _open_folder("/")
    try:
        shared = _check_folder(path, fd, where)
        while True:
            name = rest.pop(0)
            if not rest and where == f"/proc/{os.getpid()}/fd":
                return Place(fd, name, own=True)
            target = _link(name, fd) if rest or follow else None
            if target is None:
                if not rest:
                    return Place(fd, name, shared)
                fd = _change_folder(fd, name)
                where = os.path.dirname(where) if name == ".." else os.path.join(where, name)
            else:
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                owner = os.stat(name, dir_fd=fd, follow_symlinks=False).st_uid
                if shared or owner not in _trusted_users():
                    raise _refused(path, f"{os.path.join(where, name)} is a symbolic link that is not only root's")
                rest = _parts(target) + rest
                if not rest:
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
                if target.startswith("/"):
                    fd = _change_folder(fd, "/")
                    where = "/"
            shared = _check_folder(path, fd, where)
    except BaseException:
        close_descriptor(fd)
        raise


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _open_folder(name: str, folder: int | None = None) -> int:
    return os.open(name, O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def _change_folder(fd: int, name: str) -> int:
    new = _open_folder(name, fd)
    close_descriptor(fd)
    return new


def _link(name: str, folder: int) -> str | None:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # not a link, or not there
            return None
        raise


def _check_folder(path: str, fd: int, where: str) -> bool:
    """Return whether others may write to a folder that can be trusted anyway. Raise UntrustedPath."""
    found = os.fstat(fd)
    if found.st_uid not in _trusted_users():
        raise _refused(path, f"{where} belongs to user {_user(found.st_uid)}, who could put a link there")
    if not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    if not found.st_mode & stat.S_ISVTX:
        if found.st_mode & stat.S_IWOTH:
            raise _refused(path, f"every user may write to {where}, and could put a link there")
        if found.st_gid >= FIRST_USERS_GROUP:
            raise _refused(path, f"group {_group(found.st_gid)} may write to {where}, and could put a link there")
    return True


def _check_file(path: str, found: os.stat_result) -> None:
    """Check a file in a folder that others may write to. Raise UntrustedPath."""
    if stat.S_ISLNK(found.st_mode):
        raise _refused(path, "it is a symbolic link in a folder into which others may write")
    if found.st_uid not in _trusted_users():
        raise _refused(path, f"it belongs to user {_user(found.st_uid)}, in a folder into which others may write")
    if found.st_nlink > 1:
        raise _refused(path, "it is a file with several names, in a folder into which others may write")


def _refused(path: str, why: str) -> UntrustedPath:
    return UntrustedPath(f"{path}: refused, since this process is root: {why}; use a folder that belongs to root")


@functools.cache
def _trusted_users() -> frozenset[int]:
    try:
        with open("/proc/self/uid_map") as file:
            numbers = file.read().split()
    except OSError:
        return frozenset({0})
    # In a user namespace: root there has no more rights than the user who created it.
    return frozenset({0} if numbers[:3] == ["0", "0", "4294967295"] else {0, OVERFLOW_UID})


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return str(gid)
