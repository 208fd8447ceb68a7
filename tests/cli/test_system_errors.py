"""What the system refuses at a start, where nobody expects it, is one line and exit status 1: no traceback."""

from __future__ import annotations

import ssl

import pytest

from gtcpserver.cli.commands import run
from gtcpserver.proxy import handler


@pytest.mark.parametrize("left", ["x", "[]", "3", '{"sockets": []}', '{"sockets": [3]}'])
def test_what_another_master_has_left_and_nobody_can_read_is_told_in_one_line(monkeypatch, capsys, left):
    monkeypatch.setenv("GTCPSERVER_HANDOVER", left)
    assert run(["echo", "--bind", "127.0.0.1:0", "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gtcpserver: cannot take over from the running master: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BlockingIOError(11, "Resource temporarily unavailable"), "BlockingIOError: [Errno 11] Resource temporarily"),
        (ssl.SSLError("malloc failure"), "SSLError: ('malloc failure',) (in refused, "),
        (MemoryError(), "MemoryError: (in refused, "),
    ],
)
def test_a_start_that_the_system_refuses_is_told_in_one_line(monkeypatch, capsys, error, line):
    def refused():
        raise error

    monkeypatch.setattr(handler, "unique_pseudonym", refused)  # getrandom(2)
    assert run(["proxy", "--mixed", "127.0.0.1:0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"gtcpserver: {line}")
    assert said.count("\n") == 1
