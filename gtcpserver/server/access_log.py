"""The access log: one line per connection, written when it has ended.

People and programs read the lines, which hold what clients sent (server names, names in certificates, what a handler
adds): all of it is quoted, so that no client can end a line or forge another one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from time import monotonic
from typing import Any, Literal

import gevent

from gtcpserver.connection.connection import Connection, log_fields_of
from gtcpserver.diagnostics.logs import FaultLimiter, NonBlockingHandler, own_logger
from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import borrow, has_lender
from gtcpserver.files.trusted_path import UntrustedPath, open_file
from gtcpserver.plural import counted
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.strict_json import as_text, to_json, to_short_json

from .describe import printed
from .outcome import Result

log = own_logger("gtcpserver.access")
_problems = logging.getLogger("gtcpserver")

Style = Literal["text", "json"]

#: Most characters of ``detail``. An exception may quote what the client sent, and many of them would fill the disk.
MOST_DETAIL = 300

#: Most bytes of a line. Log handlers cut longer lines, which would break JSON.
LONGEST_LINE = 48 * 1024

#: Mode of a new file: addresses of clients are not for every user of the machine.
FILE_MODE = 0o640

#: Flags of open. O_NONBLOCK: a FIFO without a reader is an error (fifo(7)), and nothing waits for a reader.
FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK

#: Seconds between two looks at a file that this process may not open itself, and borrows (`files.lent`).
LOOK_EVERY = 1.0


class AccessLog:
    """The access log of a server, or of several: ``Server(..., access_log=AccessLog("json", "/var/log/app.log"))``.

    ``Server(..., access_log="text")`` is short for ``AccessLog("text")``. A handler adds fields of its own by
    ``conn.log_fields["user"] = "ada"``.

    Args:
        style: "text" (key=value) or "json" (one object per line).
        file: path to append to; reopened when it was renamed or removed (logrotate). None: the lines go to the logger
            "gtcpserver.access". If the file is a pipe that nobody reads, nothing waits: lines are dropped and counted.

    Attributes:
        worker: number of the worker process, written in each line; None without workers.

    Raises:
        ConfigError: an unknown style, or a file that cannot be opened.

    Example::

        from gtcpserver import AccessLog, Server

        def handle(conn):
            conn.log_fields["user"] = "ada"

        server = Server("127.0.0.1:5000", handle, access_log=AccessLog("json", "access.log"))
    """

    def __init__(self, style: Style = "text", file: str | os.PathLike[str] | None = None) -> None:
        if style not in ("text", "json"):
            raise ConfigError(f'access_log must be "text", "json" or an AccessLog, got {style!r}')
        self.style: Style = style
        self.worker: int | None = None
        self._log = log
        self._open: dict[Connection, _End] = {}
        if file is not None:
            # Not one of logging's tree: two servers may have a file each.
            self._log = logging.Logger("gtcpserver.access", logging.INFO)
            self._log.addHandler(_open_handler(os.fspath(file)))

    @property
    def files(self) -> list[str]:
        """Path of the file, if there is one."""
        return [one.path for one in self._log.handlers if isinstance(one, AccessFile)]

    def begin(self, connection: Connection) -> None:
        """Remember the server's address of a connection whose handler is about to run."""
        # Now, since the handler may close the connection.
        self._open[connection] = _End(_server_address(connection))

    def note(self, connection: Connection, result: Result, detail: str = "") -> None:
        """Record how a connection ends; only the first call counts."""
        end = self._open.get(connection)
        if end is not None and end.result == "ok":
            end.result, end.detail = result, detail[:MOST_DETAIL]

    def forget(self, connection: Connection) -> None:
        """Write no line for a connection that has moved to another worker, which does at its end."""
        self._open[connection] = _MOVED

    def end(self, connection: Connection) -> dict[str, Any]:
        """Return the fields for :meth:`write` of a connection about to be closed. Never waits or raises."""
        end = self._open.pop(connection, _End(""))
        return self._fields(connection, end) if end is not _MOVED else {}

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a line; none without fields."""
        if fields:
            write_line(self._log, fields, self.style)

    def write_unserved(self, connection: Connection, result: Result, detail: str = "") -> None:
        """Write the line of a connection that no handler gets, before it is closed."""
        self.write(self._fields(connection, _End(_server_address(connection), result, detail)))

    def _fields(self, connection: Connection, end: _End) -> dict[str, Any]:
        stream = connection.stream
        result = "idle_closed" if end.result == "ok" and stream.ended else end.result
        client = printed(connection.client_address)
        balancer = printed(connection.peer_address)
        fields: dict[str, Any] = {
            "time": utc(connection.started_at),
            "client": client,
            "balancer": balancer if balancer != client else None,
            "server": end.server or None,
            **_tls_fields(connection),
            "result": result,
            "detail": end.detail or None,
            "bytes_received": stream.bytes_received,
            "bytes_sent": stream.bytes_sent,
            "duration": round(monotonic() - connection.accepted_at, 4),
            "worker": self.worker,
        }
        for name, value in log_fields_of(connection).items():
            # Our fields win, whatever names a handler, or a client through it, chooses.
            fields.setdefault(str(name), value)
        return fields


@dataclass(slots=True)
class _End:
    """What is known about the end of a connection before its line is written."""

    server: str
    result: Result = "ok"
    detail: str = ""


_MOVED = _End("", "killed")


def utc(seconds: float) -> str:
    """Return seconds since the epoch as "2026-01-31T12:00:00.123+00:00"."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _server_address(connection: Connection) -> str:
    try:
        return printed(connection.stream.sock.getsockname())
    except OSError:
        return ""


def _tls_fields(connection: Connection) -> dict[str, Any]:
    tls = connection.tls
    if tls is None:
        return {}
    fields = {"tls": tls.version, "server_name": tls.server_name, "alpn": tls.alpn}
    certificate = tls.peer_certificate
    if certificate is not None:
        fields["certificate"] = _certificate_name(certificate)
    return fields


def _certificate_name(certificate: Mapping[str, Any]) -> str:
    """Return the common name, or the first alternative name (RFC 9525 section 2)."""
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    names = certificate.get("subjectAltName", ())
    return str(names[0][1]) if names else ""


# -- lines, also of the proxy's access log -----------------------------------------------------------------------


def write_line(log: logging.Logger, fields: Mapping[str, Any], style: Style) -> None:
    """Write a line to a logger. The record has the fields as ``access``; the text leaves out "time" and fields that are
    None."""
    if not log.isEnabledFor(logging.INFO):
        return
    if style == "json":
        log.info("%s", to_short_json(fields, LONGEST_LINE), extra={"access": fields})
        return
    words = (
        f"{quoted(name)}={quoted(value)}" for name, value in fields.items() if name != "time" and value is not None
    )
    log.info("%s", " ".join(words), extra={"access": fields})


def quoted(value: object) -> str:
    """Return a value as one word, quoted if need be, so that it cannot end the line or look like another field."""
    text = as_text(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "=\\') else json.dumps(text)


def log_to_file(path: str | None) -> None:
    """Append the records of the logger "gtcpserver.access" to a file from now on.

    Args:
        path: the file, reopened when it was renamed (logrotate); None: the records go where all other messages go.

    Raises:
        ConfigError: the file cannot be opened.
    """
    handlers = [] if path is None else [_open_handler(path)]
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    for new in handlers:
        log.addHandler(new)
    log.propagate = not handlers


def _open_handler(path: str) -> AccessFile:
    try:
        handler = AccessFile(path)
    except UntrustedPath as error:
        raise ConfigError(f"access log {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot open the access log {path}: {error.strerror}") from None
    handler.setFormatter(_FileFormatter())
    return handler


class AccessFile(NonBlockingHandler):
    """Appends records to a file, and never waits: if the disk is full, or nobody reads the pipe, lines are lost.

    Before each record it checks that the path is still the same file, and reopens it otherwise. If that fails, it keeps
    the file it has, and logs so now and then. A file that this process may not open is borrowed, and checked once a
    second.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._complaints = FaultLimiter(burst=1, interval=60.0)
        self._borrower = 0  # the process whose greenlet borrows the file: a forked child has no such greenlet
        fd, borrowed = self._open()
        super().__init__(fd)
        if borrowed:
            self._borrow_from_now_on()
        # Logged once per burst, to the main logger.
        self._told = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._borrower != os.getpid() and self._has_moved():
            self._reopen()
        super().emit(record)
        if self.dropped > self._told:
            if self._complaints.allow("dropped") is not None:
                _problems.error(
                    "cannot write the access log %s: %s; %s dropped",
                    self.path,
                    self._reason,
                    counted(self.dropped, "line"),
                )
            self._told = self.dropped

    def close(self) -> None:
        super().close()
        if self._borrower == os.getpid():
            return  # logging.config closes handlers that stay in use, and borrowing a file again takes time
        if self._fd >= 0:
            close_descriptor(self._fd)
            self._fd = -1

    def _open(self) -> tuple[int, bool]:
        try:
            return open_file(self.path, FILE_FLAGS, FILE_MODE), False
        except PermissionError:
            if not has_lender():
                raise
        return borrow(self.path), True

    def _borrow_from_now_on(self) -> None:
        self._borrower = os.getpid()
        gevent.spawn(self._keep_borrowing)

    def _has_moved(self) -> bool:
        if self._fd < 0:
            return True  # closed by logging.config, see NonBlockingHandler
        try:
            status = os.stat(self.path)
        except OSError:
            return True
        return self._identity is None or (status.st_dev, status.st_ino) != self._identity[:2]

    def _reopen(self) -> None:
        try:
            self._use(open_file(self.path, FILE_FLAGS, FILE_MODE))
        except (OSError, UntrustedPath) as error:
            if isinstance(error, PermissionError) and has_lender():
                self._borrow_from_now_on()  # in a greenlet: nothing may wait where this record is logged
            else:
                self._complain(error)

    def _keep_borrowing(self) -> None:
        # Not only when a record comes: by then the renamed file may be compressed and gone.
        while self._fd >= 0:
            try:
                self._use(borrow(self.path))
            except OSError as error:
                self._complain(error)
            gevent.sleep(LOOK_EVERY, ref=False)

    def _complain(self, error: OSError | UntrustedPath) -> None:
        if self._complaints.allow("open") is not None:
            why = error.strerror if isinstance(error, OSError) else error
            _problems.error("cannot reopen the access log %s: %s", self.path, why)

    def _use(self, new: int) -> None:
        status = os.fstat(new)
        if self._identity is not None and (status.st_dev, status.st_ino) == self._identity[:2] and self._fd >= 0:
            close_descriptor(new)
            return
        self.flush()
        old, self._fd = self._fd, new
        if old >= 0:
            close_descriptor(old)
        self._identity = (status.st_dev, status.st_ino, status.st_mode)
        self._rest = b""


class _FileFormatter(logging.Formatter):
    """Puts the time before a line that does not contain it."""

    _json = False

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        access = record.__dict__.get("access")
        if access is not None:
            self._json = message.startswith("{")
            return message if self._json else f"{access['time']} {message}"
        # A notice of dropped lines, or a message of another kind.
        time = utc(record.created)
        return to_json({"time": time, "message": message}) if self._json else f"{time} {message}"
