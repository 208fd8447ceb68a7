"""gtcpserver serve --reload: every save of the program is a reload. For development.

A child process watches the files and sends the master SIGHUP. So the reload is the ordinary one (docs/operations.md):
the socket stays, connections finish, and if the new code cannot start, the old workers serve on. The child has no
event loop, no socket and none of the program's code: a handler that blocks does not keep it from noticing the save that
mends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from gevent import monkey

from gtcpserver.plural import counted
from gtcpserver.supervisor.privileges import die_with_parent
from gtcpserver.supervisor.spawn import fork_worker

from .file_watch import Watched, saves
from .options import RepeatedType, was_given
from .settings import file_of, label_of, warn_at_start

log = logging.getLogger("gtcpserver")

Command = TypeVar("Command", bound=Callable[..., Any])

#: Most files that a log line names.
MOST_NAMED = 3

_waitpid: Callable[[int, int], tuple[int, int]] = monkey.get_original("os", "waitpid")


def reload_options(command: Command) -> Command:
    """Add --reload and --reload-path to a command that runs the user's program."""
    command = click.option(
        "--reload-path",
        "reload_path",
        type=RepeatedType(),
        multiple=True,
        help="With --reload, watch this file, or every file in this folder, too; may be repeated.",
    )(command)
    return click.option(
        "--reload/--no-reload",
        default=False,
        help="For development: reload when a Python file in the working directory is saved. With several workers, only "
        "on the command line.  [default: no-reload]",
    )(command)


def settle_reload(context: click.Context) -> bool:
    """Return whether to reload on saves, and set the defaults of the options that depend on it.

    Without --workers there is a master with one worker, and no probation: the next request should meet the new code.
    With several workers, only the command line turns it on: a setting left in a file or in the environment must not
    make a server in production reload.

    Raises:
        click.UsageError: another option rules it out.
    """
    if not context.params.get("reload"):
        if context.params.get("reload_path") and context.get_parameter_source("reload_path") is _COMMAND_LINE:
            raise click.UsageError("--reload-path: needs --reload")
        return False
    if context.params["preload"]:
        raise click.UsageError("--reload: cannot be used together with --preload, which loads the program only once")
    source = context.get_parameter_source("reload")
    if was_given(context, "workers") and context.params["workers"] != 1 and source is not _COMMAND_LINE:
        warn_at_start(
            context,
            f"{label_of(context, 'reload')}: ignored with several workers: it is for development; "
            "only --reload on the command line turns it on",
        )
        context.params["reload"] = False
        return False
    for name, value in (("workers", 1), ("probation", 0.0)):
        if not was_given(context, name):
            context.params[name] = value
            context.set_parameter_source(name, source or _COMMAND_LINE)
    return True


_COMMAND_LINE = ParameterSource.COMMANDLINE


def watched_by(context: click.Context) -> Watched:
    """Return what the options want to be watched. Raise click.UsageError."""
    folders: list[str] = []
    files = [path for path in (file_of(context),) if path is not None]
    for path in context.params["reload_path"]:
        if not os.path.exists(path):
            raise click.UsageError(f"--reload-path: there is no {path!r}")
        (folders if os.path.isdir(path) else files).append(path)
    programs = [os.getcwd()]
    handler_file = str(context.params.get("handler") or "").rpartition(":")[0]
    others = [os.path.dirname(handler_file)] if handler_file.endswith(".py") else []
    for folder in map(os.path.abspath, filter(None, (*others, context.params.get("app_dir")))):
        if os.path.commonpath([programs[0], folder]) != programs[0]:
            programs.append(folder)
    return Watched(programs, folders, files)


@contextlib.contextmanager
def reloading_on_saves(watched: Watched, program: str = "") -> Iterator[None]:
    """Run a process that sends this one SIGHUP after each save. Raise OSError if it cannot be started.

    SIGHUP is blocked until the master catches it: before, a save would end this process.

    Args:
        program: name of the program, for the title of the process.
    """
    # A save within the same second that keeps the size would find the old bytecode (PEP 552: it has whole seconds).
    sys.dont_write_bytecode = True
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    master, changes = os.getpid(), saves(watched)
    log.warning("--reload is for development: watching %s", ", ".join([*watched.programs, *watched.folders]))
    pid = fork_worker(lambda: _watch(changes, master), _close_descriptors, "file watcher", program)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # reaped by a master that is process 1
            if _waitpid(pid, os.WNOHANG)[0] == 0:
                os.kill(pid, signal.SIGKILL)
                _waitpid(pid, 0)


def _close_descriptors() -> None:
    # Of systemd, or of the master before an upgrade: a listening socket that is open here too would never be closed.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _watch(changes: Iterator[list[str]], master: int) -> int:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    die_with_parent(signal.SIGTERM)
    for paths in changes:
        if os.getppid() != master:
            break
        if paths:
            log.info("%s changed", _named(paths))
            os.kill(master, signal.SIGHUP)
    return 0


def _named(paths: list[str]) -> str:
    here = os.getcwd() + os.sep
    names = [path.removeprefix(here) for path in paths[:MOST_NAMED]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {counted(more, 'other file')}" if more else "")
