"""Nothing needs what Linux alone has: all of that is taken away (kit/without_linux), and the server works."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.paths import ROOT
from kit.without_linux.linux_alone import NAMES

PACKAGE = ROOT / "gtcpserver"

#: For a busy machine.
SECONDS = 150

#: A part of the core that takes few seconds. `make without-linux` runs all of it.
PART = (
    "cli/test_cli.py::test_echo_sends_back_and_stops_with_a_report",
    "connection/test_connection.py::test_recv_until_gives_one_message_at_a_time",
    "connection/test_connection.py::test_recv_waits_without_stopping_other_greenlets",
    "connection/test_connection.py::test_recv_times_out_and_works_afterwards",
    "connection/test_connection.py::test_dup_and_detach",
    "server/test_server.py::test_several_addresses",
    "server/test_server.py::test_idle_connections_hold_no_place",
    "server/test_stop.py::test_stop_serves_connections_already_queued",
    "supervisor/test_supervisor.py::test_sigterm_waits_for_handlers_and_new_clients_are_refused_meanwhile",
    "tls/test_tls.py::test_reading_in_every_way",
    "transfer/test_relay.py::test_half_close_is_passed_on_and_the_other_direction_goes_on",
    "transfer/test_sendfile.py::test_a_part_is_sent_exactly",
)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "kit" / "without_linux")}


def names_taken(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            beginnings = NAMES.get(node.value.id.removeprefix("_"), ())
            if beginnings and node.attr.startswith(beginnings):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value.id}.{node.attr}"


def test_only_one_module_takes_from_python_what_linux_alone_has() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "linux.py"]
    assert list(names_taken(PACKAGE / "linux.py"))
    assert [name for path in others for name in names_taken(path)] == []


@pytest.mark.slow
def test_a_part_of_the_core_works_without_it() -> None:
    with tempfile.TemporaryDirectory() as folder:  # short: paths of Unix sockets have 107 bytes
        options = ("-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={folder}/t")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *PART],
            cwd=ROOT / "tests",
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped" not in result.stdout.splitlines()[-1]
