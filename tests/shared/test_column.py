"""What several processes count together. Each column stands for a process; none of them waits for another."""

import os
import random
from ipaddress import ip_address

import pytest

from gtcpserver import ClientLimits
from gtcpserver.admission import shared_clients
from gtcpserver.admission.shared_clients import SharedClients
from gtcpserver.proxy import buckets, passwords
from gtcpserver.proxy.buckets import SharedBucket, TokenBucket
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.passwords import Failures
from gtcpserver.shared.column import MOST_DIGESTS, SEEN, SPENT, Column
from gtcpserver.shared.memory import CLAIMED, LEAST_COLUMNS, WAYS, WORDS, SharedMemory, clients_of, columns_for, size_of

ADA, BOB = ("192.0.2.1", 1), ("192.0.2.2", 1)


@pytest.fixture
def memory():
    made = SharedMemory.make(4)
    made.words[CLAIMED] = 4
    yield made
    made.close()


@pytest.fixture
def small(monkeypatch):
    """A memory of one set: WAYS clients in each column."""
    monkeypatch.setattr("gtcpserver.shared.memory.LEAST_CLIENTS", WAYS)
    monkeypatch.setattr("gtcpserver.shared.memory.MOST_CLIENTS", WAYS)
    made = SharedMemory.make(4)
    made.words[CLAIMED] = 4
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch):
    at = [10**12]
    for module in (shared_clients, passwords, buckets):
        monkeypatch.setattr(module, "now", lambda: at[0])
        if hasattr(module, "monotonic"):
            monkeypatch.setattr(module, "monotonic", lambda: at[0] / 1e9)
    monkeypatch.setattr("gtcpserver.admission.client_limits.monotonic", lambda: at[0] / 1e9)

    def go_on(seconds):
        at[0] += int(seconds * 1e9)

    return go_on


def limits_of(memory, count=4, **options):
    """The limits of so many processes."""
    made = [ClientLimits(**options) for _ in range(count)]
    for number, limits in enumerate(made):
        limits.share(Column(memory, number), "clients")
    return made


def test_connections_are_counted_over_all_processes(memory):
    limits = limits_of(memory, connections=3)
    assert [limits[n].enter(ADA) for n in (0, 1, 2)] == [None, None, None]
    assert [one.enter(ADA) for one in limits] == ["client_connections"] * 4
    assert limits[3].enter(BOB) is None
    limits[1].leave(ADA)
    assert [limits[n].enter(ADA) for n in (3, 2)] == [None, "client_connections"]
    for number in (0, 2, 3):
        limits[number].leave(ADA)
    limits[3].leave(BOB)
    assert [one.counted for one in limits] == [0, 0, 0, 0]
    assert [one.enter(ADA) for one in limits] == [None, None, None, "client_connections"]


def test_an_ipv6_client_is_its_64_for_all_processes(memory):
    one, other, _, _ = limits_of(memory, connections=1)
    assert one.enter(("2001:db8::1", 1, 0, 0)) is None
    assert other.enter(("2001:db8::ffff:2", 1, 0, 0)) == "client_connections"
    assert other.enter(("2001:db8:0:1::1", 1, 0, 0)) is None


def test_a_client_that_a_balancer_names_is_counted_for_all_processes(memory, clock):
    one, other, _, _ = limits_of(memory, connections=1, new_per_second=1)
    balancer = ("192.0.2.99", 1)
    assert one.enter(balancer) is None
    assert one.move(balancer, ADA) is None
    assert other.enter(ADA) == "client_connections"
    assert other.enter(balancer) is None  # it has its token back
    assert other.move(balancer, ADA) == "client_connections"
    other.leave(ADA)  # was not counted
    one.leave(ADA)
    clock(1)
    assert other.enter(ADA) is None


def test_limits_with_two_names_count_apart(memory):
    one, other = ClientLimits(connections=1), ClientLimits(connections=1)
    one.share(Column(memory, 0), "one")
    other.share(Column(memory, 0), "other")
    assert [one.enter(ADA), other.enter(ADA)] == [None, None]
    assert [one.enter(ADA), other.enter(ADA)] == ["client_connections"] * 2


def test_what_a_dead_process_had_open_counts_no_more_but_the_rate_does(memory, clock):
    limits = limits_of(memory, connections=2, new_per_second=0.001, burst=3)
    assert [limits[0].enter(ADA), limits[0].enter(ADA)] == [None, None]
    assert limits[1].enter(ADA) == "client_connections"
    memory.begin_epoch(0)  # as the master does
    assert [limits[1].enter(ADA), limits[1].enter(ADA)] == [None, "client_rate"]
    # A successor in this column begins with nothing open, and knows the rate.
    successor = ClientLimits(connections=2, new_per_second=0.001, burst=3)
    successor.share(Column(memory, 0), "clients")
    assert successor.enter(ADA) == "client_rate"
    clock(1001)
    assert [successor.enter(ADA), limits[1].enter(ADA)] == [None, "client_connections"]


def test_the_rate_is_that_of_one_token_bucket_whoever_asks(memory, clock):
    chance = random.Random(5)
    for number in range(20):
        rate, burst = chance.choice((0.5, 3, 50)), chance.choice((1, 2, 10))
        alone = ClientLimits(new_per_second=rate, burst=burst)
        limits = [ClientLimits(new_per_second=rate, burst=burst) for _ in range(4)]
        for column, one in enumerate(limits):
            one.share(Column(memory, column), f"clients {number}")
        for _ in range(100):
            # Not at the moment at which a token comes back: both are right about it.
            clock(chance.choice((0, 0, 0.1003, 1.0007, 3.001, 0.37)) / rate)
            assert chance.choice(limits).enter(ADA) == alone.enter(ADA)


def test_bytes_of_a_user_are_those_of_one_bucket(memory, clock):
    chance = random.Random(6)
    alone = TokenBucket(1000)
    shared = [SharedBucket(Column(memory, column), b"ada", 1000) for column in range(4)]
    for _ in range(300):
        clock(chance.choice((0, 0, 0.01, 1, 40)))
        size = chance.choice((0, 10, 1000, 30000))
        assert chance.choice(shared).spend(size) == pytest.approx(alone.spend(size), abs=1e-6)


def test_users_and_all_connections_of_a_proxy(memory):
    keepers = [LimitKeeper(Limits(connections=3, user_connections=2)) for _ in range(2)]
    for number, keeper in enumerate(keepers):
        keeper.share(Column(memory, number))
    assert [keeper.enter_user("ada") for keeper in (*keepers, *keepers)] == ["", "", *["user_connections"] * 2]
    keepers[0].leave_user("ada")
    assert keepers[1].enter_user("ada") == ""
    assert [keeper.enter(ADA) for keeper in (*keepers, *keepers)] == ["", "", "", "connections"]
    keepers[1].leave(ADA)
    assert keepers[0].enter(BOB) == ""


def test_wrong_passwords_count_as_in_one_process(memory, clock):
    chance = random.Random(7)
    clients = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]
    alone, shared = Failures(), [Failures() for _ in range(4)]
    for number, one in enumerate(shared):
        one.share(Column(memory, number), "users")
    seen = set()
    for _ in range(3000):
        clock(chance.choice((0, 1, 20, 250, 299, 302)) if chance.random() < 0.3 else 0)
        client, user, one = chance.choice(clients), chance.choice((b"ada", b"bob")), chance.choice(shared)
        assert one.may_try(client) == alone.may_try(client)
        seen.add(alone.may_try(client))
        if alone.may_try(client):
            if chance.random() < 0.2:
                one.forget(client, user)
                alone.forget(client, user)
            else:
                assert one.note(client, user) == alone.note(client, user)
    assert seen == {True, False}


def test_the_client_seen_longest_ago_goes_but_not_one_with_connections(small, clock):
    column = Column(small, 0)
    clients = SharedClients(column, 1, 0.001, 1)
    names = [f"client {number}".encode() for number in range(WAYS + 2)]
    assert clients.enter(names[0]) is None
    for name in names[1:WAYS]:
        clock(0.01)
        assert clients.enter(name) is None
        clients.leave(name)
    clock(0.01)
    assert clients.enter(names[1]) == "client_rate"  # seen again
    clock(0.01)
    assert clients.enter(names[WAYS]) is None
    there = [name for name in names if column.find(name)[2] >= 0]
    assert there == [names[0], names[1], *names[3 : WAYS + 1]]


def test_clients_beyond_the_table_are_still_counted_by_their_process(small):
    limits, other = limits_of(small, 2, connections=2)
    clients = [(f"192.0.2.{number}", 1) for number in range(3 * WAYS)]
    for client in clients * 2:
        assert limits.enter(client) is None
    assert all(limits.enter(client) == "client_connections" for client in clients)
    assert [other.enter(client) for client in clients].count("client_connections") == WAYS
    for client in clients * 2:
        limits.leave(client)
    assert limits.counted == 0
    assert [other.enter(client) for client in clients] == [None] * len(clients)


def test_digests_that_are_remembered_are_bounded(memory):
    column = Column(memory, 0)
    for number in range(MOST_DIGESTS + 10):
        column.find(b"%d" % number)
    assert len(column.digests) <= MOST_DIGESTS


def test_garbage_of_a_compromised_process_is_survived(small, clock):
    """It may refuse clients or admit them, for a time; nothing fails."""
    memory = small
    chance = random.Random(8)
    limits = limits_of(memory, connections=2, new_per_second=1, burst=2)
    keeper = LimitKeeper(Limits(connections=2, user_rate=1))
    keeper.share(Column(memory, 2))
    failures = Failures()
    failures.share(Column(memory, 2), "users")
    for extreme in (0, -1, 2**63 - 1, -(2**63), None):
        for one in limits:
            one.enter(ADA)  # so that there are entries to damage
        for place in (CLAIMED, *range(memory.epochs_at, len(memory.words))):
            if (memory.words[place] and place >= memory.entries_at) or place < memory.tags_at:
                memory.words[place] = chance.getrandbits(64) - 2**63 if extreme is None else extreme
        for one in limits:
            assert one.enter(ADA) in (None, "client_connections", "client_rate")
            one.leave(ADA)
        assert keeper.enter(ADA) in ("", "connections")
        pace = keeper.pace("ada", None)
        assert pace is not None
        assert pace(100) >= 0
        failures.note(ip_address("192.0.2.1"), b"ada")
        failures.forget(ip_address("192.0.2.1"), b"ada")
        assert failures.may_try(ip_address("192.0.2.1")) in (True, False)
        clock(10)


def test_the_size_of_the_memory():
    assert [columns_for(workers) for workers in (1, 4, 5, 64, 1024)] == [LEAST_COLUMNS, 16, 32, 256, 4096]
    assert [clients_of(columns) for columns in (16, 64, 256, 4096)] == [65536, 16384, 4096, 4096]
    assert size_of(16, 65536 // WAYS) < 41 * 2**20


def test_an_empty_memory_takes_none(memory):
    with open("/proc/self/smaps") as file:
        lines = file.read().split("\n")
    at = next(number for number, line in enumerate(lines) if "memfd:gtcpserver" in line)
    resident = next(line for line in lines[at:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) <= 16, resident  # KiB
    assert os.fstat(memory.fd).st_size > 40 * 2**20


def test_counts_that_are_about_to_overflow_fail_nothing(small, clock):
    """In each later process, too: the memory outlives the one that has damaged it."""
    limits = limits_of(small, count=1, new_per_second=1, burst=5)[0]
    column = Column(small, 0)
    failures = Failures()
    failures.share(Column(small, 2), "users")
    for extreme in (2**63 - 1, -(2**63)):
        assert limits.enter(ADA) is None
        failures.note(ip_address("192.0.2.1"), b"ada")
        for entry in range(small.entries_at, len(small.words), WORDS):
            if small.words[entry + SEEN]:
                small.words[entry + SPENT] = extreme
        small.words[small.number_at("accepted")] = extreme
        assert limits.enter(ADA) in (None, "client_rate")
        failures.note(ip_address("192.0.2.1"), b"ada")
        failures.forget(ip_address("192.0.2.1"), b"ada")
        column.add("accepted", 1)
        assert column.number("accepted") >= 0
        clock(10)
