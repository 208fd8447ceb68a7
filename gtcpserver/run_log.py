"""What a server program says about itself: where it listens, how it stopped, or why it cannot run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from .diagnostics.frames import raised_by_library
from .errors import ConfigError, GtcpServerError
from .plural import counted
from .server.server import Server
from .server.stats import StopReport

log = logging.getLogger("gtcpserver")


def log_listening(server: Server) -> None:
    pool = "no limit" if server.pool.size is None else str(server.pool.size)
    log.info(
        "listening on %s (pid %d, %s, pool %s)",
        ", ".join(server.addresses),
        os.getpid(),
        counted(server.accept_loops, "accept loop"),
        pool,
    )


def log_report(report: StopReport) -> None:
    for cut in report.cut:
        log.warning("cut %s", cut, extra={"client": cut.peer})
    log.info("stopped: %s finished, %d cut", counted(report.finished, "connection"), report.ended)


#: Attribute of exceptions that need no traceback.
_EXPLAINS_ITSELF = "_gtcpserver_explains_itself"


@contextmanager
def one_line_if_uncaught() -> Iterator[None]:
    """Have an error that leaves the block, and ends the program, printed as one line, as the command line does.

    Our messages name the option, its value and what was expected; a traceback through this package adds nothing. It
    stays if code of the program raised the error, in an interactive session, and if the program, a debugger or a crash
    reporter has set ``sys.excepthook``. A program that catches the error notices no difference.
    """
    try:
        yield
    except (GtcpServerError, OSError) as error:
        interactive = hasattr(sys, "ps1") or sys.flags.inspect
        if sys.excepthook in (sys.__excepthook__, _print_uncaught) and not interactive and raised_by_library(error):
            setattr(error, _EXPLAINS_ITSELF, True)
            sys.excepthook = _print_uncaught
        raise


def _print_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not hasattr(error, _EXPLAINS_ITSELF):
        sys.__excepthook__(kind, error, where)
        return
    text = error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else str(error)
    if sys.stderr is not None:  # None: it was closed
        with suppress(OSError, ValueError):  # nobody reads it
            sys.stderr.write(getattr(error, "details", ""))  # WorkersCannotStart: a traceback in the user's code
            print("gtcpserver:", " ".join(text.split()), file=sys.stderr)
    # Python exits with the status of a SystemExit that leaves the hook.
    raise SystemExit(getattr(error, "status", 2 if isinstance(error, ConfigError) else 1))
