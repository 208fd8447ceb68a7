"""`HandlerPool(size, keep=N)`: idle greenlets that stay."""

import gevent
import pytest

from gtcpserver import ConfigError, HandlerPool
from kit.handlers import echo
from kit.waiting import wait_until


def burst(pool, count):
    """Runs so many functions at the same time, and returns the greenlets that ran them."""
    found = []

    def function(event):
        found.append(gevent.getcurrent())
        event.wait()

    event = gevent.event.Event()
    gevent.get_hub().loop.run_callback(lambda: [pool.run_one(function, event) for _ in range(count)])
    wait_until(lambda: len(found) == count)
    event.set()
    wait_until(lambda: len(pool._runner.waiting) >= count)
    return [id(one) for one in found]


@pytest.mark.parametrize(("keep", "left"), [(0, 0), (3, 3), (10, 5)])
def test_so_many_idle_greenlets_stay(keep, left):
    pool = HandlerPool(keep=keep)
    before = set(burst(pool, 5))
    for _ in range(3):
        if pool._runner.retire_timer is not None:
            pool._runner.retire_unused()  # as the timer does
    gevent.sleep(0)
    assert len(pool._runner.waiting) == left
    assert (pool._runner.retire_timer is not None) == bool(left)
    if left:
        assert len(before & set(burst(pool, left))) == left
    pool.retire_waiting()


def test_a_stop_ends_them(serve, connect):
    pool = HandlerPool(10, keep=5)
    server = serve(echo, pool=pool)
    with connect(server):
        wait_until(lambda: server.active_connections)
    wait_until(lambda: pool._runner.waiting)
    server.stop(5)
    pool._runner.retire_unused()
    assert not pool._runner.waiting
    assert pool._runner.retire_timer is None


@pytest.mark.parametrize("keep", [-1, None, 1.5])
def test_a_number_of_greenlets(keep):
    with pytest.raises(ConfigError, match="keep must be a whole number from 0"):
        HandlerPool(keep=keep)
