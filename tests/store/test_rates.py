"""The rate of a user, and connection attempts, on several machines: against a real Redis."""

import gevent
import pytest

from gtcpserver.proxy import buckets
from gtcpserver.proxy.errors import LimitReached
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.store import store
from gtcpserver.store.store import STORE_FAILURE
from kit.programs import needs
from kit.waiting import wait_until

pytest.importorskip("redis")
pytestmark = needs("redis-server", "redis-cli")

RATE = 1_000_000
ADA, BOB = ("192.0.2.1", 1), ("192.0.2.2", 1)


@pytest.fixture(autouse=True)
def forget_refusals(monkeypatch):
    monkeypatch.setattr(store, "REFUSED_SECONDS", 0.001)


@pytest.fixture
def clock(monkeypatch):
    """The clock of buckets stands still, so that waits tell the rate."""
    monkeypatch.setattr(buckets, "monotonic", lambda: 1000.0)


@pytest.fixture
def keepers(join, monkeypatch):
    """`keepers(url, number, **limits)`: proxies on machines of their own, which renew only when they are told."""
    monkeypatch.setattr(store, "RENEW_SECONDS", 1000)

    def make(url, number=2, on_failure="local", **limits):
        made = [LimitKeeper(Limits(**limits)) for _ in range(number)]
        for keeper in made:
            keeper.share_store(join(url, on_failure=on_failure))
        return made

    return make


def renew(*keepers):
    """A second goes by: shares follow from what was moved."""
    answer(*keepers)
    for keeper in keepers:
        keeper.store.renew()
        answer(keeper)


def answer(*keepers):
    """Wait until all that was asked is answered."""
    for keeper in keepers:
        assert keeper.store.wrong("nobody") is not None


def share_of(pace):
    """Return the bytes per second of a flow: from the time that a piece takes."""
    before = pace(0)
    return 10 * RATE / (pace(10 * RATE) - before)


def test_a_user_on_one_machine_has_the_whole_rate(redis_server, keepers, clock):
    one, _ = keepers(redis_server().url, user_rate=RATE)
    pace = one.pace("ada", None)
    pace(RATE)
    renew(one)
    assert share_of(pace) == pytest.approx(RATE, rel=0.01)


def test_machines_divide_the_rate_of_a_user_evenly_where_all_want_it(redis_server, keepers, clock):
    many = keepers(redis_server().url, 4, user_rate=RATE)
    paces = [keeper.pace("ada", None) for keeper in many]
    for pace in paces:
        pace(RATE)
    renew(*many)
    assert [share_of(pace) for pace in paces] == pytest.approx([RATE / 4] * 4, rel=0.01)
    alone = many[0].pace("bob", None)  # another user
    alone(RATE)
    renew(*many)
    assert share_of(alone) == pytest.approx(RATE, rel=0.01)


def test_a_machine_with_modest_use_leaves_the_rest_to_the_others(redis_server, keepers, clock, monkeypatch):
    one, two = keepers(redis_server().url, user_rate=RATE)
    greedy, modest = one.pace("ada", None), two.pace("ada", None)
    greedy(RATE)
    renew(one, two)  # it wanted it a moment ago
    buckets_clock = iter(range(2000, 10**6, 100))
    monkeypatch.setattr(buckets, "monotonic", lambda: float(next(buckets_clock)))
    for _ in range(3):
        one._rates._since = two._rates._since = store.monotonic() - 1  # noqa: SLF001
        greedy(1000 * RATE)
        for _ in range(10):
            modest(RATE // 100)
        renew(one, two)
    monkeypatch.setattr(buckets, "monotonic", lambda: 10.0**9)
    shares = share_of(greedy), share_of(modest)
    assert sum(shares) == pytest.approx(RATE, rel=0.02)
    assert 0.6 * RATE < shares[0] < 0.9 * RATE


def test_a_machine_that_dies_or_falls_silent_gives_its_share_back(redis_server, keepers, clock):
    server = redis_server()
    one, two, three = keepers(server.url, 3, user_rate=RATE)
    paces = [keeper.pace("ada", None) for keeper in (one, two, three)]
    for pace in paces:
        pace(RATE)
    server.ask("ZREM", "gtcpserver:members", three.store.member)
    renew(one, two)
    renew(two)  # nothing was moved there in the meantime
    paces[0](RATE)
    renew(one)
    assert share_of(paces[0]) == pytest.approx(RATE, rel=0.01)
    renew(one)
    renew(one)
    assert server.ask("--scan", "--pattern", "*flow*") == ""


@pytest.mark.parametrize(("choice", "rate"), [("local", RATE), ("refuse", RATE / 2), ("allow", None)])
def test_what_holds_for_rates_while_redis_is_away(redis_server, keepers, clock, choice, rate):
    server = redis_server()
    one, two = keepers(server.url, user_rate=RATE, on_failure=choice)
    paces = [keeper.pace("ada", None) for keeper in (one, two)]
    for pace in paces:
        pace(RATE)
    renew(one, two)
    server.kill()
    wait_until(lambda: one.store.away)
    if rate is None:
        assert paces[0](100 * RATE) == 0.0
    else:
        assert share_of(paces[0]) == pytest.approx(rate, rel=0.01)
    assert one.enter_user("eve") == (STORE_FAILURE if choice == "refuse" else "")


def test_shares_that_are_none_are_a_failure(redis_server, keepers, monkeypatch):
    monkeypatch.setattr("gtcpserver.proxy.user_rates.SHARES", "return {'nan'}")
    monkeypatch.setattr(store, "SHARES", "return {'nan'}")
    (one,) = keepers(redis_server().url, 1, user_rate=RATE)
    one.pace("ada", None)(0)
    wait_until(lambda: one.store.failures)


def test_attempts_are_limited_for_all_machines(redis_server, keepers):
    one, two = keepers(redis_server().url, connect_attempts=3, client_connect_attempts=2)
    first, second, other = one.attempts_of(ADA), two.attempts_of(ADA), two.attempts_of(BOB)
    first.begin()
    second.begin()
    for attempts in (first, second):
        with pytest.raises(LimitReached, match="client_connect_attempts"):
            attempts.begin()
    other.begin()
    with pytest.raises(LimitReached, match="connect_attempts"):
        other.begin()
    first.end()
    assert (one.attempts, two.attempts) == (0, 2)
    assert not one.attempts_by_client

    def again():
        gevent.sleep(0.002)
        try:
            second.begin()
        except LimitReached:
            return False
        return True

    wait_until(again)


@pytest.mark.parametrize(("choice", "begun"), [("local", 2), ("allow", 4), ("refuse", 0)])
def test_what_holds_for_attempts_while_redis_is_away(keepers, choice, begun):
    (one,) = keepers("redis://127.0.0.1:1", 1, client_connect_attempts=2, on_failure=choice)
    attempts, refused = one.attempts_of(ADA), []
    for _ in range(4):
        try:
            attempts.begin()
        except LimitReached as error:
            refused.append(error.strerror)
    assert one.attempts == begun
    reason = STORE_FAILURE if choice == "refuse" else "client_connect_attempts"
    assert refused == [reason] * (4 - begun)


def test_an_attempt_that_is_given_up_while_redis_is_asked_leaves_no_count(redis_server, keepers):
    server = redis_server()
    (one,) = keepers(server.url, 1, client_connect_attempts=1)
    server.pause()
    waiting = gevent.spawn(one.attempts_of(ADA).begin)
    wait_until(lambda: one.attempts)
    waiting.kill()
    assert one.attempts == 0
    server.go_on()
    wait_until(lambda: server.ask("--scan", "--pattern", "*attempts*") == "")
