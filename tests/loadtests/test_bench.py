"""The benchmarks work, and compare like with like. No thresholds on time: figures are for quiet machines."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gtcpserver
from kit.paths import ROOT

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # loadtests is not installed with the package

from loadtests.bench import (
    adapters,
    answers,
    compare,
    go_peers,
    idle,
    machine,
    measure,
    monitoring,
    options,
    plots,
    proxies,
    proxy_peers,
    publish,
    request_cost,
    scenarios,
    servers,
    starting,
    transfers,
    turns,
)
from loadtests.bench.results import Figures, Ratio, Result, significant

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
        timeout=60,
    )


def skip_where_it_is_missing(name):
    if why := servers.why_missing(name):
        pytest.skip(why)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--timeout", "30"], ["--no-keepalive", "--size", "16384"], ["--aes128", "--sleep", "1"]],
    ids=" ".join,
)
def test_peers_answer_as_we_do(options):
    answers.check_answers(servers.installed(list(servers.SERVERS)), options)


@pytest.mark.slow
def test_peers_agree_on_the_same_tls_and_answer_the_same(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    answers.check_answers(
        servers.installed(list(servers.SERVERS)), request_cost.make_certificate(str(tmp_path)), tls=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(servers.SERVERS))
def test_servers_answer_pipelined_requests_and_close_when_asked(name):
    skip_where_it_is_missing(name)
    last = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with (
        servers.serving(name, ["--size", "5"]) as server,
        socket.create_connection((server.host, server.port), timeout=60) as sock,
        sock.makefile("rb") as file,
    ):
        sock.sendall(answers.REQUEST * 2 + last[:-1])
        sock.sendall(last[-1:])
        said = file.read()
    assert said.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert said.count(b"aaaaa") == 3
    assert (said.count(b"Connection: keep-alive"), said.count(b"Connection: close")) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(servers.SERVERS))
def test_idle_timeout_closes_a_silent_connection(name):
    skip_where_it_is_missing(name)
    with (
        servers.serving(name, ["--timeout", "0.05"]) as server,
        socket.create_connection((server.host, server.port), timeout=60) as sock,
    ):
        try:
            said = b"".join(iter(lambda: sock.recv(4096), b""))
            assert said == b"" or said.startswith(b"HTTP/1.1 408 Request Timeout\r\n")  # of fasthttp
        except ConnectionResetError:
            pass  # the Protocol peers abort


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--size", "10"], ["--no-keepalive"]], ids=" ".join)
def test_an_unequal_answer_is_an_error(monkeypatch, options):
    command = servers.SERVERS["asyncio Protocol"]
    monkeypatch.setitem(servers.SERVERS, "other", [*command, *options])
    with pytest.raises(
        measure.BenchError, match=r"do not answer the same:\nasyncio Protocol: 200, 1024.*\nother: 200, "
    ):
        answers.check_answers(["asyncio Protocol", "other"], [])


def test_what_is_encrypted_is_compared_behind_the_key():
    from loadtests.bench.peers.common import encrypt

    assert answers.decrypt(encrypt(b"x" * 1024)) == b"x" * 1024
    for content in (b"x" * 1040, b"", bytes(15)):
        with pytest.raises(measure.BenchError, match="not encrypted with"):
            answers.decrypt(content)


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_answer_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setitem(servers.SERVERS, "endless", [sys.executable, "-c", ENDLESS])
    with pytest.raises(measure.BenchError, match="endless does not answer as it must: the answer does not end"):
        answers.check_answers(["endless"], [])


@pytest.mark.slow
@needs_wrk
def test_a_server_that_answers_nothing_is_named_and_left_out(monkeypatch):
    def load(server, *_args, **_options):
        raise measure.NoAnswer("no answer to 10 clients within 1 s")

    monkeypatch.setattr(request_cost, "load", load)
    cell = request_cost.Cell("keepalive", 10, [servers.OURS])
    found = request_cost.measure(cell, 2, 1, False, [], turns.Progress(1, 0))
    assert (found.runs, found.failed) == ({}, {servers.OURS: "no answer to 10 clients within 1 s"})
    assert found.table().endswith("gtcpserver: no answer to 10 clients within 1 s.")


@pytest.fixture
def own_servers(monkeypatch):
    monkeypatch.setattr(servers, "SERVERS", dict(servers.SERVERS))
    monkeypatch.setattr(servers, "OWN", [])


@pytest.mark.slow
def test_a_server_of_the_users_own(own_servers):
    words = f"{sys.executable} examples/http_server.py --listen 127.0.0.1:{{port}} {{options}} --no-idle"
    assert servers.add_server(f"mine={words}") == "mine"
    answers.check_answers([servers.OURS, "mine"], ["--size", "10"])
    for text in ("mine", "=x", "mine=", "mine=again", "gtcpserver=x"):
        with pytest.raises(ValueError, match=r"must be NAME=COMMAND|is the name of one that is there"):
            servers.add_server(text)


def test_a_server_with_other_options_is_told_values(own_servers):
    servers.add_server("go=./http-server -listen 127.0.0.1:{port} -aaaa {size} -keepalive={keepalive} -sleep {sleep}")
    sleep = scenarios.SCENARIOS["sleep"]
    expected = "./http-server -listen 127.0.0.1:7 -aaaa 128 -keepalive=true -sleep 1"
    assert servers.command_of("go", sleep.options, 7) == expected.split()
    expected = "./http-server -listen 127.0.0.1:7 -aaaa 1024 -keepalive=false -sleep 0"
    assert servers.command_of("go", ["--no-keepalive", "--timeout", "30"], 7) == expected.split()


# As the Go original's: its own head, and after it starts it says more than a pipe holds.
CHATTY = """
import socketserver, sys, time
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip():
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\\r\\nServer: tsrv\\r\\nContent-length: 1024\\r\\n\\r\\n" + b"a" * 1024)
            print("served " + "." * 100_000, flush=True)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 1000
with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
    server.serve_forever()
"""


@pytest.mark.slow
@needs_wrk
def test_a_chatty_server_is_measured_beside_ours_and_the_main_peers(tmp_path):
    (tmp_path / "chatty.py").write_text(CHATTY)
    file = tmp_path / "results.json"
    own = ["--server", f"chatty={sys.executable} {tmp_path}/chatty.py {{port}} {{size}}"]
    own += ["--server", f"rude={sys.executable} -m http.server --bind 127.0.0.1 {{port}} --directory {tmp_path}"]
    done = run_bench("--quick", "--clients", "4", "--scenario", "keepalive", "--no-plots", "--json", str(file), *own)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["scenarios"]["keepalive/4"]
    assert {servers.OURS, "chatty", scenarios.GEVENT} <= set(found["runs"])
    assert all(run["errors"] == 0 and run["rate"] > 10 for run in found["runs"]["chatty"])
    assert "rude" not in found["runs"]
    assert "do not answer the same" in found["failed"]["rude"]
    assert f"of {scenarios.GEVENT}" in done.stdout


def test_servers_that_are_named_are_the_only_ones_beside_ours():
    alone = request_cost.parse(["--server", "threads", "--scenario", "keepalive", "--clients", "10"])
    (cell,) = request_cost.cells_of(alone)
    assert cell.servers == [servers.OURS, "threads"]
    assert request_cost.against_of(scenarios.SCENARIOS["keepalive"], cell.servers) == [servers.OURS]


def test_the_eight_tests_of_the_original():
    tests = {scenarios.SCENARIOS[name].test: scenarios.SCENARIOS[name] for name in scenarios.ORIGINAL}
    assert list(tests) == ["1", "1.1", "2", "2.1", "3", "4", "5", "6"]
    known = {"--no-keepalive": "new", "--aes128": "aes", "--size": "size", "--sleep": "sleep", "--timeout": "timeout"}
    told = {number: [known.get(word, word) for word in test.options] for number, test in tests.items()}
    assert told == {
        "1": ["new"],
        "1.1": ["new"],
        "2": [],
        "2.1": [],
        "3": ["new", "aes"],
        "4": ["aes"],
        "5": ["size", "128", "sleep", "1"],
        "6": ["new", "size", "16384"],
    }
    assert [number for number, test in tests.items() if test.tls] == ["1.1", "2.1"]
    published = {name for loads in scenarios.PUBLISHED.values() for name, who in loads if who == scenarios.EVERYBODY}
    assert published == set(scenarios.ORIGINAL)
    assert {name for name, _ in scenarios.PUBLISHED[100]} == set(scenarios.SCENARIOS)


def test_clients_are_as_many_as_descriptors_allow(monkeypatch, capsys):
    monkeypatch.setattr(request_cost, "allow_descriptors", lambda: 20_000)
    assert request_cost.parse([]).clients == [100, 1000, 10_000]
    cells = {(cell.scenario, cell.clients) for cell in request_cost.cells_of(request_cost.parse(["--original"]))}
    assert {("keepalive", 10_000), ("tls-keepalive", 1000), ("16k", 100)} <= cells
    assert ("tls-keepalive", 10_000) not in cells  # the handshakes alone would take longer than a run
    asked = request_cost.parse(["--scenario", "tls-keepalive", "--clients", "10000"])
    assert len(request_cost.cells_of(asked)) == 1
    monkeypatch.setattr(request_cost, "allow_descriptors", lambda: 4096)
    assert request_cost.parse([]).clients == [100, 1000]
    expected = "left out: 10,000 clients need more descriptors than the limit of 4,096: ulimit -Hn\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(SystemExit):
        request_cost.parse(["--clients", "5000"])
    assert "5,000 clients need more descriptors" in capsys.readouterr().err


def test_reads_what_wrk_says():
    assert measure.read_report(REPORT) == measure.Report(98174, p50=0.88, p99=1520.0, p999=1600.0, errors=54321)
    assert measure.read_report("wrk: what?").requests == 0


def run(cpu, **other):
    figures = dict.fromkeys(("rate", "p50", "p99", "p999", "busy"), 1.0) | {"errors": 0, "client": 0.5}
    return measure.Run(**{**figures, "user": cpu, "system": 0.0, **other})


def test_ratio_is_the_median_of_the_ratios_within_the_rounds():
    # The machine was slow in the last round: medians of each alone would say 20 / 10.
    result = Result("", {"a": [run(10), run(20), run(40)], "b": [run(10), run(10), run(80)]})
    assert result.ratio("a", "b").median == 1.0
    assert str(result.ratio("a", "b")) == "1.00 (noise)"
    assert result.median("a", "cpu") == 20
    assert "| a | 20.0 | 0.0 | 20.0 | ±75% |" in result.table()


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ([0.50], "0.50 (noise)"),  # one round tells nothing
        ([1.05, 1.08], "1.06 (noise)"),  # as two equal servers give in a third of all cases
        ([0.50, 0.51], "0.51"),
        ([0.98, 0.98, 0.98], "0.98 (noise)"),  # less than the accounts can tell
        ([0.90, 0.91, 0.92], "0.91"),
        ([0.80, 0.90, 0.99], "0.90 (noise)"),
        ([0.80, 0.84, 0.90, 0.88, 0.85] * 2, "0.85"),
    ],
)
def test_a_difference_is_one_when_chance_does_not_make_it(ratios, text):
    assert str(Ratio.of(ratios)) == text


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_equal_servers_are_rarely_called_different(rounds):
    chance = random.Random(1)
    draws = [Ratio.of(chance.gauss(1, 0.1) for _ in range(rounds)) for _ in range(1000)]
    assert sum(not ratio.is_noise for ratio in draws) < 80  # of which 50 are to be expected


def test_who_was_the_limit():
    for busy, client, limit in [(0.95, 0.5, "server"), (0.5, 0.95, "client"), (0.5, 0.5, "neither")]:
        assert Result("", {"a": [run(1, busy=busy, client=client)] * 3}).limit("a") == limit
    assert Result("", {"a": [run(1, busy=1.0, client=1.0)]}).limit("a") == "server and client"


def test_figures_have_three_digits():
    assert [significant(figure) for figure in (0.0123, 1.234, 12.34, 99.97, 123.4, 12345.6)] == [
        *("0.012", "1.23", "12.3", "100", "123", "12,346")
    ]


@pytest.mark.slow
def test_idle_memory_counts_what_connections_take():
    with servers.serving(servers.OURS) as server:
        assert 0.3 < idle.idle_memory(server, 300) < 100


@pytest.mark.slow
@needs_wrk
def test_a_run_prints_a_table_and_writes_json(tmp_path):
    file = tmp_path / "results.json"
    chosen = ("gtcpserver", "gevent StreamServer")
    servers = [word for name in chosen for word in ("--server", name)]
    ten = ("--clients", "10")
    done = run_bench("--scenario", "keepalive", *servers, "--rounds", "1", "--seconds", "1", "--json", str(file), *ten)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| gtcpserver |", "| gevent StreamServer |"))]
    assert len(rows) == 2
    results = json.loads(file.read_text())
    told = {"date", "commit", "cpu", "kernel", "python", "gevent", "uvloop", "cryptography", "openssl", "wrk"}
    assert told <= set(results["machine"])
    assert re.match(r"\d+\.", results["machine"]["wrk"])
    assert (tmp_path / "results.md").read_text().startswith("### Keep-alive, 1 kB, 10 connections (test 2 of the Go")
    assert results["settings"] == {"rounds": 1, "seconds": 1, "quick": False}
    runs = results["scenarios"]["keepalive/10"]["runs"]
    assert set(runs) == set(chosen)
    for (run,) in runs.values():
        assert run["user"] + run["system"] > 0
        assert run["rate"] > 0
        assert run["p999"] >= run["p99"] >= run["p50"] > 0
        assert run["errors"] == 0
        assert 0 < run["client"] < 1.1
    assert (tmp_path / "results-light.svg").exists() == (find_spec("matplotlib") is not None)


@pytest.mark.slow
@needs_wrk
def test_a_new_connection_for_each_request_has_no_errors():
    with servers.serving(servers.OURS, ["--no-keepalive"]) as server:
        run = measure.load(server, 1, clients=10)
    assert run.errors == 0
    assert run.rate > 0


@pytest.mark.slow
def test_missing_programs_are_one_line_and_exit_code_2(tmp_path):
    done = run_bench("--scenario", "keepalive", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("the benchmarks need openssl, wrk: apt-get install openssl wrk\n")


def test_make_bench_looks_for_all_programs_before_it_begins(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is missing")
    for program in ("make", "sh"):
        (tmp_path / program).symlink_to(shutil.which(program))
    done = subprocess.run(
        ["make", "bench", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    expected = "the benchmarks need haproxy, nginx-light, openssl, wrk: apt-get install haproxy nginx-light openssl wrk"
    assert done.stderr.splitlines()[0] == expected
    assert "loadtests.bench" not in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_missing_programs_are_installed_by_root(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\necho "$@" >>{log}\n')  # which does not install them
    (tmp_path / "apt-get").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.bench.machine"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    packages = "haproxy nginx-light openssl wrk"
    assert log.read_text() == f"-qq update\n-qq install -y --no-install-recommends {packages}\n"
    assert (done.returncode, done.stdout) == (2, f"installing {packages}\n")
    assert done.stderr.endswith(f"apt-get install {packages}\n")


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda package: None)
    there = servers.installed(list(servers.SERVERS))
    assert servers.OURS in there
    assert not set(servers.NEEDS) & set(there)


def test_peers_in_go_are_left_out_where_go_is_missing(monkeypatch):
    go_peers.why_missing.cache_clear()
    monkeypatch.setattr(go_peers.shutil, "which", lambda program: None)
    assert {servers.why_missing(name) for name in go_peers.PROGRAMS} == {"Go is missing (Debian: golang-go)"}
    assert not set(go_peers.PROGRAMS) & set(servers.installed(list(servers.SERVERS)))
    go_peers.why_missing.cache_clear()


def test_the_row_in_pure_python_is_one_of_a_compiled_package(monkeypatch):
    for compiled in (True, False):
        monkeypatch.setattr(gtcpserver, "compiled", compiled)
        assert (servers.PURE in servers.installed([servers.PURE])) == compiled
    assert servers.SERVERS[servers.PURE][2:] == servers.SERVERS[servers.OURS]


def write_results(path, settings=None, figures=None, failed=None, machine=None, **servers_):
    runs = {
        name: [vars(one if isinstance(one, measure.Run) else run(one)) for one in found]
        for name, found in servers_.items()
    }
    result = Result("Keep-alive (test 2 of the Go original)", {}, failed or {}).as_json() | {"runs": runs}
    output = {"program": "bench", "settings": settings or {"rounds": 3, "seconds": 2, "quick": False}}
    output |= {"machine": machine or {}, "figures": {name: found.as_json() for name, found in (figures or {}).items()}}
    path.write_text(json.dumps({**output, "scenarios": {"keepalive/100": result}}))
    return str(path)


@pytest.mark.parametrize(
    ("now", "peers_now", "status", "verdict"),
    [
        ([10, 10, 10], [20, 20, 20], 0, "noise"),
        ([13, 13, 13], [20, 20, 20], 1, "worse"),
        ([13, 13, 13], [26, 26, 26], 0, "noise"),  # the machine was slower
        ([7, 7, 7], [20, 20, 20], 0, "better"),
        ([8, 12, 16], [20, 20, 20], 0, "noise"),  # nobody knows
        ([run(10, errors=0)] * 2 + [run(10, errors=500)], [20, 20, 20], 1, "500 errors, 0 before | | | worse"),
        ([run(10, rate=0.7)] * 3, [20, 20, 20], 1, "requests/s | 0.70 | ±10% | worse"),
        ([run(10, p99=2.0)] * 3, [20, 20, 20], 1, "p99 | 2.00 | ±25% | worse"),
        ([run(10, p99=2.0)] * 3, [run(20, p99=2.0)] * 3, 0, "p99 | 1.00 | ±25% | noise"),
    ],
)
def test_compare_finds_a_regression_beyond_the_noise(tmp_path, capsys, now, peers_now, status, verdict):
    old = write_results(tmp_path / "old", gtcpserver=[10, 10, 10], peer=[20, 20, 20])
    new = write_results(tmp_path / "new", gtcpserver=now, peer=peers_now)
    assert compare.main([old, new]) == status
    assert f"{verdict} |" in capsys.readouterr().out


def test_compare_misses_a_server_that_is_gone(tmp_path, capsys):
    old = write_results(tmp_path / "old", gtcpserver=[10, 10], peer=[20, 20])
    new = write_results(tmp_path / "new", peer=[20, 20], failed={"gtcpserver": "no answer"})
    assert compare.main([old, new]) == 1
    assert capsys.readouterr().out.endswith("| keepalive/100 | gtcpserver | missing: no answer | | | worse |\n")


@pytest.mark.parametrize(("now", "status"), [([7.1, 7.0, 7.2], 0), ([9.0, 9.1, 9.0], 1)])
def test_compare_looks_at_other_figures_too(tmp_path, capsys, now, status):
    paths = [
        write_results(
            tmp_path / name, figures={"idle": Figures("Memory", ["KiB"], {"gtcpserver": [[x] for x in found]})}
        )
        for name, found in {"old": [7.0, 7.1, 7.0], "new": now}.items()
    ]
    assert compare.main(paths) == status
    assert "| idle | gtcpserver | KiB | " in capsys.readouterr().out


@pytest.mark.slow
def test_compare_takes_the_same_settings_only(tmp_path):
    old = write_results(tmp_path / "old", gtcpserver=[10, 10])
    quick = write_results(tmp_path / "new", {"rounds": 2, "seconds": 1, "quick": True}, gtcpserver=[10, 10])
    command = [sys.executable, "-m", "loadtests.bench.compare"]
    for files, status, said in (([old, old], 0, ""), ([old, quick], 2, "they have another settings")):
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, said in done.stderr) == (status, True), done.stderr


def test_compare_says_what_it_cannot_compare(tmp_path, capsys):
    (tmp_path / "x").write_text("no")
    (tmp_path / "y").write_text("{}")
    for arguments in ([], ["/no/such", "/no/such"], [str(tmp_path / "x")] * 2, [str(tmp_path / "y")] * 2):
        assert compare.main(arguments) == 2
        assert capsys.readouterr().err.startswith(("usage: ", "python -m loadtests.bench.compare: cannot compare"))


def test_without_matplotlib_there_are_no_plots_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = write_results(tmp_path / "results.json", gtcpserver=[10, 11], peer=[20, 25])
    assert plots.main([results, str(tmp_path / "plot")]) == 2
    assert capsys.readouterr().err == "python -m loadtests.bench.plots: plots need matplotlib: pip install '.[bench]'\n"


def test_plots_are_made_for_light_and_dark_pages(tmp_path):
    pytest.importorskip("matplotlib")
    others = {"idle": Figures("Memory", ["KiB each"], {"gtcpserver": [[7.0], [8.0]]})}
    results = write_results(tmp_path / "results.json", gtcpserver=[10, 11], peer=[20, 25], figures=others)
    assert plots.main([results, str(tmp_path / "plot")]) == 0
    assert (tmp_path / "plot-light.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plot-dark.svg").read_text()
    assert "<text" not in drawn  # it looks the same without our fonts
    assert "<!-- gtcpserver -->" in drawn
    assert "<!-- Memory -->" in (tmp_path / "plot-more-light.svg").read_text()


@pytest.mark.slow
def test_first_bytes_and_a_crowd():
    with servers.serving(servers.OURS) as server:
        assert idle.crowd(server, 100) > 10
        assert len(idle.first_bytes(server, beside=20, times=10)) == 10


@pytest.mark.slow
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


def run_module(name, path, *options):
    """One of the benchmarks; what it has written."""
    done = subprocess.run(
        [sys.executable, "-m", f"loadtests.bench.{name}", "--json", str(path), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
@needs_peers
def test_transfers_are_measured_against_real_peers(tmp_path):
    chosen = ("relay-bulk", "files-large")
    names = [word for name in chosen for word in ("--scenario", name)]
    output = run_module("transfers", tmp_path / "found.json", "--rounds", "1", "--gib", "0.3", *names)
    assert set(output["figures"]) == set(chosen)
    for figures in output["figures"].values():
        assert len(figures["runs"]) >= 2
        assert all(round_[0] > 0 for rounds in figures["runs"].values() for round_ in rounds)
    assert output["machine"]["commit"]


@pytest.mark.slow
@needs_wrk
def test_a_monitor_is_measured_against_none(tmp_path):
    output = run_module("monitoring", tmp_path / "found.json", "--rounds", "1", "--seconds", "2", "--clients", "10")
    assert list(output["figures"]["monitoring"]["runs"]) == list(monitoring.WAYS)


@pytest.mark.slow
@needs_wrk
def test_the_account_of_a_relay_is_its_own(tmp_path):
    target = starting.free_port()
    command = [sys.executable, "examples/http_server.py", "--listen", f"127.0.0.1:{target}"]
    port = starting.free_port()
    relay = transfers.RELAYS[servers.OURS](port, target, str(tmp_path))
    with transfers.running(command, target), transfers.running(relay, port) as server:
        assert measure.load(server, 1, 10).cpu > 1


@pytest.mark.slow
def test_a_server_whose_account_cannot_be_read_is_an_error():
    if shutil.which("wrk") is None:
        pytest.skip("wrk is missing")
    with servers.serving(servers.OURS) as server, pytest.raises(measure.BenchError, match="no CPU time"):
        measure.load(measure.Listening(2**22 + 1, server.host, server.port), 1, 1)


@pytest.mark.skipif(shutil.which("microsocks") is None, reason="microsocks is missing: apt-get install microsocks")
def test_proxies_are_measured(tmp_path):
    few = ("--quick", "--scenario", "short", "--scenario", "idle", "--proxy", "microsocks")
    output = run_module("proxies", tmp_path / "found.json", *few)
    assert set(output["figures"]) == {"short", "idle"}
    for figures in output["figures"].values():
        assert set(figures["runs"]) == {servers.OURS, "microsocks"}
        assert all(len(rounds) == 1 for rounds in figures["runs"].values())


@pytest.mark.slow
def test_a_proxy_that_does_not_start_is_named(tmp_path):
    bad = proxy_peers.Proxy("socks5", sys.executable, lambda *_: [sys.executable, "-c", "pass"])
    progress = turns.Progress(1, 0)
    given = proxies.Options(1, 100, 0.1, 10, str(tmp_path), {"bad": bad}, progress)
    failed = proxies.SCENARIOS["bulk"][1]("Bulk", given).failed
    assert failed["bad"].startswith(f"{sys.executable} did not start: nobody listens on port ")


@pytest.mark.slow
@needs_wrk
def test_several_workers_are_measured_against_one(tmp_path):
    output = run_module("workers", tmp_path / "found.json", "--rounds", "1", "--seconds", "1", "--workers", "3")
    assert list(output["figures"]["workers"]["runs"]) == ["gtcpserver, 1 worker", "gtcpserver, 3 workers"]


@pytest.mark.slow
@needs_wrk
def test_the_effect_of_options_is_measured(monkeypatch, tmp_path, capsys):
    title = next(iter(options.VARIANTS))
    handler, clients, variants = options.VARIANTS[title]
    few = {name: variants[name] for name in ("default", "--defer-accept 1")}
    monkeypatch.setattr(options, "VARIANTS", {title: (handler, clients, few)})
    assert options.main(["--rounds", "1", "--seconds", "1", "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^\| --defer-accept 1 \| \d+\.\d \|", said, re.MULTILINE)
    assert "### TCP Fast Open" in said


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root, and /dev/net/tun")
def test_fast_open_saves_a_round_trip_and_the_kernel_counts_it():
    figures = options.fast_open(1)
    if figures.failed:
        pytest.skip(f"no network namespace: {figures.failed}")
    ((without, none),), ((fast, all_),) = figures.runs["default"], figures.runs["--fast-open 64"]
    assert (none, all_) == (0, 1)
    assert fast < without - 5  # a round trip is 10 ms


def read_all(leader: int) -> str:
    """What the terminal was told, whose other end is closed: a read may return a part of it."""
    said = b""
    try:
        while data := os.read(leader, 4096):
            said += data
    except OSError:  # EIO: the end
        pass
    finally:
        os.close(leader)
    return said.decode()


def test_the_bar_tells_how_far_it_is():
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        progress = turns.Progress(4, 0, terminal)
        progress.step()
        progress.show("keep-alive: round 1 of 2, " + "x" * 200)
        progress.clear()
    said = read_all(leader)
    line = said.split("\x1b[K")[1].removesuffix("\r")
    assert line.startswith("[=====               ]  25%    0 s left keep-alive: round 1 of 2, xx")
    assert len(line) == 110
    assert said.endswith("\x1b[K")


def test_there_is_no_bar_in_a_file(tmp_path):
    with (tmp_path / "log").open("w") as log:
        progress = turns.Progress(4, 0, log)
        progress.show("x")
        progress.clear()
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("error", [measure.BenchError("no"), OSError("no"), subprocess.CalledProcessError(1, ["wrk"])])
def test_a_benchmark_that_cannot_be_run_says_so_in_a_line(tmp_path, capsys, error):
    parser = turns.parser_of("loadtests.bench.example", None, rounds=1)
    options = parser.parse_args(["--json", str(tmp_path / "found.json")])

    def fail(_recording):
        raise error

    assert turns.record("example", parser, options, {"rounds": 1}, 1, fail) == 1
    assert capsys.readouterr().err == f"python -m loadtests.bench.example: {error}\n"


@pytest.mark.parametrize(("name", "status"), [("gtcpserver, idle()", 1), ("trio", 0)])
def test_a_server_of_ours_that_fails_is_exit_status_1(tmp_path, name, status):
    recording = turns.Recording("bench", {"rounds": 1}, str(tmp_path / "found.json"), 0, 1)
    recording.figures("idle", Figures("Memory", ["KiB"], {"x": [[1.0]]}, {name: "it is gone"}))
    assert recording.end(publish=False) == status
    assert json.loads((tmp_path / "found.json").read_text())["figures"]["idle"]["failed"] == {name: "it is gone"}
    assert f"{name}: it is gone." in (tmp_path / "found.md").read_text()


def test_turns_are_random_and_a_server_that_fails_is_left_out():
    order = []

    def one(name):
        order.append(name)
        if name == "c":
            raise measure.BenchError("it is gone")
        return len(order)

    found, failed = turns.take_turns("abc", 9, one, turns.Progress(27, 7), "x")
    assert failed == {"c": "it is gone"}
    assert (len(found["a"]), len(found["b"]), order.count("c")) == (9, 9, 1)
    rounds = [tuple(name for name in order if name != "c")[place : place + 2] for place in range(0, 18, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_results_are_put_between_the_marks_of_a_page():
    page = "a\n<!-- bench -->\nold\n<!-- end of bench -->\nb\n"
    once = publish.put(page, "bench", "new\\1")
    assert once == "a\n<!-- bench -->\nnew\\1\n<!-- end of bench -->\nb\n"
    assert publish.put(once, "bench", "new\\1") == once
    with pytest.raises(ValueError, match="has no marks for options"):
        publish.put(page, "options", "x")
    for mark in ("bench", "transfers", "proxies", "workers", "adapters", "options"):
        assert publish.put(publish.PAGE.read_text(), mark, "x")
    for mark in publish.IN_SHORT:
        assert publish.put((publish.README if mark == "bench" else publish.TOUR).read_text(), mark, "x")


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Copies of what is published, and their folder."""
    for name in ("PAGE", "README", "TOUR"):
        original = getattr(publish, name)
        monkeypatch.setattr(publish, name, tmp_path / original.name)
        (tmp_path / original.name).write_text(original.read_text())
    monkeypatch.setattr(publish, "PLOTS", tmp_path / "plots")
    return tmp_path


def test_all_of_a_run_is_published(pages):
    pytest.importorskip("matplotlib")
    who = (servers.OURS, servers.PURE, scenarios.GEVENT, scenarios.GEVENT_POOL, scenarios.UVLOOP)
    output = json.loads(Path(write_results(pages / "found.json", machine=machine.machine(0))).read_text())
    all_cells = {f"{name}/{clients}" for clients, loads in scenarios.PUBLISHED.items() for name, _ in loads}
    some_cells = [*(cell for cell, _ in publish.FIRST.values()), "16k/1000"]
    assert set(some_cells) <= all_cells
    for cell in some_cells:
        name, _, clients = cell.partition("/")
        result = Result(scenarios.SCENARIOS[name].named(int(clients)), {}, {}, (scenarios.GEVENT,))
        result.runs = {server: [run(place + 10.0)] * 2 for place, server in enumerate(who)}
        output["scenarios"][cell] = result.as_json()
    for which in scenarios.OTHERS:
        figures, _ = idle.kind(which, False)
        figures.runs = {server: [[9.0] * len(figures.columns)] * 2 for server in who}
        output["figures"][which] = figures.as_json()
    (pages / "found.json").write_text(json.dumps(output))
    assert publish.main([str(pages / "found.json")]) == 0
    page, readme = (pages / "performance.md").read_text(), (pages / "README.md").read_text()
    assert "### New connections, 16 kB, 1,000 clients (test 6 of the Go original)" in page
    assert "First byte of 2,000 new connections" in page
    assert "| keep-alive, 1 kB, 100 connections | 10.0 | 11.0 | 12.0 | 14.0 | 0.83 | 0.71 |" in readme
    assert "wrk " + machine.machine(0)["wrk"] in page
    assert len(list((pages / "plots").iterdir())) == 8


def test_what_cannot_be_published_is_one_line(pages, capsys):
    (pages / "x").write_text("{}")
    before = (pages / "performance.md").read_text()
    for path in (pages / "x", pages / "none"):
        assert publish.main([str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"python -m loadtests.bench.publish: {path} cannot be published")
    assert (pages / "performance.md").read_text() == before


@pytest.mark.slow
def test_worker_processes_take_part_where_there_are_cpus_for_them(monkeypatch):
    name = "gtcpserver, 2 workers"
    monkeypatch.setattr(servers, "WITH_WORKERS", name)
    monkeypatch.setitem(servers.SERVERS, name, [*servers.SERVERS[servers.OURS], "--workers", "2"])
    answers.check_answers([servers.OURS, name], [])
    with servers.serving(name) as server:
        assert len(measure.processes(server.pid)) == 3
        assert sum(measure.cpu_of_session(server.pid)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "threads", "from_wsgi", "pywsgi", "wsgiref"])
def test_existing_code_answers_the_same_on_each_server(monkeypatch, kind):
    command = [starting.PYTHON, "loadtests/bench/peers/existing.py", kind]
    monkeypatch.setitem(servers.SERVERS, kind, command)
    with servers.serving(kind) as server:
        answer = answers.answer_of(server)
    assert (answer.status, answer.body, answer.kept) == (200, adapters.BODY, kind != "wsgiref")
