"""What is written as JSON is JSON (RFC 8259), whatever is in it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.diagnostics.logs import JsonFormatter, NonBlockingHandler
from gtcpserver.monitoring.web import _json
from gtcpserver.server.access_log import AccessLog
from gtcpserver.strict_json import to_json, to_short_json
from gtcpserver.testing import connect, serving
from kit.supervised import COMMAND


def strict(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.just(1).map(lambda one: one << 20_000)
    | st.builds(Broken)
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=5) | st.floats() | st.tuples(st.integers()) | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(values)
def test_any_value_becomes_json(value: Any) -> None:
    strict(to_json(value))
    strict(_json(value))


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=5) | st.just("n" * 5000), values), st.integers(200, 1000))
def test_a_short_line_is_json_of_that_length(fields: dict[str, Any], longest: int) -> None:
    line = to_short_json(fields, longest)
    strict(line)
    assert len(line) <= longest


class BrokenMapping(dict[str, int]):
    """Its own methods fail, as those of a proxy for an object that is gone."""

    def items(self) -> Any:
        raise LookupError


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (BrokenMapping(a=1), "{'a': 1}"),
        ([BrokenMapping(a=1), float("nan")], ["{'a': 1}", None]),
        (float("nan"), None),
        (float("-inf"), None),
        ([1.5, {"a": float("inf")}], [1.5, {"a": None}]),
        ({float("nan"): 1, (1, 2): 2}, {"nan": 1, "(1, 2)": 2}),
        (Broken(), "<Broken>"),
        (b"x", "b'x'"),
    ],
    ids=range(8),
)
def test_what_json_does_not_have_becomes_null_or_text(value: Any, becomes: Any) -> None:
    assert strict(to_json(value)) == becomes
    assert "\n" in to_json([value], indent=2)


@pytest.mark.slow
def test_values_that_refer_to_themselves_or_are_deep_end() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    strict(to_json(circle))
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    strict(to_json({"deep": deep}))


@pytest.mark.slow
def test_a_long_line_keeps_the_begin_and_the_end_of_its_longest_texts() -> None:
    line = to_short_json({"message": "short", "exception": "begin" + "é" * 100_000 + "end"}, 10_000)
    found = strict(line)
    assert found["message"] == "short"
    assert found["exception"].startswith("begin")
    assert found["exception"].endswith("end")
    assert "characters cut" in found["exception"]
    assert len(line) > 2_000
    assert strict(to_short_json({str(number): number for number in range(10_000)}, 1000))["0"] == 0


def lines_of(record: logging.LogRecord) -> list[dict[str, Any]]:
    reader, writer = os.pipe()
    handler = NonBlockingHandler(writer)
    handler.setFormatter(JsonFormatter())
    handler.emit(record)
    os.close(writer)
    with open(reader, "rb") as pipe:
        return [strict(line) for line in pipe.read().splitlines()]


@pytest.mark.parametrize(
    ("message", "arguments", "extra"),
    [
        ("ratio", (), {"ratio": float("nan"), "most": float("inf")}),
        ("%d %s", ("not a number",), {}),
        ("x" * 200_000, (), {}),
        ("x", (), {"padding": ["y" * 100_000]}),
        ("x", (), {"broken": Broken(), "huge": [1 << 20_000]}),
        ("\ud800", (), {"\ud800": "\ud800"}),
    ],
    ids=range(6),
)
def test_a_json_log_is_json_a_line(message: str, arguments: tuple[Any, ...], extra: dict[str, Any]) -> None:
    record = logging.LogRecord("app", logging.INFO, __file__, 1, message, arguments, None)
    record.__dict__.update(extra)
    (found,) = lines_of(record)
    assert found["level"] == "INFO"
    assert message[:20] in found["message"]


def test_an_access_log_line_is_json_whatever_the_handler_adds(tmp_path: Path) -> None:
    def handle(conn: Any) -> None:
        conn.log_fields["ratio"] = float("nan")
        conn.log_fields["speed"] = float("inf")
        conn.log_fields["huge"] = 1 << 20_000
        conn.log_fields["long"] = "x" * 200_000
        conn.log_fields["broken"] = Broken()
        conn.sendall(conn.recv(10))

    path = tmp_path / "access.log"
    with serving(handle, access_log=AccessLog("json", path)) as server, connect(server) as client:
        client.sendall(b"x")
        assert client.recv(10) == b"x"
    (line,) = path.read_text().splitlines()
    fields = strict(line)
    assert fields["ratio"] is None
    assert fields["speed"] is None
    assert fields["result"] == "ok"
    assert fields["broken"] == "<Broken>"
    assert len(line) < 64 * 1024


def test_a_text_line_is_written_whatever_the_handler_adds(tmp_path: Path) -> None:
    def handle(conn: Any) -> None:
        conn.log_fields["huge"] = 1 << 20_000
        conn.log_fields["broken"] = Broken()

    path = tmp_path / "access.log"
    with serving(handle, access_log=AccessLog("text", path)) as server, connect(server) as client:
        assert client.recv(10) == b""
    (line,) = path.read_text().splitlines()
    assert line.endswith("broken=<Broken>")


@pytest.mark.slow
def test_infinite_settings_are_shown_as_json(tmp_path: Path) -> None:
    (tmp_path / "app.toml").write_text("timeout = inf\n")
    command = [*COMMAND, "config", "show", "--json", "echo", "--config", "app.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    if done.returncode == 0:
        strict(done.stdout)
    else:
        assert b"Traceback" not in done.stderr
