"""Metrics, health checks and the status page of one server, over HTTP."""

import base64
import dataclasses
import hashlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlencode

import gevent
import pytest
from gevent.event import Event
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gtcpserver import ConfigError, GtcpServerError, LimitExceeded, Server, TLSConfig
from gtcpserver.monitoring import Monitor
from gtcpserver.monitoring.connection_table import look
from gtcpserver.monitoring.latency import EVERY, Latency
from gtcpserver.monitoring.monitor import MOST_CONNECTIONS, check_metrics_address, is_loopback
from gtcpserver.monitoring.web import is_this_host
from gtcpserver.server.idle import PlacelessIdle
from gtcpserver.server.timed_idle import TimedIdle
from kit.commands import run_command
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.tls import Files, client_context
from kit.waiting import wait_until

PATHS = ("/", "/metrics", "/healthz", "/readyz", "/stats", "/connections", "/history")


def idle_echo(conn):
    while True:
        with conn.idle():
            data = conn.recv(1000)
        if not data:
            return
        if data.startswith(b"fault"):
            raise RuntimeError("a fault of the handler")
        if data.startswith(b"much"):
            raise LimitExceeded("too much")
        conn.sendall(data)


@pytest.fixture
def watched(serve):
    """`watched(handler, **options)`: a server that serves, and its monitor."""
    monitors = []

    def start(handler=idle_echo, *, begin=True, **options):
        server = Server("127.0.0.1:0", handler, **options)
        monitor = Monitor(server, "127.0.0.1:0")
        monitors.append((server, monitor))
        monitor.start()
        if begin:
            server.start()
        return server, monitor

    yield start
    for server, monitor in monitors:
        server.halt()
        monitor.stop()


def fetch(address, path, method="GET", headers=None, timeout=SOON):
    """(status, headers, body), from a native thread."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@pytest.fixture
def get(in_thread):
    """`get(monitor, path)`: (status, headers, body)."""
    return lambda monitor, path, *more: in_thread(fetch, monitor.address, path, *more)


@pytest.fixture
def value(get):
    """`value(monitor, metric, **labels)`: one number."""

    def of(monitor, metric, **labels):
        body = get(monitor, "/metrics")[2].decode()
        found = [
            sample.value
            for family in parse(body)
            for sample in family.samples
            if sample.name == metric and sample.labels == labels
        ]
        assert len(found) == 1, (metric, labels, body)
        return found[0]

    return of


def ask(in_thread, client, data=b"x"):
    in_thread(client.sendall, data)
    return in_thread(client.recv, 1000)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_clients_have_done(watched, connect, in_thread, value):
    server, monitor = watched(pool=7)
    client = connect(server)
    assert ask(in_thread, client, b"four") == b"four"
    for word in (b"fault", b"fault", b"much"):
        assert ask(in_thread, connect(server), word) == b""
    wait_until(lambda: value(monitor, "gtcpserver_connections_active") == 1)
    assert value(monitor, "gtcpserver_connections_accepted_total") == 4
    assert value(monitor, "gtcpserver_connections_idle") == 1
    assert value(monitor, "gtcpserver_handler_errors_total") == 2
    assert value(monitor, "gtcpserver_connections_failed_total", kind="limit_exceeded") == 1
    assert value(monitor, "gtcpserver_bytes_received_total") == 18
    assert value(monitor, "gtcpserver_bytes_sent_total") == 4
    assert value(monitor, "gtcpserver_pool_size") == 7
    assert value(monitor, "gtcpserver_ready") == 1
    assert value(monitor, "gtcpserver_workers", state="ready") == 1
    assert value(monitor, "gtcpserver_worker_connections_accepted_total", worker="0") == 4
    assert value(monitor, "gtcpserver_worker_resident_bytes", worker="0") > 1e7
    assert value(monitor, "gtcpserver_cpu_seconds_total") > 0


def test_openmetrics_where_the_client_asks_for_it(watched, get):
    _, monitor = watched(pool=None)
    status, headers, body = get(monitor, "/metrics", "GET", {"Accept": "application/openmetrics-text;version=1.0.0"})
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(body.decode())}
    assert families["gtcpserver_pool_size"].samples[0].value == float("inf")
    assert get(monitor, "/metrics")[1]["Content-Type"].startswith("text/plain")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["x", "1.x", "", "9" * 5000, "1.0.0;escaping=x", "\xe9"])
@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_any_accept_header_has_an_answer(watched, get, kind, version):
    _, monitor = watched()
    status, _, body = get(monitor, "/metrics", "GET", {"Accept": f"{kind};version={version}"})
    assert status == 200
    assert b"gtcpserver_build_info" in body


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: it is in Debian's prometheus")
def test_promtool_has_nothing_to_say(watched, get):
    _, monitor = watched()
    done = subprocess.run(["promtool", "check", "metrics"], input=get(monitor, "/metrics")[2], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_a_handler_counts_is_a_metric_whatever_its_name(watched, value):
    class Counting:
        def __init__(self):
            self.counters = {"tunnels": 3, 'a "b"\\\n\ud800': 4}

        def __call__(self, conn):
            pass

    _, monitor = watched(Counting())
    assert value(monitor, "gtcpserver_handler_counters_total", name="tunnels") == 3
    assert value(monitor, "gtcpserver_handler_counters_total", name='a "b"\\\n\\ud800') == 4


def test_failed_handshakes_by_kind(watched, connect, in_thread, value, tmp_path):
    files = Files(tmp_path)
    server, monitor = watched(tls=TLSConfig(*files.issue("server", "localhost")))
    assert b"400" in ask(in_thread, connect(server), b"GET / HTTP/1.1\r\n\r\n")
    wait_until(lambda: server.stats().handshake_failures)
    assert value(monitor, "gtcpserver_handshake_failures_total", kind="http_request") == 1


# -- latency -----------------------------------------------------------------------------------------------------------


def requests_of(monitor, get):
    latency = json.loads(get(monitor, "/stats")[2])["stats"]["latency"]
    return {name: count for name, count in latency.items() if count and name != "sum"}, latency["sum"]


@pytest.mark.slow
def test_latency_is_that_of_requests_between_idle_blocks(watched, connect, in_thread, get):
    def handle(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            gevent.sleep(float(data))
            conn.sendall(b"done")
            if data == b"0.03":
                return  # the last request of a connection counts too

    server, monitor = watched(handle)
    client = connect(server)
    for seconds in (b"0", b"0.03"):
        assert ask(in_thread, client, seconds) == b"done"
    silent = connect(server)  # has no request, and the time in which it is idle counts nothing
    gevent.sleep(0.05)
    silent.close()
    wait_until(lambda: server.active_connections == 0)
    gevent.sleep(0.25)  # for another snapshot
    counts, total = requests_of(monitor, get)
    assert sum(counts.values()) == 2
    assert total >= 0.03
    assert any(float(name) >= 0.05 for name in counts)


@pytest.mark.slow
def test_latency_is_that_of_connections_where_nothing_is_idle(watched, connect, in_thread, get):
    server, monitor = watched(lambda conn: conn.sendall(conn.recv(10)))
    for _ in range(3):
        assert ask(in_thread, connect(server)) == b"x"
    wait_until(lambda: server.active_connections == 0)
    gevent.sleep(0.25)
    assert sum(requests_of(monitor, get)[0].values()) == 3


def test_many_requests_a_second_are_sampled_and_still_counted(watched, connect, spawn_thread):
    server, monitor = watched()
    latency = monitor._watch._latency  # noqa: SLF001  its own measurements
    monitor._watch._timer.stop()  # noqa: SLF001  its own measurements
    latency.every = EVERY
    client = connect(server)

    def many():
        for _ in range(10 * EVERY):
            client.sendall(b"x")
            client.recv(10)

    spawn_thread(many).get(timeout=SOON)
    wait_until(lambda: sum(latency.counts) >= 10 * EVERY - EVERY)
    assert sum(latency.counts) <= 11 * EVERY


def test_the_rate_decides_what_is_measured():
    latency = Latency()
    for seconds in (0.0001, 0.00011, 700.0):
        latency.request_ended(seconds)
    snapshot = latency.snapshot()
    assert (snapshot["0.0001"], snapshot["0.00025"], snapshot["inf"]) == (1, 1, 1)
    latency.adapt(0.25)
    assert latency.every == 1
    latency.request_ended(0.01, 1000)
    latency.adapt(0.25)
    assert latency.every == EVERY
    latency.adapt(0.25)
    assert latency.every == 1


@pytest.mark.slow
@given(st.lists(st.floats(0, 1e6), max_size=50), st.integers(1, 20))
def test_each_request_is_in_the_bucket_whose_bound_it_does_not_exceed(times, weight):
    latency = Latency()
    for seconds in times:
        latency.request_ended(seconds, weight)
    snapshot = latency.snapshot()
    assert snapshot.pop("sum") == pytest.approx(weight * sum(times))
    counted = 0
    for name, count in snapshot.items():
        counted += count
        assert counted == weight * sum(seconds <= float(name) for seconds in times)


def test_a_full_pool_is_shared_fairly_by_connections_that_are_timed(watched, connect, in_thread):
    entered = Event()
    go_on = Event()

    def handle(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            if data == b"hold":
                entered.set()
                go_on.wait()
            conn.sendall(data)

    server, _ = watched(handle, pool=1)
    one, two = connect(server), connect(server)
    wait_until(lambda: server.active_connections == 2)
    one.sendall(b"hold")
    entered.wait()
    two.sendall(b"two")
    gevent.sleep(0.02)
    assert server.pool.places.taken == 1
    assert isinstance(next(iter(server.connections())).idle_block, TimedIdle)
    go_on.set()
    assert in_thread(one.recv, 10) == b"hold"
    assert in_thread(two.recv, 10) == b"two"
    wait_until(lambda: server.pool.places.taken == 0)
    report = server.stop(SOON)
    assert (report.finished, report.ended) == (2, 0)
    assert server.stats().idle_closed == 2


def test_a_server_without_a_monitor_measures_nothing(serve, connect, in_thread):
    server = serve(idle_echo)
    client = connect(server)
    assert ask(in_thread, client) == b"x"
    assert type(next(iter(server.connections())).idle_block) is PlacelessIdle


# -- health, JSON, pages -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ready_while_it_serves_and_alive_until_the_end(watched, connect, in_thread, get):
    go_on = Event()
    server, monitor = watched(lambda conn: (conn.recv(1), go_on.wait()), begin=False)
    assert get(monitor, "/readyz")[::2] == (503, b"starting\n")
    assert get(monitor, "/healthz")[::2] == (200, b"ok\n")
    server.start()
    assert get(monitor, "/readyz")[::2] == (200, b"ready\n")
    connect(server).sendall(b"x")
    wait_until(lambda: server.active_connections)
    stopping = gevent.spawn(server.stop, None)
    wait_until(lambda: server.stopping)
    assert get(monitor, "/readyz")[::2] == (503, b"draining\n")
    assert get(monitor, "/healthz")[0] == 200
    go_on.set()
    stopping.get(timeout=SOON)
    assert get(monitor, "/readyz")[::2] == (503, b"stopped\n")


def test_stats_have_every_counter(watched, get):
    server, monitor = watched()
    status = json.loads(get(monitor, "/stats")[2])
    assert {field.name for field in dataclasses.fields(server.stats())} <= status["stats"].keys()
    assert status["addresses"] == [server.address]
    assert (status["ready"], status["state"], len(status["workers"])) == (True, "serving", 1)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_head_other_methods_and_headers(watched, get, path):
    _, monitor = watched()
    status, headers, body = get(monitor, path)
    assert (status, len(body)) == (200, int(headers["Content-Length"]))
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    status, headers, body = get(monitor, path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0
    status, headers, _ = get(monitor, path, "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_unknown_paths(watched, get):
    _, monitor = watched()
    for path in ("/x", "/metrics/", "/../etc/passwd", "/%2e%2e/", "//", "/stats%00"):
        assert get(monitor, path)[0] == 404, path


def test_the_page_needs_nothing_from_elsewhere_and_its_policy_fits_it(watched, get):
    _, monitor = watched()
    _, headers, body = get(monitor, "/")
    assert not re.search(rb"""(src|href)=["']?(https?:)?//""", body)
    assert b" style=" not in body
    for tag in (b"script", b"style"):
        (text,) = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", body, re.DOTALL)
        hashed = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert f"{tag.decode()}-src 'sha256-{hashed}'" in headers["Content-Security-Policy"]


def test_web_sites_cannot_read_it_by_a_name_of_theirs(watched, get):
    _, monitor = watched()
    assert get(monitor, "/stats", "GET", {"Host": "rebound.example.com"})[0] == 421
    assert get(monitor, "/stats", "GET", {"Host": "localhost:9100"})[0] == 200


@pytest.mark.parametrize("host", ["", "localhost", "LOCALHOST:1", "x.localhost", "127.0.0.1:9", "[::1]:9", "[::1]"])
def test_names_of_this_host(host):
    assert is_this_host(host)


@pytest.mark.slow
@given(st.text())
def test_any_host_header_has_an_answer(host):
    assert is_this_host(host) in (True, False)
    assert not is_this_host(host + ".example.com")


# -- the table of connections ------------------------------------------------------------------------------------------


def test_connections_with_what_is_known_of_them(watched, connect, in_thread, get, tmp_path):
    files = Files(tmp_path)
    wait = Event()

    def stuck(conn):
        wait.wait()

    def handle(conn):
        with conn.idle():
            conn.recv(10)
        stuck(conn)

    server, monitor = watched(handle, tls=TLSConfig(*files.issue("server", "localhost")))
    clients = []
    for _ in range(2):
        plain = connect(server)
        context = client_context(files.ca_file)
        clients.append(in_thread(lambda sock=plain, tls=context: tls.wrap_socket(sock, server_hostname="localhost")))
    in_thread(clients[1].sendall, b"12345")
    wait_until(lambda: server.stats().idle == 1)
    found = json.loads(get(monitor, "/connections")[2])
    assert (found["total"], found["missing"]) == (2, [])
    idle, busy = found["connections"]
    assert (idle["idle"], busy["idle"]) == (True, False)
    assert idle["peer"] == "{}:{}".format(*clients[0].getsockname())
    assert (busy["bytes_received"], busy["tls"], busy["server_name"]) == (5, "TLSv1.3", "localhost")
    assert re.search(r"test_monitoring.py:\d+ in stuck", " ".join(busy["where"]))
    assert found["places"] == {"idle": 1, busy["where"][-1]: 1}
    assert 0 <= busy["age"] < SOON
    assert len(look(server, 1).rows) == 1
    wait.set()


@pytest.mark.slow
def test_the_table_is_bounded(watched, connect, get, monkeypatch):
    monkeypatch.setattr("gtcpserver.monitoring.source.MOST", 50)
    server, monitor = watched()
    clients = [connect(server) for _ in range(60)]
    wait_until(lambda: server.active_connections == len(clients))
    found = json.loads(get(monitor, "/connections")[2])
    assert (len(found["connections"]), found["total"]) == (50, 60)


# -- attackers ---------------------------------------------------------------------------------------------------------


def test_many_silent_clients_neither_disturb_the_service_nor_the_scrapes(watched, connect, in_thread, get):
    server, monitor = watched()
    client = connect(server)
    silent = [connect(monitor.address) for _ in range(5 * MOST_CONNECTIONS)]
    for _ in range(20):
        assert ask(in_thread, client) == b"x"
    assert get(monitor, "/metrics")[0] == 200
    assert monitor._pages.active_connections <= MOST_CONNECTIONS  # noqa: SLF001  its own server
    for one in silent:
        one.close()


@pytest.mark.slow
def test_slow_clients_are_ended(watched, connect, in_thread, monkeypatch):
    monkeypatch.setattr("gtcpserver.monitoring.monitor.TIMEOUT", 0.1)
    monkeypatch.setattr("gtcpserver.monitoring.monitor.REQUEST_TIMEOUT", 0.3)
    _, monitor = watched()
    stalled, dripping = connect(monitor.address), connect(monitor.address)
    stalled.sendall(b"GET /met")

    def drip():
        try:
            for _ in range(400):
                dripping.sendall(b"G")
                time.sleep(0.05)
        except OSError:
            return True
        return False

    assert in_thread(stalled.recv, 100).startswith(b"HTTP/1.1 408 ")
    assert in_thread(drip)


@pytest.mark.slow
def test_large_requests_are_refused(watched, connect, in_thread, get):
    server, monitor = watched()
    client = connect(monitor.address)

    def send_much():
        try:
            client.sendall(b"GET /" + b"x" * 1_000_000)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        try:
            return client.recv(100)
        except ConnectionError:
            return b""

    answer = in_thread(send_much)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 414")
    many = {f"X-{number}": "y" for number in range(200)}
    status = get(monitor, "/metrics", "GET", many)[0]
    assert status in (200, 400, 431)
    assert ask(in_thread, connect(server)) == b"x"
    assert get(monitor, "/metrics")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "junk", [b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01"]
)
def test_junk_harms_nobody(watched, connect, in_thread, get, junk):
    _, monitor = watched()
    client = connect(monitor.address)
    client.sendall(junk)
    client.shutdown(socket.SHUT_WR)
    in_thread(client.recv, 100)
    assert get(monitor, "/healthz")[0] == 200


# -- start and end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "where"), [("9100", "127.0.0.1:9100"), (":9100", "*:9100"), (9100, "127.0.0.1:9100"),
                         ("*:9100", "*:9100"), ("[::1]:1", "[::1]:1"), ("unix:/run/m", "unix:/run/m")]
)  # fmt: skip
def test_a_port_alone_is_on_loopback(given, where):
    assert str(check_metrics_address(given)) == where
    assert is_loopback(check_metrics_address(given)) is where.startswith(("127.", "[::1]"))


@pytest.mark.parametrize("given", ["127.0.0.1", "http://x:1/", "1.2.3:4", None, 70000, True, "127.0.0.1:99999"])
def test_addresses_that_cannot_work(given):
    with pytest.raises(ConfigError, match=r"^metrics must be an address"):
        Monitor(Server("127.0.0.1:0", idle_echo), given)


def test_an_address_in_use(watched):
    _, monitor = watched()
    other = Monitor(Server("127.0.0.1:0", idle_echo), monitor.address)
    with pytest.raises(OSError, match=rf"^\[Errno 98\] metrics: .*{monitor.address}"):
        other.start()
    with pytest.raises(GtcpServerError):
        other.address  # noqa: B018


@pytest.mark.slow
def test_run_serves_metrics_of_its_server(python, in_thread):
    process = python(
        """
        import logging
        from gtcpserver import run
        logging.basicConfig(level=logging.INFO)
        run(lambda conn: conn.sendall(b"hello"), "127.0.0.1:0", metrics="127.0.0.1:0")
        """
    )
    line = in_thread(process.stderr.readline).decode()
    address = re.search(r"metrics and status page on http://(.*)/$", line.strip())[1]
    wait_until(lambda: in_thread(fetch, address, "/readyz")[0] == 200)
    process.terminate()
    assert in_thread(process.wait) == 0
    with pytest.raises(ConnectionRefusedError):
        in_thread(fetch, address, "/readyz")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--workers", "1")])
def test_the_command_line_names_what_is_wrong(watched, more):
    done = run_command("echo", "--bind", "127.0.0.1:0", "--metrics", "nowhere", *more)
    assert done.returncode == 2
    assert done.stderr.startswith("gtcpserver: --metrics: must be an address: ")
    _, monitor = watched()
    done = run_command("echo", "--bind", "127.0.0.1:0", "--metrics", monitor.address, *more)
    assert done.returncode == 1
    assert monitor.address in done.stderr
    assert "metrics" in done.stderr
    assert "listening on" not in done.stderr


@pytest.mark.slow
def test_without_prometheus_client_the_error_names_the_extra():
    source = """
        import sys
        sys.modules["prometheus_client"] = None
        from gtcpserver.cli.commands import run
        sys.exit(run(["echo", "--bind", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(map(str.strip, source.split("\n")))], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install 'gtcpserver[metrics]'" in done.stderr


# -- what is written about them ----------------------------------------------------------------------------------------


@pytest.fixture
def names(watched, get):
    """Names of all metrics, as they are exposed and as queries have them."""
    _, monitor = watched()
    families = list(parse(get(monitor, "/metrics")[2].decode()))
    found = set()
    for family in families:
        if family.type == "counter":
            found.add(family.name + "_total")
        elif family.type in ("histogram", "summary"):
            found |= {family.name + ending for ending in ("_sum", "_count")}
            found |= {family.name + "_bucket"} if family.type == "histogram" else set()
        else:
            found.add(family.name)
    return found


@pytest.mark.slow
def test_the_dashboard_asks_for_metrics_that_exist(names):
    dashboard = json.loads((ROOT / "examples/deployment/grafana/gtcpserver.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries = targets + [variable["query"] for variable in dashboard["templating"]["list"] if "query" in variable]
    asked = set(re.findall(r"gtcpserver_\w+", " ".join(map(str, queries))))
    assert len(targets) > 10
    assert asked <= names
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is missing")
def test_prometheus_scrapes_it_and_answers_what_the_dashboard_asks(watched, connect, in_thread, tmp_path):
    server, monitor = watched()
    assert ask(in_thread, connect(server)) == b"x"
    (tmp_path / "prometheus.yml").write_text(
        "scrape_configs:\n  - job_name: app\n    scrape_interval: 500ms\n    scrape_timeout: 500ms\n"
        f"    static_configs:\n      - targets: ['{monitor.address}']\n"
    )
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address={address}"]
    process = subprocess.Popen(
        [*command, "--storage.tsdb.path=data"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def query(text):
        try:
            body = in_thread(fetch, address, "/api/v1/query?" + urlencode({"query": text}))[2]
        except OSError:
            assert process.poll() is None
            return []
        answer = json.loads(body) if body.startswith(b"{") else {"status": "starting"}
        if answer["status"] == "starting":
            return []
        assert answer["status"] == "success", (text, answer)
        return answer["data"]["result"]

    try:
        # Two scrapes, so that there are rates.
        wait_until(lambda: query("sum_over_time(up[1m]) >= 3"))
        dashboard = json.loads((ROOT / "examples/deployment/grafana/gtcpserver.json").read_text())
        empty = set()
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                text = target["expr"]
                for name, stands_for in VARIABLES.items():
                    text = text.replace(name, stands_for)
                if not query(text):
                    empty.add(panel["title"])
        # These have labels only once there is something to count, and a quotient of nothing.
        assert empty <= {"Errors by kind", "Failed handshakes by kind", "What the handler counts"}
    finally:
        process.kill()
        process.wait()


VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "1m", "$__range": "1m"}


def test_the_documentation_has_every_metric_and_no_other(names):
    text = (ROOT / "docs/monitoring.md").read_text()
    told = set(re.findall(r"\bgtcpserver_[a-z_]+", text))
    for ending in ("_sum", "_count", "_bucket"):
        names = {name.removesuffix(ending) if name.endswith(ending) else name for name in names}
        told = {name.removesuffix(ending) if name.endswith(ending) else name for name in told}
    assert told == names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: it is in Debian's prometheus")
def test_promtool_takes_the_alerts_and_the_scrape_config(tmp_path):
    text = (ROOT / "docs/monitoring.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    rules = next(block for block in blocks if block.startswith("groups:"))
    config = next(block for block in blocks if block.startswith("scrape_configs:"))
    (tmp_path / "alerts.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(config)
    for what in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(["promtool", "check", *what], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
