"""TcpUser, the locustfile, and locust as a user runs it. All in other processes: locust replaces parts of the standard
library when it is imported. What TcpUser does in detail is in kit/locust_cases.py."""

import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port

CASES = ROOT / "tests" / "kit" / "locust_cases.py"
NAMES = re.findall(r"^def case_(\w+)", CASES.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="locust is missing: pip install '.[load]'")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")

LOCUST = [sys.executable, "-m", "locust"]
LOCUSTFILE = [*LOCUST, "-f", str(ROOT / "loadtests/load/locustfile.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

#: What users of every kind report.
REPORTED = {
    "connect",
    "echo",
    "echo, new connection",
    "TLS echo",
    "TLS echo, new connection",
    "TLS handshake",
    "GET",
    "SET",
    "SET and GET, slowly",
    "before the storm",
    "storm: connect and echo",
    "/ keep-alive",
    "/ new connection",
    "SOCKS5 tunnel",
    "echo through SOCKS5",
    "CONNECT tunnel",
    "echo through CONNECT",
}


def locust(*options, locustfile=LOCUSTFILE, folder=ROOT):
    """Run it to its end."""
    return subprocess.run(
        [*locustfile, "--only-summary", *map(str, options)],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SOON,
    )


def end(process):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SOON)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


# -- TcpUser -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases():
    process = subprocess.Popen(
        [sys.executable, str(CASES)], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.stdin.close()
    process.wait(SOON)
    process.stdout.close()


@pytest.mark.parametrize("name", NAMES)
def test_tcp_user(cases, name):
    cases.stdin.write(f"case_{name}\n")
    cases.stdin.flush()
    assert select.select([cases.stdout], [], [], 28)[0], "no end to it"
    answer = json.loads(cases.stdout.readline() or '"the process has ended"')
    assert answer is None, answer


# -- the locustfile ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of users of every kind, in two processes and a master, and the folder with what it has written."""
    folder = tmp_path_factory.mktemp("locust")
    port = free_port()
    done = locust(
        # Two of the rarest users, and enough tasks that none is left out by chance.
        *("--headless", "--start-servers", "-u", 30, "-r", 30, "-t", "2s", "--pace", 50, "--fail-ratio", 0),
        *("--html", folder / "report.html", "--json-file", folder / "stats", "--processes", 2, "--storm-every", 0.5),
        *("--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port),
    )
    return done, folder


def test_users_of_every_kind_run_without_a_failure(run):
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "2 workers connected" in done.stderr  # which have the addresses from their master
    assert re.search(r"passed: \d+ requests, 0.00 % failed", done.stderr)
    stats = json.loads((folder / "stats.json").read_text())
    assert {entry["name"] for entry in stats} == REPORTED
    assert all(entry["num_requests"] > 0 for entry in stats)
    assert sum(entry["num_failures"] for entry in stats) == 0
    sizes = {entry["name"]: entry["total_content_length"] / entry["num_requests"] for entry in stats}
    assert sizes["echo"] == 128
    assert sizes["/ keep-alive"] == 1024


def test_servers_that_were_started_end_with_locust(tmp_path):
    process = subprocess.Popen(
        [*LOCUSTFILE, "--headless", "--start-servers", "-u", "1", "-t", "60s", "EchoUser"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "All users spawned" not in (line := process.stderr.readline()):
            assert line, "locust has ended"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 5
        process.kill()  # even so
        process.wait()
    finally:
        end(process)
        process.stderr.close()
    give_up = time.monotonic() + SOON
    while any(running(pid) for pid in children):
        assert time.monotonic() < give_up, "servers are left behind"
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "no server to load: give --start-servers, or the address of one: --echo-server, --tls-server"),
        (["LineUser", "SlowUser"], "LineUser needs --line-server"),
        (["-H", "127.0.0.1:1"], "--host is one address, and each kind of user needs another server"),
        (["-H", "nonsense", "EchoUser"], 'host of EchoUser must be "HOST:PORT"'),
        (["--proxy-server", "127.0.0.1:1", "Socks5User"], "Socks5User needs --target"),
        (["--echo-server", "a:b"], 'argument --echo-server: must be "HOST:PORT"'),
        (["--http-server", "unix:/x"], "argument --http-server: HTTP users need HOST:PORT, got 'unix:/x'"),
        (["--fail-ratio", "2"], "argument --fail-ratio: must be a share such as 0.01 or \"1%\", got '2'"),
        (["--size", "x"], "argument --size: must be 1 to 1048576 bytes, got 'x'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(options, says):
    done = locust("--headless", "-t", "1s", *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("criteria", "status", "says"),
    [
        ([], 1, ""),  # locust's own rule
        (["--fail-ratio", "100%"], 0, "passed: "),
        (["--fail-ratio", "99%"], 1, "requests failed, 100.00%; allowed: 99.00%"),
    ],
)
def test_criteria_decide_about_the_exit_status(criteria, status, says):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen: nobody else can either
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = locust("--headless", "--echo-server", where, "-u", 2, "-r", 9, "-t", "4s", *criteria)
    assert (done.returncode, says in done.stderr) == (status, True), done.stderr
    assert "ConnectionRefusedError" in done.stdout + done.stderr


def at_once(*runs):
    """Several runs of locust, side by side."""
    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(lambda options: locust(*options), runs))


def test_a_shape_decides_how_many_users_there_are():
    common = ("--headless", "--start-servers", "-u", 10, "-r", 100, "-t", "5s", "--fail-ratio", 0, "-L", "DEBUG")
    for name, done in zip(
        ("steps", "spikes", "soak"),
        at_once(*((*common, "--shape", name, "EchoUser") for name in ("steps", "spikes", "soak"))),
        strict=True,
    ):
        assert done.returncode == 0, done.stderr
        assert "Shape test completed" in done.stderr
        users = [int(count) for count in re.findall(r"Shape test updating to (\d+) users", done.stderr)]
        assert len(users) >= 2, name
        if name == "steps":
            assert users[0] == 2
            assert sorted(users) == users
        elif name == "spikes":
            assert set(users) == {1, 10}
        else:
            assert users[0] < 10
            assert max(users) == 10


def test_a_slow_request_does_not_pass():
    common = ("--headless", "--start-servers", "-u", 2, "-r", 2, "-t", "3s", "SlowUser", "--fail-ratio", 0)
    slow, passed = at_once((*common, "--max-p99", 1), (*common, "--max-p99", 60_000))
    assert slow.returncode == 1
    assert re.search(r"not passed: 99 % of LINE SET and GET, slowly within \d+.* ms, allowed: 1 ms", slow.stderr)
    assert passed.returncode == 0, passed.stderr
    assert re.search(r"passed: \d+ requests, 0.00 % failed", passed.stderr)


# A locustfile of a user's own, beside a copy of tcp_user.py: who did a request is in its name.
OWN = """
import os
from locust import task, constant
from tcp_user import TcpUser

class Mine(TcpUser):
    host = "127.0.0.1:{port}"
    wait_time = constant(0.05)

    @task
    def ping(self):
        with self.client.request(f"by {{os.getpid()}}"):
            self.client.send(b"x")
            assert self.client.receive() == b"x"
"""


def test_several_processes_and_a_locustfile_beside_a_copy(serve, in_thread, tmp_path):
    def echo(conn):
        while data := conn.recv(100):
            conn.sendall(data)

    server = serve(echo)
    shutil.copy(ROOT / "loadtests/tcp_user.py", tmp_path)
    (tmp_path / "locustfile.py").write_text(OWN.format(port=server.address.rpartition(":")[2]))
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [*LOCUST, "--worker", "--master-port", port],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    try:
        master = in_thread(
            lambda: locust(
                *("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--headless"),
                *("--expect-workers", 2, "--expect-workers-max-wait", 15, "-u", 4, "-r", 4, "-t", "1s"),
                *("--json-file", tmp_path / "stats"),
                locustfile=LOCUST,
                folder=tmp_path,
            )
        )
        assert master.returncode == 0, master.stderr
        assert [in_thread(worker.wait) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            end(worker)
    requests = {entry["name"]: entry["num_requests"] for entry in json.loads((tmp_path / "stats.json").read_text())}
    assert requests.keys() == {"connect", *(f"by {worker.pid}" for worker in workers)}
    assert requests["connect"] == 4
    assert all(requests.values())


def test_the_example_of_the_documentation_runs(serve, in_thread, tmp_path):
    def store(conn):
        assert conn.recv_until(b"\n", 100) == b"HELLO\n"
        conn.sendall(b"WELCOME\n")
        for answer in itertools.cycle((b"NONE\n", b"VALUE 3\nabc\n")):
            if not conn.recv(100):
                return
            conn.sendall(answer)

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/load-testing.md").read_text(), re.DOTALL)
    shutil.copy(ROOT / "loadtests/tcp_user.py", tmp_path)
    (tmp_path / "locustfile.py").write_text(block)
    options = ("--headless", "-u", 2, "-r", 9, "-t", "2s", "--json-file", tmp_path / "stats")
    server = serve(store)
    done = in_thread(lambda: locust(*options, "-H", server.address, locustfile=LOCUST, folder=tmp_path))
    assert done.returncode == 0, done.stderr
    requests = {entry["name"]: entry["num_requests"] for entry in json.loads((tmp_path / "stats.json").read_text())}
    assert requests.keys() == {"connect", "log in", "GET"}
    assert requests["log in"] == 2
    assert requests["GET"] >= 2


@contextmanager
def web_interface(*options):
    """locust with its web interface: the process, and what asks it."""
    port = free_port()
    process = subprocess.Popen(
        [*LOCUSTFILE, "--start-servers", "--web-host", "127.0.0.1", "--web-port", str(port), *options],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(path, **form):
        data = urllib.parse.urlencode(form, doseq=True).encode() or None
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=SOON) as answer:
            return answer.read()

    def wait(condition):
        give_up = time.monotonic() + SOON
        while True:
            try:
                if condition():
                    return
            except OSError:
                assert process.poll() is None, "locust has ended"
            assert time.monotonic() < give_up
            time.sleep(0.05)

    try:
        wait(lambda: ask("/"))
        yield f"http://127.0.0.1:{port}", ask, wait
    finally:
        end(process)


def test_the_class_picker_chooses_users_and_a_shape():
    with web_interface("--class-picker", "-t", "60s") as (_, ask, wait):
        page = ask("/").decode()
        assert all(name in page for name in ("EchoUser", "Socks5User", "Steps", "Spikes", "Soak"))
        chosen = {"user_classes": ["EchoUser", "LineUser"], "shape_class": "Steps"}
        assert json.loads(ask("/swarm", user_count=10, spawn_rate=10, **chosen))["success"] is True
        wait(lambda: json.loads(ask("/stats/requests"))["user_count"] == 2)  # the first step
        wait(lambda: json.loads(ask("/stats/requests"))["stats"][-1]["num_requests"] > 5)
        shown = json.loads(ask("/stats/requests"))
        assert shown["errors"] == []
        assert {entry["name"] for entry in shown["stats"]} <= {"connect", "echo", "GET", "SET", "Aggregated"}


# -- in a browser ------------------------------------------------------------------------------------------------------


def browse(url, folder, screenshot=None):
    """The page as a browser has it once its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=1300,1000"]
    if screenshot:
        command += [f"--screenshot={screenshot}"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=SOON)
    return re.sub(r"<(script|style)\b.*?</\1>", "", done.stdout, flags=re.DOTALL)


def cells(page):
    return set(re.findall(r"<td[^>]*>([^<]+)</td>", page))


@needs_chromium
def test_the_html_report_shows_every_name(run, tmp_path):
    _, folder = run
    page = browse(f"file://{folder}/report.html", tmp_path)
    assert "Locust Test Report" in page
    assert cells(page) >= REPORTED, page


@needs_chromium
def test_the_web_interface_starts_a_test_and_shows_it(tmp_path):
    with web_interface() as (url, ask, wait):
        page = browse(url, tmp_path)
        assert "Start new load test" in page
        assert 'name="pace"' in page  # what this locustfile adds
        assert '"missing_host_warning": false' in ask("/").decode()  # every kind of user has its server
        assert json.loads(ask("/swarm", user_count=10, spawn_rate=10, size=64, pace=50))["success"] is True
        wait(lambda: json.loads(ask("/stats/requests"))["stats"][-1]["num_requests"] > 100)
        page = browse(url, tmp_path)
        assert {"echo", "GET", "/ keep-alive"} <= cells(page), page
        shown = json.loads(ask("/stats/requests"))
        assert shown["state"] == "running"
        assert shown["errors"] == []
        sizes = {entry["name"]: entry["avg_content_length"] for entry in shown["stats"]}
        assert sizes["echo"] == 64
