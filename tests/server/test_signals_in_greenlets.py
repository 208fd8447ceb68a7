"""serve_forever() in a greenlet, and in a thread: who gets SIGTERM."""

import contextlib
import os
import signal

import pytest

pytestmark = pytest.mark.slow

IN_GREENLET = """
    {patch}
    import gevent, gtcpserver

    def handler(conn):
        print("begun", flush=True)
        conn.server.stopping_event.wait()
        conn.sendall(conn.recv_exactly(3))

    server = gtcpserver.Server("127.0.0.1:0", handler)
    server.start()
    print(server.address, flush=True)
    serving = {spawn}
    report = {result}
    print(report.finished, report.ended, flush=True)
"""

WAYS = {
    "greenlet": ("gevent.spawn(server.serve_forever)", "serving.get()"),
    "two of them": ("gevent.spawn(lambda: gevent.spawn(server.serve_forever).get())", "serving.get()"),
}
PATCH = {"patched": "from gevent import monkey; monkey.patch_all()", "not patched": "pass"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("patch", PATCH)
@pytest.mark.parametrize("way", WAYS)
def test_a_signal_is_a_graceful_stop_in_a_greenlet_too(python, connect, in_thread, way, patch, number):
    spawn, result = WAYS[way]
    process = python(IN_GREENLET.format(patch=PATCH[patch], spawn=spawn, result=result))
    client = connect(process.stdout.readline().decode().strip())
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    client.sendall(b"end")
    assert client.recv(10) == b"end"
    assert client.recv(10) == b""
    client.close()
    output, errors = in_thread(process.communicate)
    assert (process.returncode, output, errors) == (0, b"1 0\n", b"")


IN_THREAD = """
    {patch}
    import gevent, gtcpserver, threading
    from gevent import monkey

    def serve():
        server = gtcpserver.Server("127.0.0.1:0", lambda conn: None)
        gevent.spawn_later(0.1, server.halt)
        print(server.serve_forever().ended, flush=True)

    thread = monkey.get_original("_thread", "start_new_thread")
    done = monkey.get_original("_thread", "allocate_lock")()
    done.acquire()

    def run():
        serve()
        done.release()

    thread(run, ())
    done.acquire()
"""


@pytest.mark.parametrize("patch", PATCH)
def test_another_thread_leaves_signals_alone(python, in_thread, patch):
    process = python(IN_THREAD.format(patch=PATCH[patch]))
    output, errors = in_thread(process.communicate)
    assert (process.returncode, output, errors) == (0, b"0\n", b"")


TWO_SERVERS = """
    from gevent import monkey; monkey.patch_all()
    import gevent, gtcpserver, signal

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    hold = gtcpserver.Server("127.0.0.1:0", lambda conn: conn.recv(1))
    short = gtcpserver.Server("127.0.0.1:0", lambda conn: None)
    gone = gtcpserver.Server("127.0.0.1:0", lambda conn: None)
    serving = [gevent.spawn(server.serve_forever) for server in (gone, hold, short)]
    gevent.sleep(0.05)
    gone.halt()  # whose handlers came first
    serving[0].get()
    print("ready", flush=True)
    print(*[one.get().ended for one in serving], flush=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_servers_of_a_program(python, in_thread, number):
    process = python(TWO_SERVERS)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    output, errors = in_thread(process.communicate)
    assert (process.returncode, output, errors) == (0, b"0 0 0\n", b"")


FORKED = """
    from gevent import monkey; monkey.patch_all()
    import gevent, gtcpserver, os

    def serve(name):
        server = gtcpserver.Server("127.0.0.1:0", lambda conn: None)
        server.start()
        gevent.spawn(print, name, os.getpid(), flush=True)  # when it waits
        return server.serve_forever()

    def in_child():
        child = os.fork()
        if child == 0:
            serve("child")
            os._exit(7)
        return os.waitpid(child, 0)[1]

    parent = gevent.spawn(serve, "parent")
    gevent.sleep(0.05)
    print(os.waitstatus_to_exitcode(in_child()), flush=True)
"""


def test_a_server_in_a_forked_child_has_signals_of_its_own(python, in_thread):
    process = python(FORKED)
    assert process.stdout.readline().split() == [b"parent", str(process.pid).encode()]
    name, pid = process.stdout.readline().split()
    assert name == b"child"
    try:
        os.kill(int(pid), signal.SIGTERM)
        assert process.stdout.readline() == b"7\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
    in_thread(process.communicate)
