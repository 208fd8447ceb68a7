"""Health checks of upstream groups: TCP, greeting, CONNECT to a target; and what shows the members' state."""

import json
import logging
import re
import socket
import subprocess
import sys
from collections import Counter

import gevent
import pytest
from click.testing import CliRunner

from gtcpserver import ConfigError, TLSConfig
from gtcpserver.cli.ctl import ctl as command_group
from gtcpserver.cli.ctl import members_in
from gtcpserver.monitoring.metrics import encode
from gtcpserver.proxy.config import parse_config
from gtcpserver.proxy.errors import UpstreamError
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.proxy.target import make_target
from gtcpserver.proxy.upstream_group import HealthCheck, UpstreamGroup
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import make_tls_context, parse_upstream
from gtcpserver.supervisor.totals import Totals
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, http, reply, socks
from kit.tls import Files
from kit.tls import read as content
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


def group(*urls, **options):
    members = [parse_upstream(f"m{number}", url) for number, url in enumerate(urls)]
    return UpstreamGroup("pool", members, check_every=0.01, **options)


@pytest.fixture
def near(serve):
    """`near(group)`: a proxy whose every connection goes through a group."""

    def start(pool, **options):
        gate = Gate(
            client_rules=ANYBODY,
            destination_rules=ANYWHERE,
            upstreams={"pool": pool},
            upstream_rules=[parse_upstream_rule("through pool any")],
            **options,
        )
        return serve(ProxyHandler(gate))

    return start


@pytest.fixture
def parent(serve):
    return serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))


def states(pool):
    return "".join("-" if member.is_down else "+" for member in pool.members)


# -- rise and fall -----------------------------------------------------------------------------------------------------


@pytest.fixture
def told():
    """`told(group, answers)`: its checks end by these, one after another; then they work. The states behind each."""

    def run(pool, answers):
        seen = []

        def check(upstream, how):
            seen.append(states(pool))
            if answers and not answers.pop(0):
                raise UpstreamError(5, "no")

        pool.begin_checks(check)
        wait_until(lambda: not answers)
        count = len(seen)
        wait_until(lambda: len(seen) > count + 1)
        pool.close()
        return "".join(seen)

    return run


def test_a_member_falls_and_rises_by_its_checks(told, caplog):
    caplog.set_level(logging.INFO, "gtcpserver")
    pool = group("http://192.0.2.1:1", fall=3, rise=2, check=HealthCheck("greeting"))
    answers = [True, False, False, True, False, False, False, False, True, False, True, True, True]
    assert told(pool, answers).startswith("+++++++----" + "-+")
    assert pool.counters == {"upstream_down": 1, "upstream_up": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "upstream m0 of pool is down: no",
        "upstream m0 of pool is up",
    ]


def test_connections_that_work_do_not_hide_failed_checks(told):
    pool = group("http://192.0.2.1:1", fall=2, check=HealthCheck("greeting"))
    check_regularly = pool.note_reached

    def check(upstream, how):
        check_regularly(pool.members[0])
        raise UpstreamError(5, "no")

    pool.begin_checks(check)
    wait_until(lambda: states(pool) == "-")
    pool.close()


def test_what_this_host_lacks_counts_for_nothing(told):
    pool = group("http://192.0.2.1:1", fall=1, check=HealthCheck("greeting"))
    calls = []

    def check(upstream, how):
        calls.append(1)
        raise OSError(24, "Too many open files")

    pool.begin_checks(check)
    wait_until(lambda: len(calls) > 3)
    assert states(pool) == "+"
    pool.close()


def test_checks_end_with_the_proxy(near, parent, connect, in_thread, serve):
    pool = group(f"socks5://{parent.address}", check=HealthCheck("tcp"))
    server = near(pool)
    assert in_thread(reply, connect(server), socks(serve(echo).port)) == 0
    assert pool._checking
    server.halt()
    assert not pool._checking


def test_without_a_check_members_that_are_up_are_left_alone():
    pool = group("http://192.0.2.1:1")
    pool.begin_checks(lambda upstream, how: pytest.fail("checked"))
    gevent.sleep(0.05)
    assert not pool._checking


# -- what is found -----------------------------------------------------------------------------------------------------


def first_answer(near, pool, connect, in_thread, port, **options):
    """One connection begins the checks."""
    server = near(pool, **options)
    in_thread(reply, connect(server), socks(port))
    return server


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks4a"])
@pytest.mark.parametrize("check", [HealthCheck("tcp"), HealthCheck("greeting"), "connect"])
def test_a_good_one_stays_up(near, parent, serve, connect, in_thread, scheme, check):
    origin, checked = serve(echo), serve(echo)
    if check == "connect":
        check = HealthCheck("connect", make_target("127.0.0.1", checked.port))
    pool = group(f"{scheme}://{parent.address}", fall=1, check=check)
    first_answer(near, pool, connect, in_thread, origin.port)
    before = parent.accepted_connections
    wait_until(lambda: parent.accepted_connections > before + 3)
    assert states(pool) == "+"
    assert bool(checked.accepted_connections) == (check.kind == "connect")


def test_a_proxy_that_accepts_and_says_nothing_is_found_by_its_greeting(near, parent, serve, connect, in_thread):
    origin = serve(echo)
    with socket.create_server(("127.0.0.1", 0)) as hung:  # the kernel accepts for a program that is stopped
        pool = group(
            f"socks5://127.0.0.1:{hung.getsockname()[1]}",
            f"socks5://{parent.address}",
            fall=1,
            check=HealthCheck("greeting"),
        )
        server = first_answer(near, pool, connect, in_thread, origin.port, timeouts=Timeouts(connect=0.2))
        wait_until(lambda: states(pool) == "-+")
        assert in_thread(reply, connect(server), socks(origin.port)) == 0


@pytest.mark.parametrize(("password", "state"), [("pw", "+"), ("wrong", "-")])
def test_the_login_is_a_part_of_the_greeting(near, serve, connect, in_thread, password, state):
    rules = [parse_client_rule("allow from any to any with auth users")]
    gate = Gate(client_rules=rules, destination_rules=ANYWHERE, authenticators={"users": OnePassword()})
    far = serve(ProxyHandler(gate))
    pool = group(f"socks5://Ada:{password}@{far.address}", fall=1, check=HealthCheck("greeting"))
    first_answer(near, pool, connect, in_thread, serve(echo).port)
    before = far.accepted_connections
    wait_until(lambda: far.accepted_connections > before + 2)
    wait_until(lambda: states(pool) == state)


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks4"])
def test_a_proxy_that_does_not_lead_to_the_target_is_down_until_it_does(
    near, parent, serve, connect, in_thread, scheme
):
    port = free_port()
    check = HealthCheck("connect", make_target("127.0.0.1", port))
    pool = group(f"{scheme}://{parent.address}", fall=2, rise=2, check=check)
    first_answer(near, pool, connect, in_thread, serve(echo).port)
    wait_until(lambda: states(pool) == "-")
    serve(echo, f"127.0.0.1:{port}")
    wait_until(lambda: states(pool) == "+")


def test_a_name_as_the_target_is_the_other_proxy_s_to_look_up(near, parent, serve, connect, in_thread):
    checked = serve(echo)
    check = HealthCheck("connect", make_target("localhost", checked.port))
    pool = group(f"socks5://{parent.address}", fall=1, check=check)
    first_answer(near, pool, connect, in_thread, serve(echo).port)
    wait_until(lambda: checked.accepted_connections > 2)
    assert states(pool) == "+"


def test_the_greeting_has_the_handshake_of_tls(near, serve, connect, in_thread, tmp_path):
    files = Files(tmp_path)
    gate, tls = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE), TLSConfig(*files.issue("a", "127.0.0.1"))
    far = serve(ProxyHandler(gate, tls=tls))
    url = f"https://{far.address}"
    good = parse_upstream("good", url, tls=make_tls_context(content(files.ca_file)))
    bad = parse_upstream("bad", url)
    pool = UpstreamGroup("pool", [good, bad], check_every=0.01, fall=1, check=HealthCheck("greeting"))
    first_answer(near, pool, connect, in_thread, serve(echo).port)
    wait_until(lambda: states(pool) == "+-")
    gevent.sleep(0.05)
    assert states(pool) == "+-"


def test_a_silent_handshake_leaves_time_for_the_next_member(near, parent, connect, in_thread, serve):
    with socket.create_server(("127.0.0.1", 0)) as hung:
        pool = group(f"https://127.0.0.1:{hung.getsockname()[1]}", f"http://{parent.address}")
        server = near(pool, timeouts=Timeouts(connect=0.5))
        assert in_thread(reply, connect(server), socks(serve(echo).port)) == 0
        assert pool.members[0].failures == 1


# -- what shows it -----------------------------------------------------------------------------------------------------


def test_gauges_of_a_proxy(near, parent, serve, connect, in_thread):
    pool = group(f"socks5://127.0.0.1:{free_port()}", f"http://{parent.address}", fall=1)
    server = near(pool)
    client = connect(server)
    assert in_thread(reply, client, socks(serve(echo).port)) == 0
    gauges = server.stats().handler_gauges
    assert gauges == {
        "upstream_up:pool/m0": 0,
        "upstream_down:pool/m0": 1,
        "upstream_connections:pool/m0": 0,
        "upstream_up:pool/m1": 1,
        "upstream_down:pool/m1": 0,
        "upstream_connections:pool/m1": 1,
        "udp_associations": 0,
    }
    status = {"ready": True, "uptime": 1, "target": 1, "retired": 0, "generation": 1, "restarts": 0, "workers": []}
    text = encode({**status, "stats": {"handler_gauges": gauges}}, "1", "")[0].decode()
    assert 'gtcpserver_handler_gauges{name="upstream_down:pool/m0"} 1.0' in text


def test_gauges_end_with_their_worker():
    totals = Totals()
    totals.forget_worker({"handler_gauges": {"a": 1}, "handler_counters": {"b": 1}})
    assert totals.of([{"handler_gauges": {"a": 2}}, {"handler_gauges": {"a": 3}}]) == {
        "handler_gauges": {"a": 5},
        "handler_counters": {"b": 1},
    }


def test_rows_of_ctl_upstreams(monkeypatch):
    gauges = Counter()
    for state in ("up", "down"):  # two workers, one of which sees it down
        gauges.update({f"upstream_{state}:out/east": 1, "upstream_connections:out/east": 2, "upstream_up:out/west": 1})
    gauges.update({"other": 7, "upstream_up": 1, "upstream_x:a/b": 1})
    rows = members_in(gauges)
    assert rows == [
        {"group": "out", "upstream": "east", "up": 1, "down": 1, "connections": 4},
        {"group": "out", "upstream": "west", "up": 2, "down": 0, "connections": 0},
    ]
    monkeypatch.setattr("gtcpserver.cli.ctl.ask", lambda *arguments: {"stats": {"handler_gauges": gauges}})
    done = CliRunner().invoke(command_group, ["--control", "x", "upstreams"])
    assert (done.exit_code, done.output.splitlines()) == (
        1,
        [
            "upstream  state  up in  down in  connections",
            "out/east  down       1        1            4",
            "out/west  up         2        0            0",
        ],
    )
    done = CliRunner().invoke(command_group, ["--control", "x", "upstreams", "--json"])
    assert json.loads(done.output) == rows


@pytest.mark.slow
def test_ctl_shows_the_members_of_all_workers(parent, serve, in_thread, tmp_path):
    path, control = tmp_path / "proxy.toml", str(tmp_path / "control")
    path.write_text(
        f'[[listener]]\nlisten = "127.0.0.1:0"\n[upstream.dead]\nurl = "http://127.0.0.1:{free_port()}"\n'
        f'[upstream.good]\nurl = "http://{parent.address}"\n[upstream.out]\nmembers = ["dead", "good"]\nfall = 1\n'
        '[rules]\nupstreams = ["through out any"]\ndestinations = ["allow loopback"]\n'
    )
    origin = serve(echo)
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--config", str(path), "--workers", "2"]
    with subprocess.Popen([*command, "--control", control], stderr=subprocess.PIPE, text=True) as process:
        try:

            def port_of():
                return next(
                    int(found[1]) for line in process.stderr if (found := re.search(r"on 127.*:([0-9]+)", line))
                )

            port = in_thread(port_of)
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                assert in_thread(reply, client, socks(origin.port)) == 0

                def dead_is_down():
                    done = CliRunner().invoke(command_group, ["--control", control, "upstreams", "--json"])
                    rows = {row["upstream"]: row for row in json.loads(done.output)}
                    assert rows["dead"]["up"] + rows["dead"]["down"] == rows["good"]["up"] == 2
                    return rows["dead"]["down"] == 1 and rows["good"]["connections"] == 1 and done.exit_code == 1

                in_thread(lambda: [None for _ in iter(dead_is_down, True)])
        finally:
            process.terminate()
            in_thread(process.communicate)


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ('check = "ping"', "Invalid enum value 'ping'"),
        ('check = "connect"', "check_target is needed for check = \"connect\", and no other, got 'connect'"),
        ('check_target = "x:1"', "check_target is needed for check = \"connect\", and no other, got 'tcp'"),
        ('check = "connect"\ncheck_target = "x"', "check_target must be host:port, got 'x'"),
        ('check = "connect"\ncheck_target = "[::1]:1"', "check_target must be an IPv4 address for socks4"),
        ('check = "connect"\ncheck_target = "name:1"', "check_target must be an IPv4 address for socks4"),
    ],
)
def test_mistakes(keys, told):
    text = f'[upstream.a]\nurl = "socks4://x:1"\n[upstream.up]\nmembers = ["a"]\n{keys}\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert told in str(caught.value)


def test_a_check_is_for_groups():
    with pytest.raises(ConfigError, match="check is for groups, with members"):
        parse_config('[upstream.a]\nurl = "socks4://x:1"\ncheck = "tcp"\n')


def test_requests_are_forwarded_by_checked_members(near, parent, origin, connect, in_thread):
    pool = group(f"http://{parent.address}", check=HealthCheck("tcp"))
    site = origin(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
    answer = in_thread(http, connect(near(pool)), b"GET %b/ HTTP/1.1\r\nHost: x\r\n\r\n" % site.url.encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
