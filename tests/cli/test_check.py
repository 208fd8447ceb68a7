"""gtcpserver check: what it says is what the kernel does."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys

import pytest

from gtcpserver.cli import check


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gtcpserver", "check", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_report_has_a_line_for_each_finding_and_exits_0() -> None:
    result = run_check()
    assert result.returncode == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == len(check.PROBES)
    assert all(line.endswith(" ok") or " advice: " in line for line in lines)


@pytest.mark.slow
def test_json_says_the_same() -> None:
    result = run_check("--json")
    findings = json.loads(result.stdout)
    assert result.returncode == 0
    assert [set(finding) for finding in findings] == [{"name", "value", "verdict", "advice"}] * len(check.PROBES)
    assert all((finding["verdict"] == "ok") == (finding["advice"] is None) for finding in findings)


@pytest.mark.slow
def test_closed_output_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "gtcpserver", "check"], stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writer)
    assert result.returncode == 1
    assert result.stderr == b""


def test_backlog_is_what_listen_was_granted() -> None:
    finding = check.backlog()
    granted = int(check.sysctl("net.core.somaxconn"))
    assert finding.value.startswith(f"{min(granted, 65_535)} granted")
    assert (finding.advice is None) == (granted >= check.BACKLOG_WANTED)


def test_low_backlog_gets_the_command_that_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BACKLOG_WANTED", 1 << 20)
    assert check.backlog().advice == "sysctl -w net.core.somaxconn=1048576"


@pytest.mark.parametrize(
    ("bits", "said", "advice"),
    [
        ("0", "0x0 (off)", "sysctl -w net.ipv4.tcp_fastopen=0x3"),
        ("1", "0x1 (client)", "sysctl -w net.ipv4.tcp_fastopen=0x3"),
        ("1026", "0x402 (server)", ""),
    ],
)
def test_fast_open_bits_are_named(monkeypatch: pytest.MonkeyPatch, bits: str, said: str, advice: str) -> None:
    monkeypatch.setattr(check, "sysctl", lambda name: bits)
    finding = check.fast_open()
    assert finding.value == said
    assert (finding.advice or "").startswith(advice)
    assert finding.verdict == ("advice" if advice else "ok")


@pytest.mark.parametrize("carried", [True, False])
def test_fast_open_is_tried_where_both_sides_have_it(monkeypatch: pytest.MonkeyPatch, carried: bool) -> None:
    monkeypatch.setattr(check, "sysctl", lambda name: "3")
    monkeypatch.setattr(check, "data_in_syn", lambda: carried)
    assert (check.fast_open().advice is None) is carried


def test_data_in_syn_is_only_seen_where_the_kernel_carries_it() -> None:
    carried = check.data_in_syn()
    if int(check.sysctl("net.ipv4.tcp_fastopen")) & 3 != 3:
        assert not carried


def test_descriptor_limits_are_put_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    finding = check.descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    assert str(before[1]) in finding.value


def test_steering_is_tried_with_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.draining, "steer", lambda group, stay: False)
    finding = check.steering()
    assert finding.verdict == "advice"
    # A kernel that takes the program and does nothing is found out as well.
    monkeypatch.setattr(check.draining, "steer", lambda group, stay: True)
    assert check.steering().verdict == "advice"


def test_listener_filter_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for way, said in (("filter", "attached, but"), ("ttl", "IP_MINTTL set, but"), (None, "refused by the system")):
        monkeypatch.setattr(check.draining, "drop_new_connections", lambda listening, way=way: way)
        finding = check.listener_filter()
        assert finding.verdict == "advice"
        assert said in finding.value


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the TTL is asked for on Linux")
def test_listener_filter_is_not_missed_where_a_ttl_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.draining, "_drop_by_filter", lambda listening: False)
    finding = check.listener_filter()
    assert finding.verdict == "ok"
    assert "IP_MINTTL works instead" in finding.value


def test_pipe_larger_than_allowed_is_refused_with_the_size_it_keeps() -> None:
    size, refused = check.pipe_size(1 << 20)
    assert size >= 4096
    assert not refused or size < 1 << 20
    size, refused = check.pipe_size((1 << 31) - 1)
    assert refused
    assert size < (1 << 31) - 1


def test_small_pipe_maximum_gets_the_command_that_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PIPE_WANTED", 1 << 31)
    monkeypatch.setattr(check, "pipe_size", lambda wanted: (65536, "Operation not permitted"))
    assert check.splice_pipe().advice == f"sysctl -w fs.pipe-max-size={1 << 31}"


def test_every_congestion_control_named_as_usable_can_be_set() -> None:
    value = check.congestion_control().value
    usable = value.partition("usable here: ")[2].partition(";")[0].split(", ")
    with socket.socket() as sock:
        for name in usable:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def test_probe_that_the_system_refuses_is_a_finding_not_a_traceback() -> None:
    def event_horizon() -> check.Finding:
        raise OSError(errno.EPERM, "Operation not permitted")

    finding = check.probe_safely(event_horizon)
    assert finding.name == "event horizon"
    assert finding.value == "cannot be probed: Operation not permitted"
    assert finding.verdict == "advice"


@pytest.mark.slow
def test_select_backend_is_advised_against() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gtcpserver", "check", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "GEVENT_BACKEND": "select"},
    )
    (loop,) = (finding for finding in json.loads(result.stdout) if finding["name"] == "event loop")
    assert loop["verdict"] == "advice"
    assert "select" in loop["value"]
