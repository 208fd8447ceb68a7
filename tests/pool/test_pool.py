"""HandlerPool: greenlets used again without one connection reaching the next, and a size that can change."""

import contextvars
import gc
import subprocess
import sys
import threading
import weakref

import gevent
import gevent.event
import gevent.local
import gevent.pool
import gevent.pywsgi
import gevent.server
import gevent.socket
import pytest
from gevent.hub import get_hub
from greenlet import getcurrent

from gtcpserver import HandlerPool
from gtcpserver.pool import greenlets
from gtcpserver.pool.places import Places
from kit.patience import SOON
from kit.waiting import wait_until


def run(pool, function, *args):
    """pool.run as a server calls it: in the hub. Returns when the function first waits or has ended."""
    done = []

    def in_hub():
        pool.run(function, *args)
        done.append(1)

    get_hub().loop.run_callback(in_hub)
    wait_until(lambda: done)


def result_of(pool, function, *args):
    results = []
    run(pool, lambda: results.append(function(*args)))
    wait_until(lambda: results)
    return results[0]


def worker_number():
    # Not the greenlet itself: a worker that somebody holds is not used again.
    return id(getcurrent())


@pytest.fixture
def pool():
    pool = HandlerPool(100)
    yield pool
    pool.kill()


# -- greenlets are used again --------------------------------------------------------------------------------------


def test_run_uses_greenlets_again(pool):
    assert len({result_of(pool, worker_number) for _ in range(5)}) == 1


def test_run_makes_as_many_greenlets_as_run_at_once(pool):
    gate = gevent.event.Event()
    numbers = set()

    def handler():
        numbers.add(worker_number())
        gate.wait()

    for _ in range(3):
        run(pool, handler)
    assert len(numbers) == len(pool) == 3
    gate.set()
    pool.join(SOON)
    for _ in range(3):
        run(pool, handler)
    pool.join(SOON)
    assert len(numbers) == 3


@pytest.mark.slow
def test_workers_without_work_retire(monkeypatch):
    monkeypatch.setattr(greenlets, "IDLE_GREENLET_SECONDS", 0.02)
    pool = HandlerPool()
    gate = gevent.event.Event()
    workers = []

    def handler():
        workers.append(weakref.ref(getcurrent()))
        gate.wait()

    for _ in range(5):
        run(pool, handler)
    gate.set()
    pool.join(SOON)
    assert len(pool._runner.waiting) == 5
    wait_until(lambda: not pool._runner.waiting and pool._runner.retire_timer is None)
    wait_until(lambda: gc.collect() >= 0 and not any(worker() for worker in workers))
    assert result_of(pool, lambda: "works") == "works"


def test_a_worker_that_is_needed_now_and_then_does_not_retire():
    pool = HandlerPool()
    for _ in range(5):
        assert result_of(pool, lambda: "works") == "works"
        pool._runner.retire_unused()  # as the timer does
        assert len(pool._runner.waiting) == 1
    pool._runner.retire_unused()
    assert pool._runner.waiting == []


@pytest.mark.slow
def test_idle_workers_keep_no_program_alive():
    source = """
import gevent
from gtcpserver import HandlerPool
pool = HandlerPool()
gevent.get_hub().loop.run_callback(pool.run, print, "ran")
gevent.wait()
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON)
    assert (result.stdout, result.stderr, result.returncode) == ("ran\n", "", 0)


# -- nothing of one run reaches the next ---------------------------------------------------------------------------


def test_contextvars_do_not_leak(pool):
    variable = contextvars.ContextVar("variable", default="clean")

    def handler():
        before = variable.get()
        variable.set("dirty")
        gevent.sleep(0)
        return worker_number(), before

    assert {result_of(pool, handler) for _ in range(3)} == {(result_of(pool, worker_number), "clean")}


@pytest.mark.slow
def test_gevent_locals_do_not_leak(pool):
    local = gevent.local.local()

    class Data:
        pass

    kept = []

    def handler():
        before = getattr(local, "data", None)
        local.data = Data()
        kept.append(weakref.ref(local.data))
        gevent.sleep(0)
        return worker_number(), before

    results = {result_of(pool, handler) for _ in range(3)}
    assert results == {(result_of(pool, worker_number), None)}
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def test_attributes_of_the_greenlet_do_not_leak(pool):
    def handler():
        me = getcurrent()
        before = dict(me.__dict__)
        me.user = "somebody"
        return before

    assert [result_of(pool, handler) for _ in range(3)] == [{}, {}, {}]


@pytest.mark.slow
def test_monkey_patched_thread_data_does_not_leak():
    source = """
from gevent import monkey; monkey.patch_all()
import threading, gevent
from gtcpserver import HandlerPool
pool = HandlerPool()
local = threading.local()
seen = []
def handler():
    seen.append((id(gevent.getcurrent()), getattr(local, "data", None), threading.current_thread().name))
    threading.current_thread().name = "mine"
    local.data = "dirty"
    gevent.sleep(0)
before = len(threading._active)
for _ in range(3):
    gevent.get_hub().loop.run_callback(pool.run, handler)
    gevent.sleep(0.01)
assert len({number for number, data, name in seen}) == 1, seen
assert [data for number, data, name in seen] == [None] * 3, seen
assert "mine" not in [name for number, data, name in seen], seen
assert len(threading._active) == before, threading._active
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON)
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_timeout_never_cancelled_does_not_hit_the_next(pool):
    def careless():
        gevent.Timeout.start_new(0.02)
        return worker_number()

    ended = []

    def next_one():
        gevent.sleep(0.05)
        ended.append("well")

    first = result_of(pool, careless)
    run(pool, next_one)
    wait_until(lambda: ended)
    assert first is not None


def test_a_timeout_never_cancelled_of_a_worker_that_waits_is_harmless(pool):
    assert result_of(pool, lambda: gevent.Timeout.start_new(0.01) and "started") == "started"
    gevent.sleep(0.03)
    assert pool._runner.waiting == []
    assert result_of(pool, lambda: "works") == "works"


@pytest.mark.parametrize("how", ["kill", "throw"])
def test_a_greenlet_kept_and_killed_later_is_not_the_next_connection(pool, how):
    kept = []
    run(pool, lambda: kept.append(getcurrent()))
    ended = []

    def next_one():
        gevent.sleep(0.02)
        ended.append(getcurrent() is kept[0])

    run(pool, next_one)
    if how == "kill":
        kept[0].kill()
        gevent.kill(kept[0])
    else:
        get_hub().loop.run_callback(kept[0].throw)
    wait_until(lambda: ended)
    assert ended == [False]


def test_a_kill_that_comes_after_its_function_has_ended_does_not_hit_the_next_one(pool):
    how = []

    def killed_late():
        getcurrent().kill(block=False)  # at the hub's next turn, when this function has ended

    def next_one():
        try:
            gevent.sleep(0.02)
        finally:
            how.append(sys.exc_info()[0])

    def in_hub():
        pool.run(killed_late)
        pool.run(next_one)

    get_hub().loop.run_callback(in_hub)
    wait_until(lambda: how)
    assert how == [None]


def test_a_kept_greenlet_can_be_killed_while_it_runs(pool):
    kept, ended = [], []

    def handler():
        kept.append(getcurrent())
        try:
            gevent.sleep(SOON)
        finally:
            ended.append(sys.exc_info()[0])

    run(pool, handler)
    assert not kept[0].ready()
    kept[0].kill(timeout=SOON)
    assert ended == [gevent.GreenletExit]
    assert kept[0].ready()
    assert len(pool) == 0
    run(pool, handler)
    kept[1].kill(ValueError, block=False)
    wait_until(lambda: len(ended) == 2)
    assert ended[1] is ValueError


def test_rawlink_link_and_join_mean_the_function_that_runs_now(pool):
    kept, told = [], []
    gate = gevent.event.Event()

    def handler():
        kept.append(getcurrent())
        gate.wait()

    run(pool, handler)
    worker = kept.pop()
    worker.rawlink(lambda who: told.append(("rawlink", who)))
    worker.link(lambda who: told.append(("link", who)))
    unwanted = told.append
    worker.rawlink(unwanted)
    worker.unlink(unwanted)
    worker.join(0.01)
    assert told == []
    joining = gevent.spawn(worker.join)
    waiting = gevent.spawn(gevent.wait, [worker], SOON)
    gevent.sleep(0.01)
    gate.set()
    joining.get(timeout=SOON)
    assert waiting.get(timeout=SOON) == [worker]
    wait_until(lambda: len(told) == 2)
    assert told == [("rawlink", worker), ("link", worker)]
    worker.rawlink(lambda who: told.append("late"))
    worker.join()
    wait_until(lambda: told[-1] == "late")


def test_a_link_that_fails_is_reported_and_harms_nobody(pool, monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(value))
    told = []

    def handler():
        getcurrent().rawlink(lambda worker: 1 / 0)
        getcurrent().rawlink(lambda worker: told.append(1))

    run(pool, handler)
    assert told == [1]
    assert isinstance(reported[0], ZeroDivisionError)
    assert result_of(pool, lambda: "works") == "works"
    assert pool.free_count() == 100


# -- what a function raises ----------------------------------------------------------------------------------------


def test_an_exception_is_reported_and_the_worker_lives_on(pool, monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(kind))
    number = result_of(pool, worker_number)
    run(pool, lambda: 1 / 0)
    assert reported == [ZeroDivisionError]
    assert result_of(pool, worker_number) == number
    assert (len(pool), pool.free_count()) == (0, 100)


def test_greenlet_exit_ends_quietly(pool, monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda *error: reported.append(error))

    def handler():
        raise gevent.GreenletExit

    run(pool, handler)
    assert reported == []
    assert result_of(pool, lambda: "works") == "works"


@pytest.mark.slow
def test_system_exit_ends_the_program_as_it_does_in_gevent_spawn():
    source = """
import sys, gevent
from gtcpserver import HandlerPool
pool = HandlerPool()
gevent.get_hub().loop.run_callback(pool.run, sys.exit, 3)
try:
    gevent.sleep(20)
except SystemExit as asked:
    gevent.get_hub().loop.run_callback(pool.run, print, "still works")
    gevent.sleep(0.01)
    assert len(pool) == 0
    raise
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON)
    assert (result.stdout, result.returncode) == ("still works\n", 3), result.stderr


# -- gevent's pool ---------------------------------------------------------------------------------------------------


def test_it_is_gevents_pool(pool):
    assert isinstance(pool, gevent.pool.Pool)
    assert pool.map(lambda x: x * 2, range(5)) == [0, 2, 4, 6, 8]
    assert list(pool.imap(lambda x: x + 1, range(5))) == [1, 2, 3, 4, 5]
    assert sorted(pool.imap_unordered(lambda x: x + 1, range(5))) == [1, 2, 3, 4, 5]
    assert pool.apply(divmod, (7, 2)) == (3, 1)
    assert pool.apply_async(divmod, (7, 2)).get(timeout=SOON) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.apply(divmod, (1, 0))
    spawned = pool.spawn(lambda: "spawned")
    assert spawned.get(timeout=SOON) == "spawned"
    assert pool.join(SOON)
    assert pool.free_count() == 100
    # Within one of its own workers apply calls directly: a full pool must not wait for itself.
    assert result_of(pool, lambda: pool.apply(worker_number) == worker_number())


def test_workers_and_spawned_greenlets_count_alike():
    pool = HandlerPool(3)
    gate = gevent.event.Event()
    run(pool, gate.wait)
    spawned = pool.spawn(gate.wait)
    assert (len(pool), pool.free_count(), pool.full()) == (2, 1, False)
    assert spawned in pool
    run(pool, gate.wait)
    assert (len(pool), pool.free_count(), pool.full()) == (3, 0, True)
    assert spawned in list(pool)
    assert not pool.join(timeout=0.01)
    with pytest.raises(gevent.pool.PoolFull):
        pool.add(gevent.Greenlet(gate.wait), blocking=False)
    assert pool.wait_available(timeout=0.01) == 0
    waiting = gevent.spawn(pool.spawn, lambda: "had a place")
    gevent.sleep(0.01)
    assert not waiting.ready()
    gate.set()
    assert waiting.get(timeout=SOON).get(timeout=SOON) == "had a place"
    assert pool.join(timeout=SOON)
    assert (len(pool), pool.free_count(), list(pool)) == (0, 3, [])


def test_kill_ends_workers_and_spawned_greenlets(pool):
    ended = []

    def handler():
        try:
            gevent.sleep(SOON)
        finally:
            ended.append(1)

    run(pool, handler)
    run(pool, handler)
    pool.spawn(handler)
    gevent.sleep(0)
    pool.kill(timeout=SOON)
    assert ended == [1, 1, 1]
    assert (len(pool), pool.free_count()) == (0, 100)
    run(pool, handler)
    pool.kill(timeout=SOON)
    assert len(ended) == 4


def test_killone(pool):
    kept = []

    def handler():
        kept.append(getcurrent())
        gevent.sleep(SOON)

    run(pool, handler)
    run(pool, handler)
    pool.killone(kept[0], timeout=SOON)
    assert list(pool) == [kept[1]]


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, 1.5, "3", True])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match="pool size must be"):
        HandlerPool(size)
    pool = HandlerPool(5)
    with pytest.raises(ValueError, match="pool size must be"):
        pool.resize(size)
    assert pool.size == 5


def test_no_limit():
    pool = HandlerPool(None)
    gate = gevent.event.Event()
    for _ in range(50):
        run(pool, gate.wait)
    assert (len(pool), pool.full(), pool.free_count() >= 1) == (50, False, True)
    gate.set()
    assert pool.join(SOON)


def test_size_zero_lets_nothing_start():
    pool = HandlerPool(0)
    assert pool.full()
    assert pool.free_count() == 0
    spawning = gevent.spawn(pool.spawn, lambda: 1)
    gevent.sleep(0.01)
    assert not spawning.ready()
    pool.resize(1)
    assert spawning.get(timeout=SOON).get(timeout=SOON) == 1


def test_resize_down_kills_nobody():
    pool = HandlerPool(4)
    gates = [gevent.event.Event() for _ in range(4)]
    for gate in gates:
        run(pool, gate.wait)
    pool.resize(2)
    assert (len(pool), pool.full(), pool.free_count()) == (4, True, 0)
    spawning = gevent.spawn(pool.spawn, lambda: 1)
    for left, gate in zip((3, 2), gates, strict=False):
        gate.set()
        wait_until(lambda left=left: len(pool) == left)
        gevent.sleep(0.01)
        assert pool.full()
        assert not spawning.ready()
    gates[2].set()
    assert spawning.get(timeout=SOON).get(timeout=SOON) == 1
    gates[3].set()
    assert pool.join(SOON)
    assert pool.free_count() == 2


@pytest.mark.parametrize("size", [2, None])
def test_resize_up_wakes_those_that_wait(size):
    pool = HandlerPool(1)
    gate = gevent.event.Event()
    run(pool, gate.wait)
    started = []
    spawning = [gevent.spawn(pool.spawn, lambda: (started.append(1), gate.wait())) for _ in range(3)]
    gevent.sleep(0.01)
    assert started == []
    pool.resize(size)
    wait_until(lambda: len(started) == (1 if size else 3))
    gevent.sleep(0.01)
    assert len(started) == (1 if size else 3)
    gate.set()
    gevent.joinall(spawning, timeout=SOON, raise_error=True)
    assert pool.join(SOON)
    assert len(started) == 3


# -- Places ------------------------------------------------------------------------------------------------------------


def test_places_are_given_in_the_order_asked():
    places = Places(1)
    assert places.acquire()
    order = []

    def wait(number):
        places.acquire()
        order.append(number)
        gevent.sleep(0)
        places.release()

    waiting = []
    for number in range(5):
        waiting.append(gevent.spawn(wait, number))
        gevent.sleep(0)
    assert not places.acquire(blocking=False)
    places.release()
    gevent.joinall(waiting, timeout=SOON, raise_error=True)
    assert order == [0, 1, 2, 3, 4]
    assert (places.taken, places.counter, places.locked()) == (0, 1, False)


def test_a_place_that_became_free_is_not_taken_from_the_one_that_waits_for_it():
    places = Places(1)
    places.acquire()
    order = []

    def wait():
        places.acquire()
        order.append("first")
        places.release()

    waiting = gevent.spawn(wait)
    gevent.sleep(0)
    places.release()  # the one that waits is told when the hub comes to it
    places.acquire()
    order.append("second")
    waiting.get(timeout=SOON)
    assert order == ["first", "second"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_no_place_is_lost_when_those_that_wait_are_killed_or_give_up(seed):
    import random

    choose = random.Random(seed)
    places = Places(2)
    most, running = [0], [0]

    def work():
        if not places.acquire(timeout=choose.choice([None, 0, 0.001, 0.01])):
            return
        try:
            running[0] += 1
            most[0] = max(most[0], running[0])
            gevent.sleep(choose.random() * 0.002)
        finally:
            running[0] -= 1
            places.release()

    workers = []
    for _ in range(200):
        workers.append(gevent.spawn(work))
        if choose.random() < 0.3:
            gevent.sleep(choose.random() * 0.001)
        choose.choice(workers).kill(block=False)
        if choose.random() < 0.1:
            places.resize(choose.choice([1, 2, 3]))
    gevent.joinall(workers, timeout=SOON)
    assert all(worker.dead for worker in workers)
    assert most[0] <= 3
    assert (places.taken, list(places.links)) == (0, [])


def test_a_killed_waiter_does_not_take_the_place_with_it():
    places = Places(1)
    places.acquire()
    first, second = gevent.spawn(places.acquire), gevent.spawn(places.acquire)
    gevent.sleep(0)
    first.kill(block=False)
    places.release()
    assert second.get(timeout=SOON)
    assert places.taken == 1


def test_a_link_that_fails_does_not_keep_others_from_their_place(monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(kind))
    places = Places(1)
    places.acquire()
    places.rawlink(lambda who: 1 / 0)
    waiting = gevent.spawn(places.acquire)
    gevent.sleep(0)
    places.release()
    assert waiting.get(timeout=SOON)
    assert reported == [ZeroDivisionError]


# -- in gevent's own servers -----------------------------------------------------------------------------------------


def test_stock_stream_server_takes_it_as_spawn():
    pool = HandlerPool(1)
    gates = [gevent.event.Event(), gevent.event.Event()]
    begun = []

    def handle(sock, address):
        begun.append(address)
        gates[len(begun) - 1].wait()
        sock.sendall(b"done")

    server = gevent.server.StreamServer(("127.0.0.1", 0), handle, spawn=pool)
    server.start()
    try:
        clients = [gevent.socket.create_connection(server.address) for _ in range(2)]
        wait_until(lambda: begun)
        gevent.sleep(0.02)
        assert len(begun) == 1
        gates[0].set()
        assert clients[0].recv(10) == b"done"
        wait_until(lambda: len(begun) == 2)
        gates[1].set()
        assert clients[1].recv(10) == b"done"
    finally:
        server.stop()
        for client in clients:
            client.close()


def test_stock_wsgi_server_takes_it_as_spawn():
    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ["PATH_INFO"].encode()]

    pool = HandlerPool(2)
    server = gevent.pywsgi.WSGIServer(("127.0.0.1", 0), application, spawn=pool, log=None)
    server.start()
    try:
        for number in range(5):  # more than places: each gives its own back
            with gevent.socket.create_connection(("127.0.0.1", server.server_port)) as client:
                client.sendall(b"GET /%d HTTP/1.0\r\n\r\n" % number)
                answer = b""
                while part := client.recv(1000):
                    answer += part
                assert answer.endswith(b"\r\n\r\n/%d" % number)
    finally:
        server.stop()
    assert pool.free_count() == 2


def test_pools_of_several_threads_are_apart(in_thread):
    def in_other_thread():
        pool = HandlerPool(5)
        seen = []
        get_hub().loop.run_callback(pool.run, lambda: seen.append(threading.get_ident()))
        gevent.sleep(0.01)
        pool.retire_waiting()
        gevent.sleep(0)
        return seen

    assert in_thread(in_other_thread) != [threading.get_ident()]
