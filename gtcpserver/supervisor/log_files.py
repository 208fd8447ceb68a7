"""Logging of a master and its workers: one file, or one standard error, for all of them; reopened on request."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from gtcpserver.diagnostics.logs import JsonFormatter, NonBlockingHandler, TextFormatter, configure_logging
from gtcpserver.files.trusted_path import UntrustedPath, open_file
from gtcpserver.process.descriptors import close_descriptor

log = logging.getLogger("gtcpserver")

STDERR = 2


@dataclass(frozen=True)
class LogStyle:
    """The options --log-level and --log-format.

    Example::

        from gtcpserver import ListenConfig
        from gtcpserver.supervisor import LogStyle, Program

        program = Program(["127.0.0.1:5000"], ListenConfig(), build, log_style=LogStyle("warning", "json"))
    """

    level: str = "info"
    format: Literal["text", "json"] = "text"


class TextWithPid(TextFormatter):
    """The text format with the process's id after the logger's name, as in syslog."""

    def format(self, record: logging.LogRecord) -> str:
        name = record.name
        record.name = f"{name}[{record.process}]"
        try:
            return super().format(record)
        finally:
            record.name = name


def log_in_master(style: LogStyle) -> None:
    """Like `configure_logging`, without an event loop, which a master must not have when it forks."""
    handler = NonBlockingHandler(STDERR)
    handler.setFormatter(JsonFormatter() if style.format == "json" else TextWithPid())
    root = logging.getLogger()
    root.setLevel(style.level.upper())
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.captureWarnings(True)


def log_in_worker(style: LogStyle) -> None:
    handler = configure_logging(style.level, style.format, STDERR)
    if style.format == "text":
        handler.setFormatter(TextWithPid())


def open_log_file(path: str) -> int:
    """Open a log file for appending. Raises OSError or UntrustedPath, which name the file."""
    try:
        return open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o640)
    except UntrustedPath as error:
        raise UntrustedPath(f"log file {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"log file {path}: {error.strerror}") from None


def write_stderr_to(fd: int) -> None:
    """Make `fd` standard error, so that all output to it goes there; close `fd`."""
    os.dup2(fd, STDERR, inheritable=True)
    if fd != STDERR:
        close_descriptor(fd)


def log_with_details(level: int, message: str, details: str) -> None:
    """Log a line with more lines below it, like a traceback."""
    record = log.makeRecord(log.name, level, __file__, 0, message, (), None)
    record.stack_info = details.rstrip()
    log.handle(record)
