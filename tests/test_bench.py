"""The benchmarks work, and compare like with like. No thresholds on time: figures are for quiet machines."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # loadtests is not installed with the package

from loadtests import bench, measure, transfers, workers  # noqa: E402

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is missing: apt-get install wrk")

# What wrk prints; it fills up one-letter units with a space.
REPORT = """Running 1s test @ http://127.0.0.1:39263/
  1 threads and 100 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.02ms  214.55us   9.60ms   99.00%
    Req/Sec    98.66k     2.42k  101.27k    90.00%
  Latency Distribution
     50%  880.00us
     75%    1.07ms
     90%    1.14ms
     99%    1.52s{space}
  98174 requests in 1.00s, 104.46MB read
Requests/sec:  98148.84
Transfer/sec:    104.43MB
""".format(space=" ")


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


def skip_without_uvloop(name):
    if "uvloop" in name and find_spec("uvloop") is None:
        pytest.skip("uvloop is missing")


@pytest.mark.parametrize("name", [name for name in bench.SERVERS if name != bench.OURS])
@pytest.mark.parametrize("option", ["--keepalive", "--no-keepalive"])
def test_peers_answer_the_same_bytes_as_we_do(name, option):
    skip_without_uvloop(name)
    bench.check_answers([bench.OURS, name], [option, "--timeout", "30"], tls=False)


@pytest.mark.parametrize("name", [name for name in bench.SERVERS if name != bench.OURS])
def test_peers_agree_on_the_same_tls_and_answer_the_same(name, tmp_path):
    skip_without_uvloop(name)
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    bench.check_answers([bench.OURS, name], bench.make_certificate(str(tmp_path)), tls=True)


@pytest.mark.parametrize("name", list(bench.SERVERS))
def test_servers_answer_pipelined_requests_and_close_when_asked(name):
    skip_without_uvloop(name)
    last = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    with (
        measure.serving([*bench.SERVERS[name], "--size", "5"]) as server,
        socket.create_connection((server.host, server.port), timeout=15) as sock,
        sock.makefile("rb") as file,
    ):
        sock.sendall(measure.REQUEST * 2 + last[:-1])
        sock.sendall(last[-1:])
        answers = file.read()
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert answers.count(b"xxxxx") == 3
    assert (answers.count(b"Connection: keep-alive"), answers.count(b"Connection: close")) == (2, 1)


@pytest.mark.parametrize("name", list(bench.SERVERS))
def test_idle_timeout_closes_a_silent_connection(name):
    skip_without_uvloop(name)
    with (
        measure.serving([*bench.SERVERS[name], "--timeout", "0.05"]) as server,
        socket.create_connection((server.host, server.port), timeout=15) as sock,
    ):
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # the Protocol peers abort


def test_an_unequal_answer_is_an_error(monkeypatch):
    command = bench.SERVERS["asyncio Protocol"]
    monkeypatch.setitem(bench.SERVERS, "smaller", [*command, "--size", "10"])
    with pytest.raises(bench.BenchError, match=r"do not answer the same:\nasyncio Protocol.*\nsmaller"):
        bench.check_answers(["asyncio Protocol", "smaller"], [], tls=False)


def test_a_server_that_does_not_start_is_an_error():
    command = [sys.executable, "-c", "print('no')"]
    with pytest.raises(measure.BenchError, match="did not start: 'no"), measure.serving(command):
        pass


def test_reads_what_wrk_says():
    assert measure.read_report(REPORT) == measure.Report(requests=98174, p50=0.88, p99=1520.0, errors=0)


def test_counts_all_errors_wrk_says():
    errors = "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n"
    assert measure.read_report(REPORT + errors).errors == 54321


def test_ratio_is_the_median_of_the_ratios_within_the_rounds():
    def run(cpu):
        return measure.Run(user=cpu, system=0.0, rate=1.0, p50=1.0, p99=1.0, errors=0, busy=1.0)

    # The machine was slow in the last round: medians of each alone would say 20 / 10.
    result = bench.Result({"a": [run(10), run(20), run(40)], "b": [run(10), run(10), run(80)]})
    assert result.ratio("a", "b") == 1.0
    assert result.median("a", "cpu") == 20
    assert result.spread("a") == 0.75


def test_idle_memory_counts_what_connections_take():
    with measure.serving(bench.SERVERS[bench.OURS]) as server:
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
    assert set(results["keepalive"]) == set(chosen)
    for (run,) in results["keepalive"].values():
        assert run["user"] + run["system"] > 0
        assert run["rate"] > 0
        assert run["p99"] >= run["p50"] > 0
        assert run["errors"] == 0


@needs_wrk
def test_a_new_connection_for_each_request_has_no_errors():
    with measure.serving([*bench.SERVERS[bench.OURS], "--no-keepalive"]) as server:
        run = measure.load(server, 1, clients=10)
    assert run.errors == 0
    assert run.rate > 0


def test_missing_wrk_is_one_line_and_exit_code_2(tmp_path):
    done = run_bench("--scenario", "keepalive", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "the benchmarks need wrk: apt-get install wrk\n"


def test_missing_uvloop_leaves_its_rows_out(monkeypatch):
    monkeypatch.setattr(bench, "_version", lambda package: "missing")
    assert not [name for name in bench.installed(bench.SERVERS) if "uvloop" in name]
    assert bench.OURS in bench.installed(bench.SERVERS)


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--seconds", "x"], ["--scenario", "none"]], ids=" ".join)
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
def test_two_workers_are_measured_against_one(capsys):
    assert workers.main(["--rounds", "1", "--seconds", "1"]) == 0
    assert "two workers: " in capsys.readouterr().out
