"""logs.py: records never wait for a reader, text is escaped, floods are thinned out."""

from __future__ import annotations

import json
import logging
import os
import pty
import select
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.diagnostics.logs import FaultLimiter, JsonFormatter, NonBlockingHandler, TextFormatter, fault_key


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            pass


def make_record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("gtcpserver", logging.INFO, __file__, 1, message, args, None)
    record.__dict__.update(fields)
    return record


def record_of_error(error: Exception) -> logging.LogRecord:
    try:
        raise error
    except Exception:
        return logging.LogRecord("gtcpserver", logging.ERROR, __file__, 1, "handler failed", (), sys.exc_info())


def text_handler(fd: int) -> NonBlockingHandler:
    handler = NonBlockingHandler(fd)
    handler.setFormatter(TextFormatter())
    return handler


def read_available(fd: int) -> bytes:
    data = b""
    while select.select([fd], [], [], 0)[0]:
        part = os.read(fd, 65536)
        if not part:
            break
        data += part
    return data


@pytest.mark.slow
def test_unread_pipe_drops_records_and_says_so_when_read_again(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = text_handler(writer)
    for number in range(10_000):
        handler.handle(make_record("line %d", number))
    assert 0 < handler.dropped < 10_000

    before = read_available(reader).decode().splitlines()
    assert len(before) == 10_000 - handler.dropped
    assert [line.rsplit(" ", 1)[1] for line in before] == [str(number) for number in range(len(before))]

    handler.handle(make_record("after"))
    notice, after = read_available(reader).decode().splitlines()
    assert notice.endswith(f"{handler.dropped} log lines dropped: nobody was reading")
    assert after.endswith("gtcpserver: after")

    handler.handle(make_record("again"))
    assert len(read_available(reader).splitlines()) == 1


def test_notice_goes_out_at_exit_when_no_record_follows(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = text_handler(writer)
    while not handler.dropped:
        handler.handle(make_record("x" * 1000))
    read_available(reader)
    handler.close()
    assert b"1 log line dropped: nobody was reading" in read_available(reader)


def test_two_handlers_racing_for_the_last_room_of_a_pipe_do_not_wait(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writer = pipe
    handler = text_handler(writer)

    class AlwaysReady:
        def register(self, fd: int, events: int) -> None: ...
        def poll(self, timeout: int) -> list[int]:
            return [1]

    monkeypatch.setattr("gtcpserver.diagnostics.logs._poll", AlwaysReady)
    try:
        while True:
            os.pwritev(writer, [b"x" * 4096], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        pytest.skip("this kernel has no RWF_NOWAIT for pipes")
    handler.handle(make_record("x"))
    assert handler.dropped == 1


def test_record_longer_than_the_room_is_finished_before_the_next(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = text_handler(writer)
    for _ in range(14):
        handler.handle(make_record("x" * 4000))
    handler.handle(make_record("a" * 30_000))
    handler.handle(make_record("dropped"))
    data = read_available(reader)
    handler.handle(make_record("last"))
    data += read_available(reader)
    lines = data.decode().splitlines()
    assert lines[14].endswith("gtcpserver: " + "a" * 30_000)
    assert lines[15].endswith("1 log line dropped: nobody was reading")
    assert lines[16].endswith("gtcpserver: last")
    assert len(lines) == 17


def test_record_is_cut_at_the_largest_size() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        handler = text_handler(writer)
        line = handler._encode(make_record("x" * 1_000_000))  # noqa: SLF001  the line of a record
    assert len(line) < 70_000
    assert line.endswith(b"bytes cut\n")


def test_closed_descriptor_is_swallowed_and_counted(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    handler = text_handler(writer)
    os.close(writer)
    handler.handle(make_record("nobody"))
    assert handler.dropped == 1


def test_no_descriptor_at_all_is_swallowed() -> None:
    handler = text_handler(-1)
    handler.handle(make_record("nobody"))
    assert handler.dropped == 1


def test_pipe_without_reader_is_swallowed(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    handler = text_handler(writer)
    handler.handle(make_record("nobody"))
    assert handler.dropped == 1


def test_nothing_is_logged_to_a_client_that_got_the_number_of_stderr() -> None:
    reader, writer = os.pipe()
    handler = text_handler(writer)
    os.close(reader)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(ours.fileno(), writer)
        try:
            handler.handle(make_record("secret"))
            assert handler.dropped == 1
            assert not select.select([theirs], [], [], 0)[0]
        finally:
            os.close(writer)


def test_a_file_put_in_place_of_stderr_is_followed(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "log")
    reader, writer = os.pipe()
    handler = text_handler(writer)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.dup2(fd, writer)
    handler.handle(make_record("in the file"))
    for opened in (reader, writer, fd):
        os.close(opened)
    with open(path) as file:
        assert file.read().endswith("in the file\n")
    assert handler.dropped == 0


@pytest.mark.slow
def test_socket_as_stderr_is_written_and_does_not_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        handler = text_handler(ours.fileno())
        handler.handle(make_record("journal"))
        assert theirs.recv(1000).endswith(b"gtcpserver: journal\n")
        for _ in range(10_000):
            handler.handle(make_record("x" * 100))
        assert handler.dropped


@pytest.mark.slow
def test_terminal_nobody_reads_does_not_block_and_keeps_its_flags() -> None:
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        handler = text_handler(slave)
        handler.handle(make_record("on the terminal"))
        said = b""
        while not said.endswith(b"on the terminal\n"):  # a read may return a part
            said += os.read(master, 1000)
        for _ in range(10_000):
            handler.handle(make_record("x" * 100))
        assert handler.dropped
        assert os.get_blocking(slave)
        handler.close()
    finally:
        os.close(master)
        os.close(slave)


def test_wrong_format_string_is_logged_not_raised(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = text_handler(writer)
    handler.handle(make_record("%d connections", "many"))
    assert b"Z INFO gtcpserver: cannot format log record '%d connections'" in read_available(reader)


def test_message_cannot_forge_a_line() -> None:
    text = TextFormatter().format(
        make_record("from %s", "a\r\n2026-01-01T00:00:00.000Z ERROR root: b\x1b[2J\x9b\u2028\u202e")
    )
    assert len(text.splitlines()) == 1
    assert text.endswith(r"from a\r\n2026-01-01T00:00:00.000Z ERROR root: b\x1b[2J\x9b\u2028\u202e")


def test_traceback_is_multi_line_and_indented() -> None:
    text = TextFormatter().format(record_of_error(ValueError("line one\nERROR forged\x1b[0m")))
    first, *rest = text.split("\n")
    assert first.endswith("ERROR gtcpserver: handler failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == r"    ERROR forged\x1b[0m"
    assert all(line.startswith("    ") for line in rest)


def test_json_is_one_object_a_line() -> None:
    record = record_of_error(ValueError("two\nlines"))
    record.client = "192.0.2.1:5"
    record.odd = object
    line = JsonFormatter().format(record)
    fields = json.loads(line)
    assert "\n" not in line
    assert fields["message"] == "handler failed"
    assert fields["level"] == "ERROR"
    assert fields["client"] == "192.0.2.1:5"
    assert fields["exception"].startswith("Traceback")
    assert fields["time"].endswith("Z")


@pytest.mark.slow
@given(st.text())
def test_any_message_is_one_line_of_text(message: str) -> None:
    text = TextFormatter().format(make_record("%s", message))
    text.encode("utf-8", "backslashreplace")
    assert len(text.splitlines()) == 1


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_limiter_lets_a_burst_through_then_one_an_interval_with_the_count() -> None:
    clock = Clock()
    limiter = FaultLimiter(burst=3, interval=10.0, clock=clock)
    assert [limiter.allow("a") for _ in range(5)] == [0, 0, 0, None, None]
    assert limiter.allow("b") == 0
    clock.now += 9
    assert limiter.allow("a") is None
    clock.now += 1
    assert limiter.allow("a") == 3
    assert limiter.allow("a") is None
    assert limiter.suppressed == 4
    clock.now += 1000
    assert [limiter.allow("a") for _ in range(4)] == [1, 0, 0, None]


def test_limiter_bounds_keys_and_what_new_keys_can_print() -> None:
    clock = Clock()
    limiter = FaultLimiter(burst=2, interval=1.0, max_keys=10, clock=clock)
    passed = sum(limiter.allow(number) is not None for number in range(1000))
    assert passed == 10 + 2
    assert len(limiter._buckets) == 10  # noqa: SLF001  bounded memory
    clock.now += 2
    assert limiter.allow("new") == 0
    assert len(limiter._buckets) == 10  # noqa: SLF001  bounded memory
    assert "new" in limiter._buckets  # noqa: SLF001  bounded memory


@pytest.mark.parametrize("options", [{"burst": 0}, {"interval": 0}, {"max_keys": 0}])
def test_limiter_refuses_nonsense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        FaultLimiter(**options)


def test_fault_key_is_the_raising_line() -> None:
    def fail(message: str) -> tuple[object, ...]:
        try:
            raise ValueError(message)
        except ValueError as error:
            return fault_key(type(error), error.__traceback__)

    assert fail("one") == fail("two")
    assert fail("one")[0] is ValueError
    assert fault_key(KeyError, None) == (KeyError,)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
def test_configured_process_logs_greenlet_errors_warnings_and_unraisable_exceptions(patch: str) -> None:
    result = run_python(
        patch
        + """
import gevent, warnings, logging
from gtcpserver.diagnostics.logs import configure_logging
configure_logging("info", "json")
def fail(): raise ZeroDivisionError("in a greenlet")
gevent.spawn(fail).join()
class Odd:
    def __del__(self): raise KeyError("in a finalizer")
Odd()
warnings.warn("old way")
logging.getLogger("app").info("mine")
logging.getLogger("app").debug("not mine")
"""
    )
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert [record["level"] for record in records] == ["ERROR", "ERROR", "WARNING", "INFO"]
    assert "in a greenlet" in records[0]["exception"]
    assert "in a finalizer" in records[1]["exception"]
    assert "old way" in records[2]["message"]
    assert records[3]["message"] == "mine"


@pytest.mark.slow
def test_unread_stderr_does_not_stop_the_event_loop_when_greenlets_fail() -> None:
    code = """
from gevent import monkey; monkey.patch_all()
import gevent
from gtcpserver.diagnostics.logs import configure_logging
handler = configure_logging()
exec("\\n".join(f"def fail{i}(): raise ValueError({i}, 'x' * 200)" for i in range(2000)))
for i in range(2000):
    gevent.spawn(globals()[f"fail{i}"]).join()
print(handler.dropped)
"""
    reader, writer = os.pipe()
    try:
        process = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writer, timeout=60)
    finally:
        os.close(writer)
        os.close(reader)
    assert process.returncode == 0
    assert int(process.stdout) > 0


@pytest.mark.slow
def test_process_started_with_stderr_closed_runs() -> None:
    result = subprocess.run(
        [
            "sh",
            "-c",
            f'{sys.executable} -c "from gtcpserver.diagnostics.logs import configure_logging as c; import logging, os;'
            "h = c(); fd = os.open('/dev/null', os.O_WRONLY); logging.error('x'); print(h.dropped)\" 2>&-",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "1\n"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [({"level": "loud"}, "LOUD"), ({"format": "xml"}, "log format must be")])
def test_unknown_level_or_format_is_an_error(options: dict[str, str], said: str) -> None:
    result = run_python(f"from gtcpserver.diagnostics.logs import configure_logging; configure_logging(**{options!r})")
    assert result.returncode == 1
    assert "ValueError" in result.stderr
    assert said in result.stderr
