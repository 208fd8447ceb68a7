"""run_coroutine: coroutines of asyncio in handlers, many at a time, in one event loop in a thread."""

import asyncio
import contextvars
import os
import re
import signal
import subprocess
import sys
import textwrap
import traceback

import gevent
import pytest
from gevent.hub import get_hub

from gtcpserver import ConfigError, GtcpServerError, run_coroutine
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_for_port, wait_until

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a coroutine that was never awaited

user = contextvars.ContextVar("user", default="nobody")


async def add(one, other):
    await asyncio.sleep(0)
    return one + other


class Waiting:
    """`run()` waits until it is cancelled."""

    def __init__(self):
        self.begun = self.cancelled = False

    async def run(self):
        self.begun = True
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class Barrier:
    """asyncio.Barrier, which Python 3.10 has not."""

    def __init__(self, parties):
        self.missing = parties
        self.all_there = asyncio.Event()

    async def wait(self):
        self.missing -= 1
        if not self.missing:
            self.all_there.set()
        await self.all_there.wait()


def test_it_returns_what_the_coroutine_returns():
    assert run_coroutine(add(1, 2)) == 3
    assert run_coroutine(add("a", "b"), timeout=SOON) == "ab"


def test_it_raises_what_the_coroutine_raises_and_the_traceback_shows_where():
    async def divide(number):
        return 1 / number

    with pytest.raises(ZeroDivisionError) as raised:
        run_coroutine(divide(0))
    assert "in divide" in "".join(traceback.format_tb(raised.tb))


def test_all_run_in_one_event_loop_that_is_not_this_thread():
    async def where():
        return asyncio.get_running_loop()

    assert run_coroutine(where()) is run_coroutine(where())
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()


def test_the_coroutine_has_the_callers_context():
    async def who():
        return user.get()

    def call(name):
        user.set(name)
        return run_coroutine(who())

    calls = [gevent.spawn(call, name) for name in ("ada", "grace")]
    gevent.joinall(calls)
    assert [one.value for one in calls] == ["ada", "grace"]
    assert user.get() == "nobody"


def test_others_run_meanwhile():
    met = None

    async def meet():
        nonlocal met
        met = met or Barrier(8)
        await met.wait()

    calls = [gevent.spawn(run_coroutine, meet(), SOON) for _ in range(8)]
    gevent.joinall(calls, raise_error=True)


# -- ends before the end ----------------------------------------------------------------------------------------------


def test_a_time_out_cancels_the_coroutine():
    waiting = Waiting()
    with pytest.raises(TimeoutError, match=r"Waiting.run was not done within 0.02 s"):
        run_coroutine(waiting.run(), timeout=0.02)
    wait_until(lambda: waiting.cancelled)


def test_a_kill_cancels_the_coroutine_and_does_not_wait_for_it():
    waiting = Waiting()
    caller = gevent.spawn(run_coroutine, waiting.run())
    wait_until(lambda: waiting.begun)
    caller.kill(timeout=SOON)
    assert caller.dead
    wait_until(lambda: waiting.cancelled)


def test_the_end_of_a_server_cancels_the_coroutines_of_its_handlers(serve, connect, caplog):
    waiting = Waiting()
    server = serve(lambda conn: run_coroutine(waiting.run()))
    connect(server)
    wait_until(lambda: waiting.begun)
    report = server.stop(timeout=0)
    assert len(report.cut) == 1
    assert report.cut[0].ended
    wait_until(lambda: waiting.cancelled)
    assert server.stats().handler_errors == 0


def test_a_coroutine_that_was_late_is_a_fault_of_the_handler(serve, connect, in_thread, caplog):
    server = serve(lambda conn: run_coroutine(Waiting().run(), timeout=0.01))
    assert in_thread(connect(server).recv, 1) == b""
    wait_until(lambda: server.stats().handler_errors == 1)
    assert "was not done within 0.01 s" in caplog.text


def test_a_coroutine_that_is_cancelled_in_the_loop_says_so():
    async def cancel_itself():
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancel_itself(), timeout=SOON)


def test_the_loop_survives_what_ends_those_of_others(caplog):
    async def leave(status):
        sys.exit(status)

    async def leave_in_a_task():
        task = asyncio.create_task(leave(4))
        await asyncio.wait([task])
        return type(task.exception())

    with pytest.raises(SystemExit):
        run_coroutine(leave(3), timeout=SOON)
    assert run_coroutine(leave_in_a_task(), timeout=SOON) is SystemExit
    assert run_coroutine(add(1, 2), timeout=SOON) == 3


# -- wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [add, None, 3, "add"], ids=["function", "None", "3", "text"])
def test_what_is_no_coroutine_is_refused(wrong):
    with pytest.raises(TypeError, match=r"coroutine must be what a call of an async function returns, got") as raised:
        run_coroutine(wrong)
    assert ("call it first" in str(raised.value)) == callable(wrong)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_time_out_that_is_none_is_refused(timeout):
    with pytest.raises(ConfigError, match=r"timeout must be a number, more than 0, or None to wait forever, got"):
        run_coroutine(add(1, 2), timeout=timeout)


def test_a_coroutine_cannot_wait_for_its_own_event_loop():
    async def wait_for_itself():
        run_coroutine(add(1, 2))

    with pytest.raises(GtcpServerError, match="await the coroutine"):
        run_coroutine(wait_for_itself(), timeout=SOON)


def test_a_callback_of_the_event_loop_cannot_wait():
    errors = []

    def callback():
        try:
            run_coroutine(add(1, 2))
        except AssertionError as error:
            errors.append(error)

    get_hub().loop.run_callback(callback)
    wait_until(lambda: errors)


# -- processes ---------------------------------------------------------------------------------------------------------

PATCH = "from gevent import monkey; monkey.patch_all()\n"


def run(python, source, patched):
    """Run a program; what it has written."""
    process = python((PATCH if patched else "") + textwrap.dedent(source), stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=SOON)
    assert process.returncode == 0, output.decode()
    return output.decode()


both = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


@pytest.mark.slow
@both
def test_handlers_talk_to_a_server_by_asyncios_streams_all_at_once(python, patched):
    source = """
        import asyncio, gevent, gevent.socket, time
        from gtcpserver import Server, connect, run_coroutine

        waiting = []

        def upstream(conn):  # answers when all are there
            waiting.append(conn.recv_until(b"\\n"))
            while len(waiting) < 8:
                gevent.sleep(0.001)
            conn.sendall(b"hello " + waiting[-1])

        async def ask(port):
            reader, writer = await asyncio.open_connection("localhost", port)
            writer.write(b"you\\n")
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
            return line

        def handle(conn):
            conn.sendall(run_coroutine(ask(behind.port), timeout=10))

        def client():
            with connect(server.address) as conn:
                return conn.recv_until(b"\\n")

        with Server("127.0.0.1:0", upstream) as behind, Server("127.0.0.1:0", handle) as server:
            clients = [gevent.spawn(client) for _ in range(8)]
            gevent.joinall(clients, raise_error=True)
            print({one.value for one in clients}, server.stats().handler_errors)
    """
    assert run(python, source, patched) == "{b'hello you\\n'} 0\n"


@pytest.mark.slow
@both
def test_a_thread_of_asyncio_and_a_look_up_work(python, patched):
    source = """
        import asyncio, time
        from gtcpserver import run_coroutine

        async def both():
            found = await asyncio.get_running_loop().getaddrinfo("localhost", 80)
            await asyncio.to_thread(time.sleep, 0.01)
            return len(found) > 0

        print(run_coroutine(both(), timeout=10))
    """
    assert run(python, source, patched) == "True\n"


@pytest.mark.slow
def test_the_process_ends_after_the_threads_that_have_an_event_loop(python):
    # A thread that lost the race made Python abort: "terminate called without an active exception".
    source = """
        import asyncio, time
        from gevent.hub import Hub
        from gevent.monkey import get_original
        from gtcpserver import run_coroutine

        def destroy(hub, destroy_loop=False, destroy=Hub.destroy):
            get_original("time", "sleep")(0.3)
            destroy(hub, destroy_loop)
            print("destroyed", flush=True)

        Hub.destroy = destroy
        run_coroutine(asyncio.to_thread(time.sleep, 0.01))
        print("exit", flush=True)
    """
    assert run(python, source, True) == "exit\ndestroyed\n"


@pytest.mark.slow
@both
def test_what_is_under_way_when_the_process_ends_is_cancelled(python, patched):
    source = """
        import asyncio
        from gtcpserver import run_coroutine

        async def for_ever():
            try:
                await asyncio.sleep(60)
            finally:
                print("ended", flush=True)

        async def begin():
            global task
            task = asyncio.create_task(for_ever())
            await asyncio.sleep(0)

        run_coroutine(begin())
        print("exit", flush=True)
    """
    assert run(python, source, patched) == "exit\nended\n"


@pytest.mark.slow
@both
def test_what_will_not_end_delays_the_end_of_the_process_for_a_bounded_time(python, patched):
    source = """
        import asyncio
        from gtcpserver import coroutines, run_coroutine

        coroutines.TIME_TO_END = 0.05

        async def for_ever():
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass

        async def begin():
            global task
            task = asyncio.create_task(for_ever())
            await asyncio.sleep(0)

        run_coroutine(begin())
    """
    run(python, source, patched)


@pytest.mark.slow
@both
def test_a_forked_child_has_a_loop_of_its_own(python, patched):
    source = """
        import asyncio, os, warnings
        from gtcpserver import run_coroutine

        async def pid():
            await asyncio.sleep(0)
            return os.getpid()

        assert run_coroutine(pid(), timeout=10) == os.getpid()
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, since Python 3.12
        child = os.fork()
        assert run_coroutine(pid(), timeout=10) == os.getpid()
        if not child:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert run_coroutine(pid(), timeout=10) == os.getpid()
    """
    assert run(python, source, patched) == "7\n"


@pytest.mark.slow
@both
def test_without_descriptors_it_fails_and_works_again_when_there_are_some(python, patched):
    source = """
        import asyncio, gc, os, resource
        from gtcpserver import run_coroutine

        async def number():
            return 7

        import gevent; gevent.get_hub()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(map(int, os.listdir("/proc/self/fd")))
        for more in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most + more, limits[1]))
            try:
                run_coroutine(number())
            except OSError as error:
                print(error.errno)
            gc.collect()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        print(run_coroutine(number()))
    """
    output = run(python, source, patched)
    assert output.splitlines()[0] == "24"
    assert output.splitlines()[-1] == "7"


@pytest.mark.slow
def test_each_worker_has_one(python, tmp_path, in_thread, connect):
    (tmp_path / "app.py").write_text(
        textwrap.dedent("""
        import asyncio, os
        from gtcpserver import run_coroutine

        async def nothing():
            await asyncio.sleep(0)

        run_coroutine(nothing())  # before the workers are forked

        def handle(conn):
            run_coroutine(nothing(), timeout=10)
            conn.sendall(b"%d\\n" % os.getpid())
        """)
    )
    port = free_port()
    command = [sys.executable, "-m", "gtcpserver", "serve", "app:handle", "--bind", f"127.0.0.1:{port}"]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--preload"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        in_thread(wait_for_port, port, process)
        pids = {in_thread(connect(f"127.0.0.1:{port}").recv, 100) for _ in range(20)}
        assert all(re.fullmatch(rb"\d+\n", pid) for pid in pids)
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = in_thread(process.communicate)
    assert process.returncode == 0, log.decode()
    assert not re.search(rb"Traceback|ERROR", log), log.decode()
