"""StreamServer: what clients do is counted, what handlers do wrong is logged, and neither stops or floods it."""

import io
import logging
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys

import gevent
import gevent.ssl
import pytest
import trustme
from gevent.hub import get_hub

from gtcpserver import EarlyEOF, StreamServer
from kit import bad_stream_servers
from kit.floods import attack
from kit.patience import SOON
from kit.spawns import answer_of, any_spawn, waiting_spawn
from kit.waiting import wait_until

RESET = struct.pack("ii", 1, 0)


def echo(sock, address):
    while data := sock.recv(4096):
        sock.sendall(data)


def counted(server):
    names = ("resets", "timeouts", "limits_exceeded", "handler_errors")
    return {name: value for name, value in server.stats().items() if name in names and value}


def above_debug(caplog):
    return [record for record in caplog.records if record.levelno > logging.DEBUG]


# -- what clients do --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@waiting_spawn
def test_resets_are_counted_and_not_printed(serve_stream, connect, caplog, capfd, make_spawn):
    caplog.set_level(logging.DEBUG)
    server = serve_stream(echo, spawn=make_spawn())
    for _ in range(50):
        client = connect(server.address_text)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        gevent.sleep(0)
        client.sendall(b"x")
        wait_until(lambda: server.stats()["active"] == 1)
        client.close()
        wait_until(lambda: server.stats()["active"] == 0)
    assert counted(server) == {"resets": 50}
    assert above_debug(caplog) == []
    assert caplog.text.count("Connection reset by peer") == 50
    assert capfd.readouterr().err == ""


def wait_in_vain(sock):
    sock.settimeout(0.005)
    sock.recv(1)


def wait_in_vain_within_a_timeout(sock):
    with gevent.Timeout(0.005):
        sock.recv(1)


def say_that_it_is_too_short(sock):
    raise EarlyEOF("too short")


CLIENTS_FAULTS = {
    wait_in_vain: "timeouts",
    wait_in_vain_within_a_timeout: "timeouts",
    say_that_it_is_too_short: "resets",
}


@pytest.mark.slow
@waiting_spawn
@pytest.mark.parametrize("fault", CLIENTS_FAULTS, ids=lambda fault: fault.__name__)
def test_what_a_client_can_provoke_is_counted(serve_stream, connect, in_thread, caplog, capfd, make_spawn, fault):
    server = serve_stream(lambda sock, address: fault(sock), spawn=make_spawn())
    for _ in range(20):
        assert in_thread(connect(server.address_text).recv, 10) == b""
    assert counted(server) == {CLIENTS_FAULTS[fault]: 20}
    assert above_debug(caplog) == []
    assert capfd.readouterr().err == ""


# -- what handlers do wrong -------------------------------------------------------------------------------------------


@pytest.mark.slow
@any_spawn
@pytest.mark.parametrize(
    "fault",
    [
        ValueError("mine"),
        SystemExit(3),
        SystemError("mine"),
        MemoryError(),
        BrokenPipeError("print"),
        TimeoutError("a future"),
    ],
    ids=repr,
)
def test_faults_of_a_handler_are_logged_a_few_times_and_end_nothing_else(
    serve_stream, connect, in_thread, caplog, capfd, make_spawn, fault
):
    def handle(sock, address):
        if sock.recv(1) == b"!":
            raise fault
        sock.sendall(b"fine")

    def ask(what):
        client = connect(server.address_text)
        client.sendall(what)
        return in_thread(client.recv, 10)

    class AfterInput(StreamServer):
        def do_read(self):  # so that a handler in the event loop need not wait
            accepted = super().do_read()
            if accepted is not None:
                select.select([accepted[0].fileno()], [], [], SOON)
            return accepted

    server = serve_stream(handle, spawn=make_spawn(), server_class=AfterInput)
    for _ in range(20):
        assert ask(b"!") == b""
    assert ask(b".") == b"fine"
    assert counted(server) == {"handler_errors": 20}
    records = above_debug(caplog)
    assert len(records) == 5
    assert re.fullmatch(r"handler for 127\.0\.0\.1:\d+ failed", records[0].getMessage())
    assert records[0].exc_info[1] is fault
    assert capfd.readouterr().err == ""


def test_a_failed_handlers_greenlet_has_not_failed(serve_stream, connect, in_thread):
    def handle(sock, address):
        raise ValueError("mine")

    spawned = []
    server = serve_stream(handle, spawn=lambda *args: spawned.append(gevent.spawn(*args)))
    assert in_thread(connect(server.address_text).recv, 10) == b""
    assert spawned[0].exception is None


def test_an_error_in_spawn_is_logged_and_leaves_no_connection_open(serve_stream, connect, in_thread, caplog, capfd):
    def spawn(*args):
        raise RuntimeError("no greenlets today")

    server = serve_stream(echo, spawn=spawn)
    assert in_thread(connect(server.address_text).recv, 10) == b""
    assert [record.exc_info[1].args for record in above_debug(caplog)] == [("no greenlets today",)]
    assert capfd.readouterr().err == ""


def test_a_program_that_prints_errors_by_gevents_hub_still_gets_them(
    serve_stream, connect, in_thread, caplog, monkeypatch
):
    def handle(sock, address):
        raise ValueError("mine")

    stream = io.StringIO()
    monkeypatch.setattr(get_hub(), "exception_stream", stream)
    server = serve_stream(handle)
    assert in_thread(connect(server.address_text).recv, 10) == b""
    assert "ValueError: mine" in stream.getvalue()
    assert caplog.records == []
    monkeypatch.setattr(get_hub(), "exception_stream", None)  # nothing, says gevent's documentation
    assert in_thread(connect(server.address_text).recv, 10) == b""
    assert caplog.records == []


PROGRAM = """
import logging, signal, sys
import gevent
from gtcpserver import StreamServer

def handle(sock, address):
    request = sock.recv(100)
    if request == b"spin":
        sock.sendall(b"spinning")
        while True:
            pass
    if request.startswith(b"fault"):
        # Each on a line of its own, so that none is taken for another.
        exec(compile("\\n" * int(request[5:]) + "raise ValueError('x' * 1000)", "handler.py", "exec"))
    sock.sendall(request)

server = StreamServer(("127.0.0.1", 0), handle{options})
server.start()
print(server.server_port, flush=True)
server.serve_forever()
"""


def say(port, request):
    client = socket.create_connection(("127.0.0.1", port), timeout=SOON)
    client.sendall(request)
    return client


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ", spawn=10", ", spawn=gevent.spawn_raw"])
def test_ctrl_c_that_hits_a_handler_ends_the_program(python, options):
    process = python(PROGRAM.format(options=options))
    port = int(process.stdout.readline())
    client = say(port, b"spin")
    assert client.recv(100) == b"spinning"
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON) == -signal.SIGINT
    assert b"KeyboardInterrupt" in process.stderr.read()
    client.close()


@pytest.mark.slow
def test_a_stderr_that_nobody_reads_blocks_nothing(python):
    process = python(PROGRAM.format(options=""))
    port = int(process.stdout.readline())
    for number in range(300):  # of a kilobyte each, and a pipe has room for 64
        assert answer_of(say(port, b"fault%d" % number)) == (b"", "end")
    assert answer_of(say(port, b"hello")) == (b"hello", "end")
    process.send_signal(signal.SIGTERM)
    assert process.wait(SOON) == -signal.SIGTERM
    written = process.stderr.read()
    assert b"ERROR gtcpserver: handler for 127.0.0.1:" in written
    assert b"ValueError: xxx" in written


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(path)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return path, context


def greeted(server, certificate, connect):
    """What a good client gets."""
    with certificate[1].wrap_socket(connect(server.address_text), server_hostname="localhost") as client:
        client.sendall(b"hello")
        return client.recv(100)


def upper(sock, address):
    sock.sendall(sock.recv(100).upper())


@pytest.mark.slow
@pytest.mark.parametrize("spawn", [1, None])
def test_silent_tls_clients_hold_no_place(serve_stream, connect, in_thread, certificate, spawn):
    if spawn is None:

        def handle(sock, address):  # fmt: skip
            sock.sendall(b"HELLO")
    else:
        handle = upper
    server = serve_stream(handle, spawn=spawn, certfile=str(certificate[0]))
    silent = [connect(server.address_text) for _ in range(20)]
    wait_until(lambda: server.stats()["handshaking"] == 20)
    assert in_thread(greeted, server, certificate, connect) == b"HELLO"
    assert server.stats()["handshaking"] == len(silent)


@pytest.mark.slow
def test_handshakes_are_bounded_in_number_and_time(serve_stream, connect, in_thread, certificate, caplog):
    class Few(StreamServer):
        max_handshakes = 3
        handshake_timeout = 0.1

    server = serve_stream(upper, server_class=Few, certfile=str(certificate[0]))
    clients = [connect(server.address_text) for _ in range(10)]
    assert in_thread(lambda: [client.recv(10) for client in clients]) == [b""] * 10
    assert server.stats()["handshake_failures"] == {"crowded_out": 7, "timeout": 3}
    assert above_debug(caplog) == []


def test_who_has_passed_the_handshake_waits_for_a_place(serve_stream, connect, in_thread, spawn_thread, certificate):
    leave = gevent.event.Event()

    def handle(sock, address):
        leave.wait()
        upper(sock, address)

    server = serve_stream(handle, spawn=1, certfile=str(certificate[0]))
    # Both are accepted before the first one's handshake makes the pool full.
    clients = [connect(server.address_text) for _ in range(2)]
    wait_until(lambda: server.stats()["handshaking"] == 2)
    encrypted = [
        in_thread(lambda client=client: certificate[1].wrap_socket(client, server_hostname="localhost"))
        for client in clients
    ]
    for client in encrypted:
        client.sendall(b"hello")
    wait_until(lambda: server.stats()["handshaking"] == 0)
    assert server.stats()["active"] == 1
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.closed)
    leave.set()
    assert in_thread(lambda: [client.recv(10) for client in encrypted]) == [b"HELLO"] * 2
    for client in encrypted:
        client.close()
    stopping.get(timeout=SOON)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("spawn", ["default", 2])
def test_a_stop_serves_queued_tls_clients(serve_stream, connect, spawn_thread, certificate, how, spawn):
    server = serve_stream(upper, spawn=spawn, certfile=str(certificate[0]))
    clients = [socket.create_connection(("127.0.0.1", server.server_port), timeout=SOON) for _ in range(10)]

    def ask():
        answers = []
        for client in clients:
            with certificate[1].wrap_socket(client, server_hostname="localhost") as encrypted:
                encrypted.sendall(b"hello")
                answers.append(encrypted.recv(100))
        return answers

    asking = spawn_thread(ask)
    getattr(server, how)(*([SOON] if how == "stop" else []))
    assert asking.get(timeout=SOON) == [b"HELLO"] * 10


def test_silent_tls_clients_hold_up_a_stop_until_its_time_out(serve_stream, connect, in_thread, certificate):
    server = serve_stream(upper, spawn=2, certfile=str(certificate[0]))
    client = connect(server.address_text)
    wait_until(lambda: server.stats()["handshaking"] == 1)
    server.stop(0.1)
    assert in_thread(client.recv, 10) == b""
    assert server.stats()["handshake_failures"] == {"stopped": 1}


def test_certificate_files_that_are_gone_are_logged(serve_stream, connect, in_thread, tmp_path, caplog):
    server = serve_stream(upper, certfile=str(tmp_path / "none.pem"))
    for _ in range(20):
        assert in_thread(connect(server.address_text).recv, 10) == b""
    assert len(above_debug(caplog)) == 5
    assert isinstance(caplog.records[0].exc_info[1], FileNotFoundError)


@pytest.mark.slow
def test_bad_clients_of_gevents_ssl_sockets_print_nothing(serve_stream, connect, in_thread, certificate, caplog, capfd):
    class Impatient(StreamServer):
        handshake_timeout = 0.1

    options = {"certfile": str(certificate[0]), "suppress_ragged_eofs": False}
    server = serve_stream(upper, server_class=Impatient, spawn=2, **options)
    for number in range(20):
        client = connect(server.address_text)
        if number % 4 == 0:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        elif number % 4 == 1:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()
        elif number % 4 == 2:
            client.sendall(b"\x16\x03")
            client.close()
        # The rest says nothing.
    assert in_thread(greeted, server, certificate, connect) == b"HELLO"
    wait_until(lambda: sum(server.stats()["handshake_failures"].values()) + server.left_in_queue >= 20)
    assert above_debug(caplog) == []
    assert capfd.readouterr().err == ""


# -- all at once ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_connections_to_every_kind_of_server_are_no_log_line(certificate, tmp_path):
    source = bad_stream_servers.__file__
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, source, certificate[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
        try:
            attack(process.stdout.readline().decode().split(), 1600)
            counted, _ = process.communicate(timeout=SOON)
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "stderr").read_text() == ""
    assert process.returncode == 0
    assert int(counted) > 200
