"""Quotas of users: tunnels, requests and datagrams end when one is used up, in all worker processes."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from threading import Event

import pytest
from click.testing import CliRunner

from gtcpserver.cli.ctl import ctl
from gtcpserver.errors import ConfigError
from gtcpserver.proxy import quota as quota_module
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.errors import QuotaUsedUp
from gtcpserver.proxy.quota import Quota, end_of_period, period_at
from gtcpserver.proxy.quota_file import read_usage
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import QUICK, http, packet, reply, socks, udp_socket
from kit.waiting import wait_until

WITH_AUTH = (
    '[rules]\nclients = ["allow from any to any with auth staff"]\ndestinations = ["allow loopback"]\n'
    f'[auth.staff]\nusers = {{ ada = "{QUICK}", bob = "{QUICK}", eve = "{QUICK}" }}\n'
)
AS_ADA = b"Proxy-Authorization: Basic YWRhOnB3\r\n"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "quota")


@pytest.fixture
def limited(proxy, path):
    """`limited()`: a proxy where users may move 1,000 bytes; bob 10,000, eve any number."""
    return lambda: proxy(
        f'[quota]\nbytes = 1000\nfile = "{path}"\nusers = {{ bob = 10_000, eve = "none" }}', rules=WITH_AUTH
    )


@pytest.fixture
def used(path):
    return lambda: read_usage(path, period_at("month", time.time()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(quota_module, "WRITE_SECONDS", 0.02)


# -- what it ends, and refuses -----------------------------------------------------------------------------------------


def test_a_tunnel_ends_and_the_next_is_refused(limited, connect, in_thread, serve, lines, used):
    origin, server = serve(echo), limited()
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port, user=b"ada")) == 0
    client.sendall(b"x" * 300)
    assert in_thread(read, client, 300) == b"x" * 300
    client.sendall(b"x" * 300)  # to the origin and back: 1,200
    with pytest.raises(ConnectionResetError):
        while in_thread(client.recv, 1000):
            pass
    assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 2
    month = end_of_period("month", time.time())
    for line in lines(2):
        assert line["result"] == "quota"
        assert line["detail"] == f"1000 bytes a month, until {month:%Y-%m-%dT%H:%M:%SZ}"
    assert server.handler.counters["quota"] == 2
    wait_until(lambda: used().get("ada", 0) >= 900)
    for user in (b"bob", b"eve"):
        client = connect(server)
        assert in_thread(reply, client, socks(origin.port, user=user)) == 0
        client.sendall(b"x" * 1000)
        assert in_thread(read, client, 1000) == b"x" * 1000
    wait_until(lambda: used().get("eve") == used().get("bob") == 2000)


def test_another_process_knows_it_and_so_does_the_next(limited, connect, in_thread, serve, used):
    origin, one, two = serve(echo), limited(), limited()
    client = connect(one)
    assert in_thread(reply, client, socks(origin.port, user=b"ada")) == 0
    client.sendall(b"x" * 450)
    assert in_thread(read, client, 450)
    wait_until(lambda: used().get("ada") == 900)
    other = connect(two)
    assert in_thread(reply, other, socks(origin.port, user=b"ada")) == 0
    other.sendall(b"x" * 60)
    with pytest.raises(ConnectionResetError):
        while in_thread(other.recv, 1000):
            pass
    wait_until(lambda: used()["ada"] >= 1000)
    assert in_thread(reply, connect(one), socks(origin.port, user=b"ada")) == 2
    assert in_thread(reply, connect(limited()), socks(origin.port, user=b"ada")) == 2


def test_http_requests_are_answered_by_429(limited, connect, in_thread, serve, lines):
    bodies = [b"x" * 1000, b"never"]

    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        body = bodies.pop(0)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    origin, server = serve(answer), limited()
    request = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n%s\r\n" % (origin.port, AS_ADA)
    client = connect(server)
    client.sendall(request)
    with pytest.raises(ConnectionResetError):  # the last bytes of a quota end what moves them
        while in_thread(client.recv, 10_000):
            pass
    for asked in (request, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n%s\r\n" % (origin.port, AS_ADA)):
        said = in_thread(http, connect(server), asked)
        assert said.startswith(b"HTTP/1.1 429 ")
        seconds = int(said.partition(b"Retry-After: ")[2].partition(b"\r")[0])
        assert 0 < seconds <= 31 * 86400
        assert b"Your quota of bytes is used up until " in said
    assert [line["result"] for line in lines(3)] == ["quota"] * 3
    assert bodies == [b"never"]


def test_an_upload_ends(limited, connect, in_thread, serve, lines):
    came = Event()

    def take(conn):
        while conn.recv(10_000):
            came.set()

    server, client = limited(), None
    client = connect(server)
    head = b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n%s\r\n"
    client.sendall(head % (serve(take).port, AS_ADA) + b"x" * 2000)
    with pytest.raises(ConnectionResetError):
        while in_thread(client.recv, 1000):
            pass
    assert lines()[0]["result"] == "quota"
    assert came.is_set()


def test_a_udp_association_ends(limited, connect, in_thread, lines, monkeypatch):
    client = connect(limited())
    client.sendall(b"\x05\x01\x02\x01\x03ada\x02pw")
    assert in_thread(read, client, 4) == b"\x05\x02\x01\x00"
    client.sendall(b"\x05\x03\x00\x01" + bytes(6))
    port = int.from_bytes(in_thread(read, client, 10)[-2:], "big")
    with udp_socket() as origin, udp_socket() as sock:
        for _ in range(2):
            sock.sendto(packet(origin.getsockname()[1], b"x" * 500), ("127.0.0.1", port))
            assert origin.recv(1000)
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    assert (lines()[0]["result"], lines()[0]["sent"]) == ("quota", 1000)


def test_clients_without_a_name_have_no_quota(proxy, connect, in_thread, serve, path):
    rules = '[rules]\ndestinations = ["allow loopback"]\n'
    server = proxy(f'[quota]\nbytes = 0\nfile = "{path}"\n[auth.staff]\nusers = {{ ada = "{QUICK}" }}', rules=rules)
    client = connect(server)
    assert in_thread(reply, client, socks(serve(echo).port)) == 0
    client.sendall(b"x")
    assert in_thread(client.recv, 1) == b"x"


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quota(path):
    """`quota(**options)`: that of another process."""
    made = []

    def make(**options):
        made.append(Quota(path, **{"most": 1000, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_last_bytes_are_written_at_the_end(quota, used, monkeypatch):
    monkeypatch.setattr(quota_module, "WRITE_SECONDS", 1000.0)
    one = quota()
    one.charge("ada", 7)
    one.close()
    assert used() == {"ada": 7}


def test_a_new_month_begins_at_zero_and_steps_of_the_clock_grant_nothing(quota, monkeypatch):
    one, now = quota(), [datetime(2026, 11, 30, 23, 59, tzinfo=timezone.utc).timestamp()]
    monkeypatch.setattr(quota_module, "time", lambda: now[0])
    monkeypatch.setattr(quota_module, "WRITE_SECONDS", 0.0)  # each check reads
    one.charge("ada", 1000)
    with pytest.raises(QuotaUsedUp, match="1000 bytes a month, until 2026-12-01T00:00:00Z"):
        one.check("ada")
    now[0] += 60
    one.check("ada")
    one.charge("ada", 1000)
    for step in (0, -60, 60, -86400 * 365 * 50):
        now[0] += step
        with pytest.raises(QuotaUsedUp):
            one.check("ada")


def test_a_file_that_cannot_be_used_stops_nobody_and_is_told_once(quota, path, caplog, used):
    os.mkdir(path)
    one = quota()
    for _ in range(3):
        one.charge("ada", 300)
        one._sync()
    one.check("ada")
    one.charge("ada", 100)
    with pytest.raises(QuotaUsedUp):
        one.check("ada")
    said = [record.getMessage() for record in caplog.records if "quota" in record.getMessage()]
    assert said == [
        f"the quota file {path} cannot be used: unable to open database file; each worker counts by itself meanwhile"
    ]
    os.rmdir(path)
    one._sync()
    assert used() == {"ada": 1000}


def test_a_new_month_begins_at_zero_without_the_file_too(quota, path, monkeypatch):
    os.mkdir(path)
    one, now = quota(), [datetime(2026, 11, 30, 23, 59, tzinfo=timezone.utc).timestamp()]
    monkeypatch.setattr(quota_module, "time", lambda: now[0])
    one.charge("ada", 1000)
    one._sync()
    now[0] += 60
    one._sync()
    one.check("ada")
    os.rmdir(path)


def test_a_damaged_file_is_told(quota, path, caplog, used):
    with open(path, "wb") as file:
        file.write(b"damaged" * 1000)
    one = quota()
    one.charge("ada", 7)
    one._sync()
    assert f"the quota file {path} is damaged (file is not a database): it is now {path}.damaged-" in caplog.text
    assert used() == {"ada": 7}


def test_a_slow_disk_holds_up_nobody_for_long(quota, monkeypatch):
    monkeypatch.setattr(quota_module, "PATIENCE", 0.01)
    monkeypatch.setattr(quota_module, "WRITE_SECONDS", 1000.0)
    one, done, calls = quota(), Event(), []
    sync = one._ledger.sync

    def slow(*arguments):
        calls.append(arguments)
        done.wait(SOON)
        return sync(*arguments)

    monkeypatch.setattr(one._ledger, "sync", slow)
    for _ in range(20):
        one.check("ada")  # the first one waits, the others do not
    done.set()
    wait_until(lambda: one._syncing is None)
    assert len(calls) == 1


KILLED = """
import sys, gevent
from gtcpserver.proxy import quota
quota.WRITE_SECONDS = 0.02
one = quota.Quota(sys.argv[1])
total = 0
while True:
    one.charge("ada", 1); total += 1
    gevent.sleep(0.001)
    print(one._used.get("ada", 0), total, flush=True)
"""


def test_a_killed_process_loses_only_what_was_not_written(path, in_thread, used):
    def look(lines, least):
        for line in lines:
            known, total = map(int, line.split())
            if known >= least:
                return known, total
        return None

    written = 0
    for _ in range(2):
        before = written
        with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True) as child:
            known, total = in_thread(look, child.stdout, written + 20)
            child.send_signal(signal.SIGKILL)
            rest = in_thread(child.stdout.read).splitlines()
        if rest and len(rest[-1].split()) == 2:
            total = max(total, int(rest[-1].split()[1]))
        written = used()["ada"]
        assert known <= written <= before + total + 1


# -- settings, and what shows it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bytes = 5", "quota.file must name a file to count in"),
        ("users = { ada = 5 }", "quota.file must name a file to count in"),
        ('file = "/no/such/folder/quota"', "quota.file must be in a folder that is there, got '/no/such/folder/quota'"),
        ('file = ""', "quota.file must be in a folder that is there"),
        ('file = "/tmp/quota"\nbytes = -1', "quota.bytes must be"),
        ('file = "/tmp/quota"\nusers = { ada = -1 }', "quota.users.ada must be"),
        ('file = "/tmp/quota"\nusers = { ada = "some" }', "quota.users"),
        ('file = "/tmp/quota"\nperiod = "week"', "quota.period"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(ConfigError) as caught:
        make_proxy(parse_config(f"[quota]\n{text}\n{WITH_AUTH}"))
    assert said in str(caught.value).replace("`$.", "").replace("$.", "")


def test_a_quota_without_users_is_a_mistake():
    with pytest.raises(ConfigError, match=r"quota is about users, and there is no \[auth.NAME\]"):
        make_proxy(parse_config('[quota]\nfile = "/tmp/quota"'))


@pytest.mark.parametrize(
    ("at", "period", "name", "end"),
    [
        ((2026, 11, 30, 23, 59), "month", "2026-11", "2026-12-01"),
        ((2026, 12, 31, 0, 0), "month", "2026-12", "2027-01-01"),
        ((2028, 2, 29, 12, 0), "day", "2028-02-29", "2028-03-01"),
        ((2026, 1, 1, 0, 0), "month", "2026-01", "2026-02-01"),
    ],
)
def test_periods(at, period, name, end):
    seconds = datetime(*at, tzinfo=timezone.utc).timestamp()
    assert period_at(period, seconds) == name
    assert f"{end_of_period(period, seconds):%Y-%m-%dT%H:%M:%S}" == end + "T00:00:00"


def test_ctl_users(path, quota, tmp_path):
    one = quota()
    one.charge("ada", 7)
    one.charge("e\x1b[31m", 9)
    one._sync()
    config = tmp_path / "proxy.toml"
    config.write_text(f'[quota]\nfile = "{path}"\nbytes = 1000\nusers = {{ bob = 5, ada = "none" }}\n{WITH_AUTH}')
    resets = f"{end_of_period('month', time.time()):%Y-%m-%dT%H:%M:%SZ}"
    done = CliRunner().invoke(ctl, ["users", "--config", str(config), "--json"])
    assert json.loads(done.output) == [
        {"user": "e\x1b[31m", "used": 9, "limit": 1000, "resets": resets},
        {"user": "ada", "used": 7, "limit": None, "resets": resets},
        {"user": "bob", "used": 0, "limit": 5, "resets": resets},
    ]
    done = CliRunner().invoke(ctl, ["users", "--config", str(config)])
    assert done.output.splitlines()[0].split() == ["user", "used", "limit", "resets"]
    assert done.output.splitlines()[1].split() == ["e\\x1b[31m", "9", "1000", resets]
    assert done.output.splitlines()[2].split() == ["ada", "7", "-", resets]


def test_ctl_users_names_what_is_wrong(path, tmp_path):
    config = tmp_path / "proxy.toml"
    config.write_text(WITH_AUTH)
    done = CliRunner().invoke(ctl, ["users", "--config", str(config)])
    assert str(done.exception) == "the configuration has no quota.file"
    config.write_text(f'[quota]\nfile = "{path}"\n{WITH_AUTH}')
    assert CliRunner().invoke(ctl, ["users", "--config", str(config)]).exit_code == 0  # nobody has come yet
    with open(path, "wb") as file:
        file.write(b"damaged" * 1000)
    done = CliRunner().invoke(ctl, ["users", "--config", str(config)])
    assert str(done.exception) == f"the quota file {path} cannot be read: file is not a database"
