"""Notice saves: files that were written, added or removed, by watchfiles if it is installed, otherwise by stat(2)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, process_time
from typing import Any

from gevent import monkey

log = logging.getLogger("gtcpserver")

#: Seconds between two looks at the files.
LOOK_SECONDS = 0.5

#: Looks take at most this share of a CPU, however many files there are.
MOST_BUSY = 0.1

#: Seconds without a further change after which a save counts as complete: an editor or version control writes several
#: files, or one in several steps. watchfiles' own default is the same.
SETTLED_SECONDS = 0.05

#: Seconds after which changes are reported even if they go on.
LONGEST_SAVE = 2.0

# Folders without files of the program: written by tools, or of other projects.
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})

_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")

#: What reveals a change of a file: nanoseconds of its last modification, size and inode.
Mark = tuple[int, int, int]


@dataclass(frozen=True)
class Watched:
    """What to watch.

    Attributes:
        programs: folders whose Python files count.
        folders: folders in which every file counts.
        files: files that count, by name.
    """

    programs: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def in_folders(self) -> dict[str, Mark]:
        """Return the marks of the files in folders. Files that cannot be read are left out."""
        found: dict[str, Mark] = {}
        for folder, end in [*((one, ".py") for one in self.programs), *((one, "") for one in self.folders)]:
            for entry in _walk(folder, end):
                _note(found, entry.path, entry.stat)
        return found

    def may_count(self, path: str) -> bool:
        """Return whether a change of this path may be a change of a file that counts: a folder may contain some."""
        folders = tuple(os.path.abspath(folder) + os.sep for folder in self.folders)
        return path.endswith(".py") or path.startswith(folders) or not os.path.isfile(path)

    def named(self) -> dict[str, Mark]:
        """Return the marks of the files given by name."""
        found: dict[str, Mark] = {}
        for path in self.files:
            _note(found, path, partial(os.stat, path))
        return found


def _note(found: dict[str, Mark], path: str, stat: Callable[[], os.stat_result]) -> None:
    try:
        status = stat()
    except OSError:
        return
    found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)


def _walk(folder: str, end: str) -> Iterator[os.DirEntry[str]]:
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = list(entries)
        except OSError:
            continue  # no permission, or removed in the meantime
        if any(entry.name == "pyvenv.cfg" for entry in found):
            continue  # a virtual environment
        for entry in found:
            if entry.name.startswith(".") or entry.name in _SKIPPED:
                continue
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
            except OSError:
                continue
            if is_folder:
                waiting.append(entry.path)
            elif entry.name.endswith(end):
                yield entry


def changed(before: dict[str, Mark], after: dict[str, Mark]) -> list[str]:
    """Return the paths that were added, removed or modified."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def saves(watched: Watched) -> Iterator[list[str]]:
    """Yield the changed paths after each save, and an empty list about every half second without one. Never ends.

    A change counts if it was made after this call.
    """
    return _saves(watched, watched.in_folders(), watched.named())


def _saves(watched: Watched, in_folders: dict[str, Mark], named: dict[str, Mark]) -> Iterator[list[str]]:
    wait = _wait_by_watchfiles(watched) or _wait_by_sleep
    spent = 0.0
    while True:
        touched = wait(max(LOOK_SECONDS, spent / MOST_BUSY))
        began = process_time()  # without the pauses in `_settled`
        new_named = _settled(watched.named, named)
        new_in_folders = _settled(watched.in_folders, in_folders) if touched else in_folders
        spent = process_time() - began
        paths = sorted({*changed(named, new_named), *changed(in_folders, new_in_folders)})
        in_folders, named = new_in_folders, new_named
        yield paths


def _settled(look: Callable[[], dict[str, Mark]], before: dict[str, Mark]) -> dict[str, Mark]:
    """Return the present marks; if they are not as before, those after the save is complete."""
    give_up = monotonic() + LONGEST_SAVE
    marks = look()
    while marks != before and monotonic() < give_up:
        _sleep(SETTLED_SECONDS)
        last, marks = marks, look()
        if last == marks:
            break
    return marks


def _wait_by_sleep(seconds: float) -> bool:
    _sleep(seconds)
    return True


def _wait_by_watchfiles(watched: Watched) -> Callable[[float], bool] | None:
    """Return a function that waits for a change in the folders, and returns whether there may be one.

    None without watchfiles. What has changed is found by the marks, so both ways have the same rules.
    """
    try:
        import watchfiles
    except ImportError:
        return None
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # a line per change, also of its own log file
    changes: Iterator[Any] | None = None

    def wait(seconds: float) -> bool:
        nonlocal changes
        new = changes is None
        until = monotonic() + seconds - LOOK_SECONDS
        try:
            if changes is None:
                changes = watchfiles.watch(
                    *watched.programs,
                    *watched.folders,
                    watch_filter=lambda _change, path: watched.may_count(path),
                    step=int(1000 * SETTLED_SECONDS),
                    rust_timeout=int(1000 * LOOK_SECONDS),
                    yield_on_timeout=True,
                    ignore_permission_denied=True,
                )
            touched = bool(next(changes))
        except (OSError, RuntimeError, StopIteration) as error:
            # No inotify watches are left (inotify(7)), or a folder is gone.
            log.debug("watchfiles: %r", error)
            changes = None
            return _wait_by_sleep(seconds)
        if touched:
            _sleep(max(0.0, until - monotonic()))
        # Something may have changed after the last look, and before the new watch.
        return touched or new

    return wait
