"""The benchmarks work, and compare like with like. No thresholds on time: figures are for quiet machines."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # loadtests is not installed with the package

from loadtests import (  # noqa: E402
    bench,
    compare,
    measure,
    monitoring,
    options,
    plots,
    publish,
    scenarios,
    servers,
    tables,
    transfers,
    workers,
)
from loadtests.results import Result  # noqa: E402

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is missing: apt-get install wrk")

# What report.lua prints behind wrk's own words.
REPORT = """Running 1s test @ http://127.0.0.1:39263/
Requests/sec:  98148.84
JSON {"requests": 98174, "duration": 1000, "p50": 880, "p99": 1520000, "p999": 1600000, "connect": 1, "read": 20, \
"write": 300, "status": 50000, "timeout": 4000}
"""


def run_bench(*options, **environment):
    """`python -m loadtests.bench`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "loadtests.bench", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=28,
    )


def skip_without_its_package(name):
    if not servers.installed([name]):
        pytest.skip(f"{servers.NEEDS[name]} is missing")


@pytest.mark.parametrize("name", [name for name in servers.SERVERS if name != servers.OURS])
@pytest.mark.parametrize("option", ["--keepalive", "--no-keepalive"])
def test_peers_answer_the_same_bytes_as_we_do(name, option):
    skip_without_its_package(name)
    bench.check_answers([servers.OURS, name], [option, "--timeout", "30"], tls=False)


@pytest.mark.parametrize("name", [name for name in servers.SERVERS if name != servers.OURS])
def test_peers_agree_on_the_same_tls_and_answer_the_same(name, tmp_path):
    skip_without_its_package(name)
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    bench.check_answers([servers.OURS, name], bench.make_certificate(str(tmp_path)), tls=True)


@pytest.mark.parametrize("name", list(servers.SERVERS))
def test_servers_answer_pipelined_requests_and_close_when_asked(name):
    skip_without_its_package(name)
    last = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    with (
        servers.serving(name, ["--size", "5"]) as server,
        socket.create_connection((server.host, server.port), timeout=15) as sock,
        sock.makefile("rb") as file,
    ):
        sock.sendall(measure.REQUEST * 2 + last[:-1])
        sock.sendall(last[-1:])
        answers = file.read()
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answers.count(b"xxxxx") == 3
    assert (answers.count(b"Connection: keep-alive"), answers.count(b"Connection: close")) == (2, 1)


@pytest.mark.parametrize("name", list(servers.SERVERS))
def test_idle_timeout_closes_a_silent_connection(name):
    skip_without_its_package(name)
    with (
        servers.serving(name, ["--timeout", "0.05"]) as server,
        socket.create_connection((server.host, server.port), timeout=15) as sock,
    ):
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # the Protocol peers abort


def test_an_unequal_answer_is_an_error(monkeypatch):
    command = servers.SERVERS["asyncio Protocol"]
    monkeypatch.setitem(servers.SERVERS, "smaller", [*command, "--size", "10"])
    with pytest.raises(measure.BenchError, match=r"do not answer the same:\nasyncio Protocol.*\nsmaller"):
        bench.check_answers(["asyncio Protocol", "smaller"], [], tls=False)


@pytest.mark.parametrize("command", ["-c print('no')", "-c import(time).sleep(0) {port}"])
def test_a_server_that_does_not_start_is_an_error(monkeypatch, command):
    monkeypatch.setitem(servers.SERVERS, "bad", [sys.executable, *command.split(" ", 1)])
    with pytest.raises(measure.BenchError, match="did not start"), servers.serving("bad"):
        pass


ENDLESS = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listening:
    print("listening on 127.0.0.1:%d" % listening.getsockname()[1], flush=True)
    sock, _ = listening.accept()
    while True:
        sock.sendall(bytes(65536))
"""


def test_an_answer_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setitem(servers.SERVERS, "endless", [sys.executable, "-c", ENDLESS])
    with pytest.raises(measure.BenchError, match="the answer does not end"):
        bench.check_answers(["endless"], [], tls=False)


@needs_wrk
def test_a_server_that_answers_nothing_is_named_and_left_out(monkeypatch):
    def load(server, *_args, **_options):
        raise measure.NoAnswer("no answer to 10 clients within 1 s")

    monkeypatch.setattr(bench, "load", load)
    scenario = scenarios.SCENARIOS["keepalive"]
    found = bench.measure(scenario, 10, [servers.OURS], 2, 1, [], bench.Progress(1, 0))
    assert (found.runs, found.failed) == ({}, {servers.OURS: "no answer to 10 clients within 1 s"})
    assert tables.table(scenario, 10, found).endswith("gtcpserver: no answer to 10 clients within 1 s.\n")


def test_a_server_of_the_users_own(monkeypatch):
    monkeypatch.setattr(servers, "SERVERS", dict(servers.SERVERS))
    words = f"{sys.executable} examples/http_server.py --listen 127.0.0.1:{{port}} {{options}} --no-idle"
    assert servers.add_server(f"mine={words}") == "mine"
    bench.check_answers([servers.OURS, "mine"], ["--size", "10"], tls=False)
    for text in ("mine", "=x", "mine="):
        with pytest.raises(ValueError, match="must be NAME=COMMAND"):
            servers.add_server(text)


@pytest.mark.parametrize("name", [name for name in servers.SERVERS if name != servers.OURS])
def test_peers_encrypt_and_sleep_as_we_do(name):
    skip_without_its_package(name)
    bench.check_answers([servers.OURS, name], ["--aes128", "--sleep", "1"], tls=False, only_lengths=True)


def test_reads_what_wrk_says():
    assert measure.read_report(REPORT) == measure.Report(98174, p50=0.88, p99=1520.0, p999=1600.0, errors=54321)
    assert measure.read_report("wrk: what?").requests == 0


def run(cpu):
    return measure.Run(user=cpu, system=0.0, rate=1.0, p50=1.0, p99=1.0, p999=1.0, errors=0, busy=1.0)


def test_ratio_is_the_median_of_the_ratios_within_the_rounds():
    # The machine was slow in the last round: medians of each alone would say 20 / 10.
    result = Result({"a": [run(10), run(20), run(40)], "b": [run(10), run(10), run(80)]})
    assert result.ratio("a", "b").median == 1.0
    assert str(result.ratio("a", "b")) == "1.00 (noise)"
    assert str(Result({"a": [run(1), run(2)], "b": [run(2), run(5)]}).ratio("a", "b")) == "0.45"
    assert result.median("a", "cpu") == 20
    assert result.spread("a") == 0.75


def test_idle_memory_counts_what_connections_take():
    with servers.serving(servers.OURS) as server:
        assert 1 < measure.idle_memory(server, 300) < 100


@needs_wrk
def test_a_run_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "results.json"
    chosen = ("gtcpserver", "gevent StreamServer")
    servers = [word for name in chosen for word in ("--server", name)]
    done = run_bench("--scenario", "keepalive", *servers, "--rounds", "1", "--seconds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| gtcpserver |", "| gevent StreamServer |"))]
    assert len(rows) == 2
    results = json.loads(file.read_text())
    assert {"date", "cpu", "kernel", "python", "gevent", "uvloop"} <= set(results["machine"])
    assert (tmp_path / "results.md").read_text().startswith("### Keep-alive, 1 kB, 100 connections (test 2 of the Go")
    runs = results["scenarios"]["keepalive/100"]["runs"]
    assert set(runs) == set(chosen)
    for (run,) in runs.values():
        assert run["user"] + run["system"] > 0
        assert run["rate"] > 0
        assert run["p999"] >= run["p99"] >= run["p50"] > 0
        assert run["errors"] == 0


@needs_wrk
def test_a_new_connection_for_each_request_has_no_errors():
    with servers.serving(servers.OURS, ["--no-keepalive"]) as server:
        run = measure.load(server, 1, clients=10)
    assert run.errors == 0
    assert run.rate > 0


def test_missing_wrk_is_one_line_and_exit_code_2(tmp_path):
    done = run_bench("--scenario", "keepalive", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "the benchmarks need wrk: apt-get install wrk\n"


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda package: None)
    there = servers.installed(list(servers.SERVERS))
    assert servers.OURS in there
    assert not set(servers.NEEDS) & set(there)


def write_results(path, **servers_):
    runs = {name: [vars(run(figure)) for figure in figures] for name, figures in servers_.items()}
    path.write_text(json.dumps({"scenarios": {"keepalive/100": {"title": "Keep-alive", "runs": runs}}}))
    return str(path)


@pytest.mark.parametrize(
    ("now", "peers_now", "status", "verdict"),
    [
        ([10, 10, 10], [20, 20, 20], 0, "noise"),
        ([13, 13, 13], [20, 20, 20], 1, "dearer"),
        ([13, 13, 13], [26, 26, 26], 0, "noise"),  # the machine was slower
        ([7, 7, 7], [20, 20, 20], 0, "cheaper"),
        ([8, 12, 16], [20, 20, 20], 0, "noise"),  # nobody knows
    ],
)
def test_compare_finds_a_regression_beyond_the_noise(tmp_path, capsys, now, peers_now, status, verdict):
    old = write_results(tmp_path / "old", gtcpserver=[10, 10, 10], peer=[20, 20, 20])
    new = write_results(tmp_path / "new", gtcpserver=now, peer=peers_now)
    assert compare.main([old, new]) == status
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"| {verdict} |")


def test_compare_says_what_it_cannot_compare(tmp_path, capsys):
    (tmp_path / "x").write_text("no")
    for arguments in ([], ["/no/such", "/no/such"], [str(tmp_path / "x")] * 2):
        assert compare.main(arguments) == 2
        assert capsys.readouterr().err.startswith(("usage: ", "python -m loadtests.compare: cannot compare"))


def test_without_matplotlib_there_are_no_plots_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = write_results(tmp_path / "results.json", gtcpserver=[10, 11], peer=[20, 25])
    assert plots.main([results, str(tmp_path / "plot")]) == 2
    assert capsys.readouterr().err == "python -m loadtests.plots: plots need matplotlib: pip install '.[bench]'\n"


def test_plots_are_made_for_light_and_dark_pages(tmp_path):
    pytest.importorskip("matplotlib")
    results = write_results(tmp_path / "results.json", gtcpserver=[10, 11], peer=[20, 25])
    assert plots.main([results, str(tmp_path / "plot")]) == 0
    assert (tmp_path / "plot-light.png").read_bytes().startswith(b"\x89PNG")
    assert "gtcpserver" in (tmp_path / "plot-dark.svg").read_text()


def test_first_bytes_and_a_crowd():
    with servers.serving(servers.OURS) as server:
        assert measure.crowd(server, 100) > 10
        assert len(measure.first_bytes(server, beside=20, times=10)) == 10


@pytest.mark.parametrize(
    "options",
    [["--rounds", "0"], ["--seconds", "x"], ["--scenario", "none"], ["--server", "nobody"], ["--clients", "0"]],
    ids=" ".join,
)
def test_a_wrong_option_is_exit_code_2(options):
    done = run_bench(*options)
    assert done.returncode == 2
    assert options[0] in done.stderr


needs_peers = pytest.mark.skipif(
    not all(map(shutil.which, ("haproxy", "nginx", "wrk"))), reason="haproxy, nginx or wrk is missing"
)


@needs_peers
@pytest.mark.parametrize("name", ["relay-bulk", "files-large"])
def test_transfers_are_measured_against_real_peers(name, tmp_path):
    _title, scenario = transfers.SCENARIOS[name]
    found = scenario(1, 0.07, str(tmp_path))
    assert len(found) >= 2
    assert all(len(figures) == 1 for figures in found.values())


def test_transfers_name_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(transfers, "need_wrk", lambda: None)
    monkeypatch.setattr(transfers.shutil, "which", lambda program: None)
    assert transfers.main([]) == 2
    assert capsys.readouterr().err == "these benchmarks need haproxy: apt-get install haproxy\n"


@needs_wrk
def test_a_monitor_is_measured_against_none(capsys):
    assert monitoring.main(["--rounds", "1", "--seconds", "1", "--clients", "10"]) == 0
    assert "with metrics: " in capsys.readouterr().out


def test_two_workers_are_measured_against_one(capsys):
    assert workers.main(["--rounds", "1", "--seconds", "1"]) == 0
    assert "two workers: " in capsys.readouterr().out


def test_the_effect_of_options_is_measured(monkeypatch, capsys):
    title = next(iter(options.VARIANTS))
    handler, clients, variants = options.VARIANTS[title]
    few = {name: variants[name] for name in ("default", "--defer-accept 1")}
    monkeypatch.setattr(options, "VARIANTS", {title: (handler, clients, few)})
    if shutil.which("wrk") is None:
        pytest.skip("wrk is missing")
    assert options.main(["--rounds", "1", "--seconds", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\| --defer-accept 1 \| \d+\.\d \|", said, re.MULTILINE)
    assert "### TCP Fast Open" in said


def test_results_are_put_between_the_marks_of_a_page():
    page = "a\n<!-- results -->\nold\n<!-- end of results -->\nb\n"
    once = publish.put(page, "results", "new\\1")
    assert once == "a\n<!-- results -->\nnew\\1\n<!-- end of results -->\nb\n"
    assert publish.put(once, "results", "new\\1") == once
    with pytest.raises(ValueError, match="has no marks for options"):
        publish.put(page, "options", "x")
    for mark in ("results", "options"):
        assert publish.put(publish.PAGE.read_text(), mark, "x")


def test_worker_processes_take_part_where_there_are_cpus_for_them(monkeypatch):
    name = "gtcpserver, 2 workers"
    monkeypatch.setitem(servers.SERVERS, name, [*servers.SERVERS[servers.OURS], "--workers", "2"])
    bench.check_answers([servers.OURS, name], [], tls=False)
    with servers.serving(name) as server:
        assert len(measure.processes(server.pid)) == 3
        assert sum(measure.cpu_of_session(server.pid)) > 0
