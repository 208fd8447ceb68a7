"""Logging that cannot stop a server: it never waits for the reader of stderr, and repeated errors are rate-limited.

A pipe without a reader is full after 64 KiB, and a write to it then blocks the whole event loop, not only the greenlet
that logs: stock gevent is frozen after some 80 tracebacks. Here a record that cannot be written at once is dropped and
counted, and the count is the first thing written when there is a reader again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import stat
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import IO, Any, Literal

import gevent
from gevent.monkey import get_original

from gtcpserver.linux import RWF_NOWAIT
from gtcpserver.plural import counted
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.strict_json import to_short_json


class _OwnLogger(logging.Logger):
    """A logger that `logging.config` configures when it names it, and otherwise leaves alone.

    By default dictConfig and fileConfig disable every logger that exists and that they do not name, and empty those
    below one that they do name. A program that sets up its own logging would silence the server: no traceback of a
    handler, no line in the access log.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        caller = sys._getframe(1)  # noqa: SLF001 - Python's name for it
        if caller.f_code.co_name != "_handle_existing_loggers":  # of logging.config
            super().__setattr__(name, value)


def own_logger(name: str) -> logging.Logger:
    """Return one of this library's loggers by name; the program configures it like any other."""
    found = logging.getLogger(name)
    kind = type(found)  # a program may have set a class of its own (logging.setLoggerClass)
    if not issubclass(kind, _OwnLogger):
        found.__class__ = type("OwnLogger", (_OwnLogger, kind), {}) if kind is not logging.Logger else _OwnLogger
    return found


logger = own_logger("gtcpserver")

_poll = get_original("select", "poll")
_native_rlock = get_original("threading", "RLock")

# pwritev2(2): fail with EAGAIN instead of waiting. poll() may tell two workers that share one pipe that there is room
# for one more line; with this flag the loser drops its line, without it, it waits for a reader. Pipes support the flag
# since Linux 6.4, sockets for longer.

# The longest record written. One that exceeds a pipe's default capacity (64 KiB, pipe(7)) could never be written at
# once.
_MAX_RECORD = 64 * 1024

LogFormat = Literal["text", "json"]


def configure_logging(
    level: int | str = "INFO", format: LogFormat = "text", stream: IO[str] | int | None = None
) -> NonBlockingHandler:
    """Send every logger's records to stderr, never waiting for its reader.

    Replaces the root logger's handlers. Python warnings, errors of greenlets that gevent would print itself and
    exceptions that Python cannot raise (`sys.unraisablehook`) go the same way, since they would block, too.

    Args:
        level: "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL" in any case, or logging's number.
        format: "text", one line per record with its traceback indented below, or "json", always one line per record.
        stream: a file object or descriptor; None is stderr. The handler does not close it.

    Returns:
        The handler; its `dropped` counts the lost records.

    Raises:
        ValueError: an unknown level or format.
    """
    if format not in ("text", "json"):
        raise ValueError(f'log format must be "text" or "json", got {format!r}')
    handler = NonBlockingHandler(_descriptor(stream))
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.setLevel(level.upper() if isinstance(level, str) else level)
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.captureWarnings(True)
    faults = FaultLimiter()

    def log_greenlet_error(
        context: object, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        suppressed = faults.allow(fault_key(kind, trace))
        if suppressed is not None:
            details = (kind, error, trace) if error is not None else None
            # bool() of a finished greenlet is False.
            who = context if context is not None else "event loop"
            logger.error("%s failed%s", who, also(suppressed), exc_info=details)

    def log_unraisable(
        unraisable: sys.UnraisableHookArgs, is_finalizing: Callable[[], bool] = sys.is_finalizing
    ) -> None:
        if is_finalizing():
            return  # locks and modules are going: it says nothing of the program, and it cannot be logged
        suppressed = faults.allow(fault_key(unraisable.exc_type, unraisable.exc_traceback))
        if suppressed is not None:
            logger.error(
                "%s %r%s",
                unraisable.err_msg or "exception ignored in",
                unraisable.object,
                also(suppressed),
                exc_info=(unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback),  # type: ignore[arg-type]
            )

    gevent.get_hub().print_exception = log_greenlet_error
    sys.unraisablehook = log_unraisable
    return handler


class NonBlockingHandler(logging.Handler):
    """Write records to a descriptor without ever waiting.

    A record that cannot be written at once is dropped; the next that can is preceded by the line "N log lines
    dropped: nobody was reading". If only a part of a record longer than PIPE_BUF could be written, the rest is kept and
    written before anything else, so that no record is torn. Errors of the descriptor (closed, no reader, disk full) are
    swallowed and counted the same way.

    Attributes:
        dropped: records dropped since the handler was created.
    """

    def __init__(self, fd: int, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self.dropped = 0
        self._unreported = 0
        self._reason = ""
        self._rest = b""
        self._fd = fd
        self._identity = _identity(fd)
        self._terminal = _reopen_terminal(fd)
        self._was_closed = False

    def createLock(self) -> None:
        super().createLock()
        # Nothing in here waits, so the lock need not be gevent's, which creates a hub in every thread that contends for
        # it.
        self.lock = _native_rlock()

    def emit(self, record: logging.LogRecord) -> None:
        if self._was_closed:  # by logging.config, which closes all handlers, even those that stay in use
            self._was_closed = False
            self._terminal = _reopen_terminal(self._fd)
        line = self._encode(record)
        if self._write_rest():
            if self._unreported:
                line = self._encode(self._notice()) + line
            written = self._write(line)
            if 0 < written < len(line) and self._take_back(line, written):
                self._unreported = 0 if b"\n" in line[:written] else self._unreported  # the notice stays
            elif written:
                self._unreported = 0
                self._rest = line[written:]
                return
        self.dropped += 1
        self._unreported += 1

    def flush(self) -> None:
        """Write what is left over if it can be written now; called at interpreter exit."""
        self.acquire()
        try:
            if self._write_rest() and self._unreported:
                line = self._encode(self._notice())
                written = self._write(line)
                if written:
                    self._unreported = 0
                    self._rest = line[written:]
        finally:
            self.release()

    def close(self) -> None:
        self.flush()
        if self._terminal >= 0:
            close_descriptor(self._terminal)
            self._terminal = -1
        self._was_closed = True
        super().close()

    def _encode(self, record: logging.LogRecord) -> bytes:
        try:
            text = self.format(record)
        except Exception as error:  # a wrong format string must not raise in the caller, nor print to stderr
            text = _escape(f"cannot format log record {record.msg!r}: {error!r}")
        data = text.encode("utf-8", "backslashreplace")
        if len(data) > _MAX_RECORD:
            data = data[:_MAX_RECORD] + f"... {len(data) - _MAX_RECORD} bytes cut".encode()
        return data + b"\n"

    def _notice(self) -> logging.LogRecord:
        message = f"{counted(self._unreported, 'log line')} dropped: {self._reason}"
        return logging.LogRecord("gtcpserver", logging.WARNING, __file__, 0, message, None, None)

    def _take_back(self, data: bytes, written: int) -> bool:
        """Remove the beginning of a line that did not fit on a full disk; return whether that worked.

        Other processes append to the same file, and would continue that line.
        """
        begun = written - (data.rfind(b"\n", 0, written) + 1)
        try:
            status = os.fstat(self._fd)
            appends = fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_APPEND
            if not stat.S_ISREG(status.st_mode) or not appends:
                return False  # the rest follows when there is room
            if os.lseek(self._fd, 0, os.SEEK_CUR) != status.st_size:
                return False  # something was appended behind it
            os.ftruncate(self._fd, status.st_size - begun)
        except OSError:
            return False
        return True

    def _write_rest(self) -> bool:
        if self._rest:
            self._rest = self._rest[self._write(self._rest) :]
        return not self._rest

    def _write(self, data: bytes) -> int:
        """Write as much of the start of `data` as possible now; return the number of bytes."""
        done = 0
        try:
            while done < len(data):
                # Writes of at most PIPE_BUF are atomic on pipes (pipe(7)), and succeed whenever poll() says so; ending
                # them with a line keeps the lines of several processes on one pipe apart.
                end = done + select.PIPE_BUF
                if end < len(data):
                    end = data.rfind(b"\n", done, end) + 1 or end
                done += self._write_some(data[done:end])
        except BlockingIOError:
            self._reason = "nobody was reading"
        except OSError as error:
            self._reason = os.strerror(error.errno) if error.errno else str(error)
        return done

    def _write_some(self, data: bytes) -> int:
        fd = self._fd
        identity = _identity(fd)
        if identity is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        kind = identity[2]
        if identity != self._identity:
            # stderr was closed and its number reused. A log file or /dev/null put there on purpose is fine; a socket or
            # pipe may be a client's connection.
            if not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        elif self._terminal >= 0:
            return os.write(self._terminal, data)
        if stat.S_ISREG(kind):
            return os.write(fd, data)
        poller = _poll()
        poller.register(fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if RWF_NOWAIT:
            try:
                return os.pwritev(fd, [data], -1, RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE):
                    raise
        return os.write(fd, data)


class LastResort(logging.Handler):
    """Write this library's warnings and errors to stderr in a program without logging, without waiting.

    `logging.lastResort` does that with a write that waits for stderr's reader, in the event loop. If any other handler
    gets the record, or `logging.lastResort` is None, this one does nothing.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._stream: object = None
        self._to_stream: NonBlockingHandler | None = None

    def createLock(self) -> None:
        super().createLock()
        self.lock = _native_rlock()  # as NonBlockingHandler's

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is None or _has_handler(logging.getLogger(record.name)):
            return
        if sys.stderr is not self._stream:
            self._follow_stderr()
        (self._to_stream or logging.lastResort).handle(record)

    def _follow_stderr(self) -> None:
        self._stream = sys.stderr
        if self._to_stream is not None:
            self._to_stream.close()
            self._to_stream = None
        try:
            fd = _descriptor(None)
        except (AttributeError, OSError):
            return  # a file object of the program, without a descriptor
        self._to_stream = NonBlockingHandler(fd)
        self._to_stream.setFormatter(TextFormatter())

    def flush(self) -> None:
        if self._to_stream is not None:
            self._to_stream.flush()


def _has_handler(asked: logging.Logger | None) -> bool:
    while asked is not None:
        if any(not isinstance(handler, LastResort) for handler in asked.handlers):
            return True
        asked = asked.parent if asked.propagate else None
    return False


def is_logging_configured() -> bool:
    """Return whether the program has decided where this library's records go, or that they go nowhere."""
    return logging.lastResort is None or not logger.propagate or _has_handler(logger)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO gtcpserver: message`: one line, and tracebacks indented below it.

    Control characters of the message are escaped and the lines of a traceback indented, so that text from a client
    cannot look like a record of its own or control the terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_utc(record.created)} {record.levelname} {record.name}: {_escape(_message(record))}"
        details = _details(self, record)
        if details:
            line += "".join("\n    " + _escape(part) for part in details.split("\n"))
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, pid, message; if given, exception and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": _message(record),
        }
        details = _details(self, record)
        if details:
            fields["exception"] = details
        for name, value in record.__dict__.items():
            if name not in RECORD_FIELDS and name not in fields:
                fields[name] = value
        return to_short_json(fields, _MAX_RECORD)


class FaultLimiter:
    """Rate-limit repeated errors: a few at once, then one per interval, with the number left out.

    Each key has a token bucket: `burst` occurrences pass at once (so that developers see their first errors), then one
    every `interval` seconds. With the defaults an error that happens on every connection is logged at most 8,640 times
    a day. At most `max_keys` keys are remembered; while all of them are active, further keys share one bucket, so that
    neither memory nor the log can be flooded with new keys.

    Args:
        burst: occurrences that pass at once, 1 or more.
        interval: seconds for one more to pass, more than 0.
        max_keys: keys remembered, 1 or more.
        clock: seconds, monotonic.

    Attributes:
        suppressed: occurrences left out, all keys together.
    """

    def __init__(
        self,
        burst: int = 5,
        interval: float = 10.0,
        max_keys: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if burst < 1 or interval <= 0 or max_keys < 1:
            raise ValueError("burst and max_keys must be 1 or more and interval more than 0")
        self.suppressed = 0
        self._burst = burst
        self._interval = interval
        self._max_keys = max_keys
        self._clock = clock
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()
        self._shared = _Bucket(burst, clock())

    def allow(self, key: Hashable) -> int | None:
        """Decide whether this occurrence may be logged.

        Returns:
            None: leave it out. A number: log it; this many of the same key were left out since the last one logged.
        """
        now = self._clock()
        bucket = self._bucket(key, now)
        bucket.tokens = min(float(self._burst), bucket.tokens + (now - bucket.seen) / self._interval)
        bucket.seen = now
        if bucket.tokens < 1.0:
            bucket.suppressed += 1
            self.suppressed += 1
            return None
        bucket.tokens -= 1.0
        suppressed, bucket.suppressed = bucket.suppressed, 0
        return suppressed

    def _bucket(self, key: Hashable, now: float) -> _Bucket:
        bucket = self._buckets.get(key)
        if bucket is not None:
            self._buckets.move_to_end(key)
            return bucket
        if len(self._buckets) >= self._max_keys:
            oldest_key, oldest = next(iter(self._buckets.items()))
            if now - oldest.seen < self._burst * self._interval:
                return self._shared
            # Its bucket is full again: forgetting it changes nothing.
            del self._buckets[oldest_key]
        bucket = self._buckets[key] = _Bucket(self._burst, now)
        return bucket


class _Bucket:
    __slots__ = ("seen", "suppressed", "tokens")

    def __init__(self, tokens: float, seen: float) -> None:
        self.tokens = tokens
        self.seen = seen
        self.suppressed = 0


def fault_key(kind: type[BaseException], trace: TracebackType | None) -> tuple[object, ...]:
    """Return what makes two errors the same for a FaultLimiter: the exception's type and the line that raised it."""
    if trace is None:
        return (kind,)
    while trace.tb_next is not None:
        trace = trace.tb_next
    return (kind, trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def also(suppressed: int) -> str:
    """Return the end of a log message that stands for others too: "" or " (and 17 more like this)"."""
    return f" (and {suppressed} more like this)" if suppressed else ""


# A record's own attributes; the others came from `extra`.
RECORD_FIELDS = frozenset((*logging.LogRecord("", 0, "", 0, "", None, None).__dict__, "message", "asctime", "taskName"))


def _message(record: logging.LogRecord) -> str:
    """Return a record's message; unformatted if its arguments do not fit."""
    try:
        return record.getMessage()
    except Exception as error:
        return f"cannot format log record {record.msg!r}: {error!r}"


# C0 and C1 controls, DEL, and the Unicode line ends and direction marks that make a line look like something else.
_UNSAFE = {
    number: ascii(chr(number))[1:-1]
    for number in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def _escape(text: str) -> str:
    return text if text.isascii() and text.isprintable() else text.translate(_UNSAFE)


def _utc(seconds: float) -> str:
    milliseconds = int(seconds * 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(milliseconds // 1000))}.{milliseconds % 1000:03d}Z"


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = formatter.formatException(record.exc_info)
    parts = [record.exc_text or ""]
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(part for part in parts if part)


def _descriptor(stream: IO[str] | int | None) -> int:
    if isinstance(stream, int):
        return stream
    # sys.stderr is None if descriptor 2 was closed at startup; its number may then be reused for anything.
    stream = stream if stream is not None else sys.stderr
    try:
        return stream.fileno() if stream is not None else -1
    except ValueError:  # a closed file object
        return -1


def _identity(fd: int) -> tuple[int, int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mode


def _reopen_terminal(fd: int) -> int:
    """Return a non-blocking descriptor of our own for the terminal `fd`, or -1.

    Terminals do not support RWF_NOWAIT, and poll() only promises room for one byte; and setting O_NONBLOCK on `fd`
    would set it for every process that shares the terminal, including the user's shell.
    """
    try:
        if not os.isatty(fd):
            return -1
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


logger.addHandler(LastResort())
