"""StreamServer loses nothing that gevent's does: answers, queued connections, requests at SIGTERM."""

import os
import signal
import socket
import struct
import time

import gevent
import gevent.pool
import gevent.socket
import pytest
from gevent.event import Event

from gtcpserver import HandlerPool, StreamServer
from kit.clients import read_all
from kit.patience import SOON
from kit.spawns import answer_of, any_spawn, waiting_spawn
from kit.waiting import wait_until

ANSWER = bytes(range(256)) * 4096  # 1 MiB

# -- answers ----------------------------------------------------------------------------------------------------------


def write_and_return(sock, address):
    sock.sendall(ANSWER)


def write_and_close(sock, address):
    sock.sendall(ANSWER)
    sock.close()


def write_and_raise(sock, address):
    sock.sendall(ANSWER)
    raise ConnectionError("after the answer")


@pytest.mark.slow
@waiting_spawn
@pytest.mark.parametrize("handle", [write_and_return, write_and_close, write_and_raise])
def test_unread_input_costs_the_client_no_byte_of_the_answer(serve_stream, connect, spawn_thread, make_spawn, handle):
    server = serve_stream(handle, spawn=make_spawn())
    for _ in range(20):
        client = connect(server.address_text)
        client.sendall(b"a request that nobody reads" * 1000)
        data, end = spawn_thread(read_all, client).get(timeout=SOON)
        assert (len(data), end) == (len(ANSWER), "end")
        client.close()
    wait_until(lambda: server.stats()["lingering"] == 0)


def test_without_linger_the_socket_is_closed_at_once(serve_stream, connect, in_thread):
    class AsGevents(StreamServer):
        linger = 0

    client = connect(serve_stream(lambda sock, address: sock.sendall(b"x"), server_class=AsGevents).address_text)
    client.sendall(b"unread")
    assert in_thread(read_all, client)[1] == "ECONNRESET"


def test_a_handler_that_has_set_so_linger_resets_as_it_wants(serve_stream, connect, in_thread):
    def handle(sock, address):
        sock.sendall(b"x")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert in_thread(read_all, connect(serve_stream(handle).address_text)) == (b"x", "ECONNRESET")


def test_a_socket_that_a_handler_has_given_away_is_not_shut_down(serve_stream, connect, in_thread):
    """As prefork dispatchers and inetd do it: another process, here a copy of the descriptor, goes on with it."""
    given_away = []

    def handle(sock, address):
        given_away.append(socket.socket(fileno=os.dup(sock.fileno())))

    client = connect(serve_stream(handle).address_text)
    other = wait_until(lambda: given_away)[0]
    gevent.sleep(0.05)
    other.sendall(b"from elsewhere")
    assert in_thread(client.recv, 100) == b"from elsewhere"
    other.close()


# -- what the kernel has queued ---------------------------------------------------------------------------------------


def queue_clients(server, number):
    """Connect without letting the event loop run, so that all wait in the kernel's queue."""
    clients = []
    for _ in range(number):
        client = socket.create_connection(("127.0.0.1", server.server_port), timeout=SOON)
        client.sendall(b"hello")
        clients.append(client)
    return clients


def upper(sock, address):
    sock.sendall(sock.recv(100).upper())


@pytest.mark.slow
@any_spawn
@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_stop_serves_what_the_kernel_has_queued(serve_stream, spawn_thread, make_spawn, how):
    server = serve_stream(upper, spawn=make_spawn())
    answers = spawn_thread(list, map(answer_of, queue_clients(server, 100)))
    getattr(server, how)()
    assert not server.started
    assert server.closed
    assert answers.get(timeout=SOON) == [(b"HELLO", "end")] * 100
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.server_port))


@pytest.mark.slow
@pytest.mark.parametrize("make_spawn", [lambda: 3, lambda: HandlerPool(3)])
@pytest.mark.parametrize("how", ["stop", "close"])
def test_connections_queued_behind_a_full_pool_get_their_places_in_turn(serve_stream, spawn_thread, make_spawn, how):
    def slow(sock, address):
        gevent.sleep(0.005)
        upper(sock, address)

    server = serve_stream(slow, spawn=make_spawn())
    answers = spawn_thread(list, map(answer_of, queue_clients(server, 20)))
    wait_until(server.full)
    getattr(server, how)(*([SOON] if how == "stop" else []))
    assert answers.get(timeout=SOON) == [(b"HELLO", "end")] * 20


def test_a_stop_of_a_full_pool_ends_at_its_time_out(serve_stream, in_thread):
    begun = []

    def endless(sock, address):
        begun.append(address)
        gevent.sleep(1000)

    server = serve_stream(endless, spawn=1)
    clients = queue_clients(server, 3)
    server.stop(0.1)
    assert len(begun) == 1
    assert in_thread(lambda: [answer_of(client)[1] for client in clients[1:]]) == ["ECONNRESET"] * 2
    assert server.stats()["active"] == 0


def test_a_stop_without_a_pool_waits_for_the_drained_alone(serve_stream, in_thread):
    served, forever = [], Event()

    def handle(sock, address):
        if sock.recv(100) == b"forever":
            forever.wait()
        gevent.sleep(0.1)
        sock.sendall(b"done")
        served.append(address)

    server = serve_stream(handle)
    [running] = queue_clients(server, 1)
    wait_until(lambda: server.stats()["active"] == 1)
    clients = queue_clients(server, 5)
    running.close()
    server.stop(SOON)
    assert len(served) >= 5
    assert in_thread(lambda: [answer_of(client) for client in clients]) == [(b"done", "end")] * 5


def test_a_stop_with_a_pool_waits_until_answers_are_taken(serve_stream, connect, in_thread):
    server = serve_stream(lambda sock, address: sock.sendall(b"x"), spawn=10)
    client = connect(server.address_text)
    client.sendall(b"unread")
    wait_until(lambda: server.stats()["lingering"])
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.closed)
    gevent.sleep(0.05)
    assert not stopping.ready()
    assert in_thread(answer_of, client) == (b"x", "end")
    stopping.get(timeout=SOON)


def test_a_stop_of_no_time_serves_what_is_queued_and_waits_for_nobody(serve_stream, spawn_thread):
    server = serve_stream(upper)
    answers = spawn_thread(list, map(answer_of, queue_clients(server, 10)))
    server.stop(0)
    assert server.closed
    assert answers.get(timeout=SOON) == [(b"HELLO", "end")] * 10


def test_a_handler_may_stop_the_server_it_is_drained_from(serve_stream, in_thread):
    def handle(sock, address):
        server.stop(SOON)
        sock.sendall(b"stopped")

    server = serve_stream(handle)
    clients = queue_clients(server, 2)
    server.close()
    assert in_thread(lambda: [answer_of(client) for client in clients]) == [(b"stopped", "end")] * 2


@pytest.mark.parametrize("make_spawn", [lambda: "default", lambda: None])
def test_a_handler_may_close_the_server_while_it_drains(serve_stream, in_thread, make_spawn):
    def handle(sock, address):
        server.close()
        sock.sendall(b"closed")

    server = serve_stream(handle, spawn=make_spawn())
    clients = queue_clients(server, 3)
    gevent.get_hub().loop.run_callback(server.close)
    wait_until(lambda: server.closed)
    assert in_thread(lambda: [answer_of(client) for client in clients]) == [(b"closed", "end")] * 3


def test_the_other_owner_of_a_shared_socket_goes_on_after_a_stop(serve_stream, in_thread):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    copy = listener.dup()
    copy.setblocking(False)
    one, other = serve_stream(upper, listener=listener), serve_stream(upper, listener=copy)
    one.stop()
    assert in_thread(lambda: [answer_of(client) for client in queue_clients(other, 10)]) == [(b"HELLO", "end")] * 10


def test_a_process_that_got_the_servers_own_socket_goes_on_after_a_stop(serve_stream, in_thread):
    """By pass_fds, SCM_RIGHTS, a fork: nobody tells the server."""
    one = serve_stream(upper)
    other = serve_stream(upper, listener=socket.socket(fileno=os.dup(one.socket.fileno())))
    one.stop()
    assert in_thread(lambda: [answer_of(client) for client in queue_clients(other, 10)]) == [(b"HELLO", "end")] * 10


def test_a_server_that_was_never_started_serves_nobody(connect, in_thread):
    listener = socket.create_server(("127.0.0.1", 0))
    client = connect(f"127.0.0.1:{listener.getsockname()[1]}")
    StreamServer(listener, upper).stop()
    listener.close()
    assert in_thread(read_all, client) == (b"", "ECONNRESET")


def test_it_starts_again_after_a_stop(serve_stream, connect, in_thread):
    class Upper(StreamServer):
        handle = staticmethod(upper)

    server = serve_stream(None, server_class=Upper)
    for _ in range(2):
        client = connect(server.address_text)
        client.sendall(b"hello")
        assert in_thread(read_all, client) == (b"HELLO", "end")
        server.stop()
        server.start()


# -- SIGTERM ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import {first}
import os, signal, sys, threading
import gevent
from gevent.event import Event
from gtcpserver import StreamServer
def handle(sock, address):
    request = sock.recv(100)
    gevent.spawn(print, "began", flush=True)  # once this one waits
    if request == b"large":
        sock.sendall(bytes(100_000))
        return
    if request == b"endless":
        Event().wait()
    if request == b"fork":
        gevent.sleep(0)
        child = os.fork()
        if not child:
            signal.pause()
        os.kill(child, signal.SIGTERM)
        sock.sendall(b"%d" % os.waitpid(child, 0)[1])
        return
    gevent.sleep(0.2)
    sock.sendall(b"done")

{before}
server = StreamServer(("127.0.0.1", 0), handle, spawn={spawn})
server.start()
print(server.server_port, flush=True)
{then}
"""


@pytest.fixture
def program(python):
    def start(spawn="'default'", before="", then="server.serve_forever()", first="gevent"):
        process = python(PROGRAM.format(spawn=spawn, before=before, then=then, first=first))
        return process, int(process.stdout.readline())

    return start


def ask(process, port, request=b"x"):
    client = socket.create_connection(("127.0.0.1", port), timeout=SOON)
    client.sendall(request)
    assert process.stdout.readline() == b"began\n"
    return client


@pytest.mark.slow
@pytest.mark.parametrize("spawn", ["'default'", "gevent.spawn", "gevent.spawn_raw", "10", "gevent.pool.Pool(10)"])
def test_sigterm_finishes_requests_and_is_what_the_process_dies_of(program, spawn):
    process, port = program(spawn, before="import gevent.pool")
    client = ask(process, port)
    process.send_signal(signal.SIGTERM)
    assert answer_of(client) == (b"done", "end")
    assert process.wait(SOON) == -signal.SIGTERM
    assert process.stderr.read() == b""


@pytest.mark.slow
def test_sigterm_serves_what_is_queued_and_stops_the_servers_of_other_greenlets(program):
    then = """
other = StreamServer(("127.0.0.1", 0), handle)
other.start()
print(other.server_port, flush=True)
gevent.spawn(other.serve_forever)
gevent.spawn_later(0.1, __import__("time").sleep, 0.3)
server.serve_forever()
print("not reached", flush=True)
"""
    process, port = program(then=then)
    ports = [port, int(process.stdout.readline())]
    time.sleep(0.2)  # its event loop is blocked now: whoever connects is queued
    clients = [socket.create_connection(("127.0.0.1", port), timeout=SOON) for port in ports * 10]
    for client in clients:
        client.sendall(b"x")
    process.send_signal(signal.SIGTERM)
    assert [answer_of(client) for client in clients] == [(b"done", "end")] * 20
    assert process.wait(SOON) == -signal.SIGTERM
    assert b"not reached" not in process.stdout.read()


@pytest.mark.slow
def test_sigterm_waits_until_answers_are_taken(program):
    process, port = program()
    client = ask(process, port, b"large")
    client.sendall(b"unread")
    process.send_signal(signal.SIGTERM)
    assert answer_of(client) == (bytes(100_000), "end")
    assert process.wait(SOON) == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_waits_for_the_stop_time_out_and_no_longer(program):
    process, port = program(then="server.serve_forever(stop_timeout=0.1)")
    client = ask(process, port, b"endless")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == -signal.SIGTERM
    client.close()


@pytest.mark.slow
def test_a_second_sigterm_ends_it_at_once(program):
    process, port = program(then="server.serve_forever(stop_timeout=1000)")
    client = ask(process, port, b"endless")
    process.send_signal(signal.SIGTERM)
    while True:  # until it does not listen any more
        try:
            socket.create_connection(("127.0.0.1", port), timeout=SOON).close()
        except OSError:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == -signal.SIGTERM
    client.close()


OWN_HANDLERS = {
    "python": "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))",
    "gevent": "gevent.signal_handler(signal.SIGTERM, os._exit, 7)",
    "sigwait": "signal.pthread_sigmask(signal.SIG_BLOCK, [15]); "
    "threading.Thread(target=lambda: os._exit(signal.sigwait([15]) - 8), daemon=True).start()",
    "ignored": "signal.signal(signal.SIGTERM, signal.SIG_IGN); gevent.spawn_later(0.1, os._exit, 7)",
}


@pytest.mark.slow
@pytest.mark.parametrize("before", OWN_HANDLERS.values(), ids=OWN_HANDLERS)
def test_a_program_with_a_sigterm_handler_of_its_own_keeps_it(program, before):
    process, port = program(before=before)
    client = ask(process, port, b"endless")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 7
    client.close()


@pytest.mark.slow
def test_a_handler_that_is_set_while_it_serves_is_kept_as_well(program):
    process, _ = program(
        then="gevent.spawn(signal.signal, signal.SIGTERM, lambda *_: os._exit(7))\n"
        "gevent.spawn_later(0.02, print, 'set', flush=True)\nserver.serve_forever()"
    )
    assert process.stdout.readline() == b"set\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == 7


@pytest.mark.slow
def test_after_serve_forever_sigterm_is_what_it_was(program):
    process, _ = program(
        then="gevent.spawn(server.stop)\nserver.serve_forever()\n"
        "print(signal.getsignal(signal.SIGTERM).name, signal.set_wakeup_fd(-1), flush=True)"
    )
    assert process.stdout.readline() == b"SIG_DFL -1\n"
    assert process.wait(SOON) == 0


@pytest.mark.slow
def test_a_forked_child_dies_of_sigterm_at_once(program):
    """As multiprocessing.Process.terminate() wants it."""
    process, port = program()
    assert answer_of(ask(process, port, b"fork")) == (str(int(signal.SIGTERM)).encode(), "end")


@pytest.mark.slow
def test_sigterm_works_in_a_patched_program_and_beside_a_server_in_a_thread(program):
    process, port = program(
        first="gevent.monkey; gevent.monkey.patch_all()",
        before="""
def in_thread():
    StreamServer(("127.0.0.1", 0), handle).serve_forever()
gevent.get_hub().threadpool.spawn(in_thread)
""",
    )
    client = ask(process, port)
    process.send_signal(signal.SIGTERM)
    assert answer_of(client) == (b"done", "end")
    assert process.wait(SOON) == -signal.SIGTERM


@pytest.mark.slow
def test_the_first_process_of_a_container_ends_too(python):
    """The kernel does not end it by a signal that it leaves at its default, pid_namespaces(7)."""
    if os.system("unshare --user --map-root-user --pid --fork true 2>/dev/null"):
        pytest.skip("needs pid namespaces")
    source = PROGRAM.format(spawn="'default'", before="", then="server.serve_forever()", first="gevent")
    process = python(
        f"""
        import subprocess, sys
        unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
        sys.exit(subprocess.run([*unshare, sys.executable, "-c", {source!r}]).returncode)
        """
    )
    port = int(process.stdout.readline())
    client = ask(process, port)
    [shell] = children_of(process.pid)
    [init] = children_of(shell)
    os.kill(init, signal.SIGTERM)
    assert answer_of(client) == (b"done", "end")
    assert process.wait(SOON) == 128 + signal.SIGTERM


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_ctrl_c_stops_it_and_ends_the_program(program):
    process, port = program(spawn="10")
    client = ask(process, port)
    process.send_signal(signal.SIGINT)
    assert answer_of(client) == (b"done", "end")
    assert process.wait(SOON) == -signal.SIGINT
    assert b"KeyboardInterrupt" in process.stderr.read()
