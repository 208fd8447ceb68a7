"""The store, against a real Redis: what it counts, and what happens when Redis does not answer."""

import logging
import re
import socket
import time
from collections import Counter

import gevent
import pytest

from gtcpserver.store import store
from gtcpserver.store.scripts import LEASE_MS
from gtcpserver.store.store import MOST_REFUSED, STORE_FAILURE
from kit.paths import ROOT
from kit.ports import free_port
from kit.programs import needs
from kit.redis_server import open_of, rate_of
from kit.waiting import wait_until

redis = pytest.importorskip("redis")
pytestmark = needs("redis-server", "redis-cli")

ADA = open_of("clients:192.0.2.1")
FULL = "client_connections"


@pytest.fixture
def hasty(monkeypatch):
    """Have stores come back at once."""
    monkeypatch.setattr(store, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def forget_refusals(monkeypatch):
    """Have refused clients asked about again soon, except where a test is about that."""
    monkeypatch.setattr(store, "REFUSED_SECONDS", 0.001)


def ask(*stores, demands=ADA):
    """Return the answers of one after the other."""
    answers = []
    for one in stores:
        gevent.sleep(0.002)
        answers.append(one.ask_and_wait(demands))
    return answers


def away_lines(caplog):
    return [record.message for record in caplog.records if "shared limits" in record.message]


# -- counts ------------------------------------------------------------------------------------------------------------


def test_two_machines_share_a_limit_exactly(redis_server, join):
    url = redis_server().url
    one, two = join(url), join(url)
    assert ask(one, two, one, two, one) == ["", "", "", FULL, FULL]
    two.leave(ADA)
    wait_until(lambda: ask(one) == [""])
    assert ask(two) == [FULL]
    assert (one.open("open:clients:192.0.2.1"), two.open("open:clients:192.0.2.1")) == (3, 0)


def test_of_connections_at_the_same_moment_none_is_admitted_too_many(redis_server, join):
    url = redis_server().url
    stores = [join(url) for _ in range(4)]
    many = open_of("clients:192.0.2.1", 50)
    tries = [gevent.spawn(one.ask_and_wait, many) for one in stores for _ in range(50)]
    gevent.joinall(tries)
    assert Counter(one.value for one in tries) == {"": 50, FULL: 150}


def test_a_connection_that_ends_and_one_that_comes_in_the_same_moment_are_counted_in_order(redis_server, join):
    one = join(redis_server().url)
    alone = open_of("clients:192.0.2.1", 1)
    assert ask(one, demands=alone) == [""]
    for _ in range(50):
        one.leave(alone)
        assert one.ask_and_wait(alone) == ""


def test_two_machines_share_a_rate_exactly(redis_server, join):
    url = redis_server().url
    one, two = join(url), join(url)
    slow = rate_of("clients:192.0.2.1", 0.01, 5)
    assert ask(*[one, two] * 4, demands=slow) == [""] * 5 + ["client_rate"] * 3


def test_a_rate_comes_back(redis_server, join):
    one = join(redis_server().url)
    fast = rate_of("clients:192.0.2.1", 20, 1)
    assert ask(one, one, demands=fast) == ["", "client_rate"]
    gevent.sleep(0.06)
    assert ask(one, demands=fast) == [""]
    one.give_back(fast)
    assert one.ask_and_wait(fast) == ""


def test_a_connection_is_counted_under_all_of_its_limits_or_none(redis_server, join):
    one = join(redis_server().url)
    both = [*open_of("clients:192.0.2.1", 1), *open_of("proxy", 9)]
    assert ask(one, one, demands=both) == ["", FULL]
    assert ask(*[one] * 9, demands=open_of("proxy", 9)) == [""] * 8 + [FULL]


def test_a_refused_client_is_not_asked_about_again_for_a_while(redis_server, join, monkeypatch):
    monkeypatch.setattr(store, "REFUSED_SECONDS", 60)
    one = join(redis_server().url)
    ask(*[one] * 4)
    asked = one.questions
    assert ask(*[one] * 20) == [FULL] * 20
    assert one.questions == asked
    one.leave(ADA)  # one of its own: there may be room
    assert ask(one) == [""]


def test_refused_clients_that_are_remembered_are_limited_in_number(redis_server, join, monkeypatch):
    monkeypatch.setattr(store, "MOST_REFUSED", 10)
    assert MOST_REFUSED == 10_000
    one = join(redis_server().url)
    for number in range(30):
        refused = rate_of(f"clients:{number}", 0.001, 1)
        assert [one.ask_and_wait(refused) for _ in range(2)] == ["", "client_rate"]
    asked = one.questions
    assert one.ask_and_wait(rate_of("clients:29", 0.001, 1)) == "client_rate"
    assert one.questions == asked
    assert one.ask_and_wait(rate_of("clients:0", 0.001, 1)) == "client_rate"
    assert one.questions == asked + 1


def test_nothing_is_left_in_redis_of_clients_that_have_gone(redis_server, join):
    server = redis_server()
    one = join(server.url)
    for number in range(10):
        assert one.ask_and_wait(open_of(f"clients:{number}")) == ""
        one.leave(open_of(f"clients:{number}"))
    wait_until(lambda: server.ask("KEYS", "*") == "gtcpserver:members")
    one.close()
    assert server.ask("KEYS", "*") == ""


def test_services_with_different_prefixes_do_not_count_together(redis_server, join):
    url = redis_server().url
    one, other = join(url), join(url + "?prefix=mail")
    assert ask(one, one, one, one, other) == ["", "", "", FULL, ""]


def test_a_greenlet_that_is_killed_while_it_waits_leaves_no_count(redis_server, join):
    server = redis_server()
    one = join(server.url)
    server.pause()
    waiting = gevent.spawn(one.ask_and_wait, ADA)
    gevent.sleep(0.005)
    waiting.kill()
    server.go_on()
    wait_until(lambda: one.questions == 1 and not one.open("open:clients:192.0.2.1"))
    wait_until(lambda: ask(one, one, one) == ["", "", ""])


def test_wrong_passwords_are_counted_together(redis_server, join):
    url = redis_server().url
    one, two = join(url), join(url)
    assert [one.wrong("a", "ada", 1, 300)[0], two.wrong("a", "bob", 1, 300)[0]] == [1, 2]
    two.forget_wrong("a", "ada")
    count, left = one.wrong("a")
    assert count == 1
    assert 290 < left <= 300
    assert one.wrong("b")[0] == 0
    assert join("redis://127.0.0.1:1").wrong("a") is None


# -- machines that end -------------------------------------------------------------------------------------------------


def test_counts_of_a_member_whose_lease_is_over_are_void(redis_server, join, monkeypatch):
    monkeypatch.setattr(store, "RENEW_SECONDS", 1000)
    assert LEASE_MS == 5000
    server = redis_server()
    dying, other = join(server.url), join(server.url)
    ask(dying, dying, dying)
    assert ask(other) == [FULL]
    server.ask("ZADD", "gtcpserver:members", "1", dying.member)  # some seconds later
    assert ask(other, other) == ["", ""]
    assert dying.member not in server.ask("HKEYS", "gtcpserver:open:clients:192.0.2.1")


def test_a_member_whose_lease_was_over_announces_its_counts_again(redis_server, join, hasty):
    server = redis_server()
    one, other = join(server.url), join(server.url)
    ask(one, one)
    server.ask("FLUSHALL")  # by somebody who does not know what he does, say
    one.renew()
    wait_until(lambda: one.failures and not one.away)
    wait_until(lambda: ask(other) and other.failures)
    wait_until(lambda: not other.away)
    held = one.open(ADA[0].key) + other.open(ADA[0].key)
    assert server.ask("HVALS", f"gtcpserver:{ADA[0].key}").split() == ["2", str(held - 2)]


@pytest.mark.parametrize("words", [("SCRIPT", "FLUSH"), ("CLIENT", "KILL", "TYPE", "normal")])
def test_a_store_comes_back_after_what_operators_do(redis_server, join, hasty, words):
    server = redis_server()
    one = join(server.url)
    ask(one)
    server.ask(*words)
    wait_until(lambda: ask(one) and one.failures)
    wait_until(lambda: not one.away)
    room = 3 - one.open(ADA[0].key)
    assert ask(*[one] * 4).count("") == max(0, room)


def test_an_answer_that_is_none_of_ours_is_a_failure(redis_server, join, hasty, monkeypatch):
    monkeypatch.setattr(store, "ENTER", "return 7")
    one = join(redis_server().url)
    assert ask(one) == [STORE_FAILURE]
    assert one.failures == 1


# -- Redis goes, and comes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["local", "allow", "refuse"])
def test_what_holds_while_redis_is_away_is_chosen(redis_server, join, by):
    server = redis_server()
    one = join(server.url, on_failure=by)
    assert ask(one) == [""]
    server.kill()
    wait_until(lambda: one.away)
    assert ask(*[one] * 5) == [STORE_FAILURE if by == "refuse" else ""] * 5  # limits of this machine are another's
    assert one.allows_all == (by == "allow")
    assert one.alone >= 5


def test_a_redis_that_was_restarted_learns_what_is_open(redis_server, join, hasty, caplog):
    caplog.set_level(logging.INFO)
    server = redis_server()
    one, two = join(server.url), join(server.url)
    ask(one, two)
    server.kill()
    wait_until(lambda: one.away and two.away)
    assert ask(one, two) == ["", ""]  # 4 now, one more than the limit
    two.leave(ADA)
    for _ in range(100):
        one.ask_and_wait(open_of("clients:192.0.2.9"))
    server.start()
    wait_until(lambda: not one.away and not two.away)
    assert ask(one) == [FULL]
    two.leave(ADA)
    wait_until(lambda: ask(one) == [""])
    lines = away_lines(caplog)
    assert len([line for line in lines if "is away" in line]) == 2  # one of each, whatever clients do
    assert len([line for line in lines if "is back after" in line]) == 2


def test_a_redis_that_is_paused_delays_nobody_for_longer_than_the_time_out(redis_server, join, hasty):
    server = redis_server()
    one = join(server.url, timeout=0.3)
    server.pause()
    began = time.monotonic()
    gevent.joinall([gevent.spawn(one.ask_and_wait, open_of(f"clients:{number}")) for number in range(100)])
    assert time.monotonic() - began < 3  # and what else the machine does
    assert one.away
    assert ask(one) == [""]
    assert one.questions == 100  # none more: it is away
    server.go_on()
    wait_until(lambda: not one.away and ask(one) == [FULL])


def test_an_idle_process_notices_that_redis_is_paused(redis_server, join):
    server = redis_server()
    one = join(server.url, timeout=0.05)
    server.pause()
    one.renew()
    wait_until(lambda: one.away)
    server.go_on()


def test_a_redis_that_is_slow_is_away(redis_server, join, hasty, caplog, spawn_thread):
    server = redis_server()
    one = join(server.url, timeout=0.02)
    busy = spawn_thread(server.ask, "EVAL", BUSY, "0")
    wait_until(lambda: ask(one) and one.away)
    assert "no answer within 0.02 s" in away_lines(caplog)[0]
    busy.get()
    wait_until(lambda: not one.away)


BUSY = """
local began = redis.call('TIME')
repeat local now = redis.call('TIME') until (now[1] - began[1]) * 1000000 + now[2] - began[2] > 200000
"""


def test_an_event_loop_that_was_blocked_does_not_take_redis_for_slow(redis_server, join):
    one = join(redis_server().url, timeout=0.2)
    answers = [gevent.spawn(one.ask_and_wait, ADA) for _ in range(3)]
    gevent.sleep(0)  # they ask
    gevent.sleep(0)
    time.sleep(0.5)  # as a handler that computes
    gevent.joinall(answers)
    assert [one.value for one in answers] == ["", "", ""]
    assert not one.failures


def test_a_redis_without_memory_is_away_until_it_has_some(redis_server, join, hasty, caplog):
    server = redis_server("--maxmemory-policy", "noeviction")
    one = join(server.url)
    server.ask("CONFIG", "SET", "maxmemory", "1")
    assert ask(one, one) == ["", ""]
    assert one.away
    assert "used memory > 'maxmemory'" in away_lines(caplog)[0]
    server.ask("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: not one.away)
    assert ask(one, one) == ["", FULL]


def test_a_wrong_password_is_reported_without_it_and_a_right_one_is_taken(redis_server, join, hasty, caplog):
    server = redis_server("--requirepass", "right")
    one = join(f"redis://:wr%40ng@127.0.0.1:{server.port}")
    assert one.away
    assert "invalid username-password pair" in away_lines(caplog)[0]
    assert "ng@" not in caplog.text
    server.ask("CONFIG", "SET", "requirepass", "wr@ng", password="right")
    wait_until(lambda: not one.away)
    assert ask(one) == [""]


def test_the_least_rights_of_the_documentation_suffice(redis_server, join, caplog):
    rights = re.search(r"`(~gtcpserver:.*?)`", (ROOT / "docs" / "security.md").read_text())[1]
    server = redis_server()
    server.ask("ACL", "SETUSER", "limits", "on", ">secret", *rights.split())
    one = join(f"redis://limits:secret@127.0.0.1:{server.port}")
    assert not away_lines(caplog)
    assert ask(one, one, one, one) == ["", "", "", FULL]
    assert one.wrong("a", "ada", 1, 300)[0] == 1
    one.leave(ADA)
    one.renew()
    one.give_back(rate_of("clients:192.0.2.1", 1, 1))
    assert one.wrong("a")[0] == 1  # it has answered all before
    assert not one.failures


def test_nobody_at_the_address_is_reported_once(join, hasty, caplog):
    one = join("redis://127.0.0.1:1")
    wait_until(lambda: one.away)
    assert ask(one, one) == ["", ""]
    gevent.sleep(0.2)  # many attempts
    assert len(away_lines(caplog)) == 1
    assert one.failures == 1


def test_a_store_comes_back_even_if_memory_runs_out_when_it_goes_away(redis_server, join, hasty):
    server = redis_server()
    one = join(server.url)
    failed = []

    def fail():
        failed.append(None)
        raise MemoryError

    one.take_turn = fail
    server.kill()
    wait_until(lambda: failed)
    one.take_turn = lambda: True
    server.start()
    wait_until(lambda: one.renew() or not one.away)
    assert ask(one) == [""]


def test_a_start_does_not_wait_for_a_redis_that_is_silent(join, monkeypatch):
    monkeypatch.setattr(store, "START_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = join(f"redis://127.0.0.1:{silent.getsockname()[1]}", on_failure="refuse")
        assert ask(one) == [STORE_FAILURE]


def test_a_server_that_speaks_something_else_is_away(join, spawn_thread):
    def answer():
        with silent.accept()[0] as sock:
            sock.recv(100)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 1000)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        spawn_thread(answer)
        one = join(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        assert one.away


def test_members_follow_the_sentinels_to_another_master(redis_server, join, hasty):
    first = redis_server("--repl-diskless-sync", "no")
    second = redis_server("--replicaof", "127.0.0.1", str(first.port))
    wait_until(lambda: "master_link_status:up" in second.ask("INFO", "replication"))
    sentinel = redis_server("--sentinel", config=f"sentinel monitor mymaster 127.0.0.1 {first.port} 1\n")
    one = join(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/mymaster/0")
    assert ask(one) == [""]
    # As sentinels do at a failover, of which the other half is to wait for some seconds.
    second.ask("REPLICAOF", "NO", "ONE")
    first.ask("REPLICAOF", "127.0.0.1", str(second.port))
    wait_until(lambda: ask(one) and one.away)  # READONLY
    sentinel.ask("SENTINEL", "REMOVE", "mymaster")
    sentinel.ask("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", str(second.port), "1")
    wait_until(lambda: not one.away)
    ask(one, one, one)
    assert second.ask("HVALS", "gtcpserver:open:clients:192.0.2.1").split()[-1] == str(one.open(ADA[0].key))


# -- TLS ---------------------------------------------------------------------------------------------------------------


def test_tls_checks_the_certificate(redis_server, join, tmp_path, caplog):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem")
    port = free_port()
    try:
        redis_server(*files, "--tls-auth-clients", "no", "--port", "0", "--tls-port", str(port), port=port)
    except AssertionError:
        pytest.skip("this redis-server has no TLS")
    one = join(f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path}/ca.pem")
    assert ask(one, one, one, one) == ["", "", "", FULL]
    assert join(f"rediss://localhost:{port}/0").away
    assert "certificate verify failed" in caplog.text
    assert not join(f"rediss://localhost:{port}/0?ssl_cert_reqs=none&prefix=x").away


def test_a_unix_socket_will_do(redis_server, join, tmp_path):
    redis_server("--unixsocket", str(tmp_path / "sock"))
    assert ask(join(f"unix://{tmp_path}/sock?db=1")) == [""]
