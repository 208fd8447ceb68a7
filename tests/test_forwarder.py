"""The forwarder: every client reaches a target that is up, and both ends hear of each other's end."""

import errno
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
from time import monotonic

import gevent.ssl
import pytest
import trustme

from gtcpserver import ConfigError, Server, forwarder
from gtcpserver.forwarder import Forwarder
from kit.clients import ask
from kit.commands import run_command
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_until


def closed_port():
    return f"127.0.0.1:{free_port()}"


def named(name):
    return lambda conn: conn.sendall(name)


@pytest.fixture
def answers(serve, connect, in_thread):
    """`answers(server, n)`: what n clients are told, one after another."""

    def ask_them(server, number):
        told = []
        for _ in range(number):
            with connect(server) as client:
                told.append(in_thread(client.recv, 100).decode())
        return told

    return ask_them


def test_forwards_both_ways_and_passes_on_the_end_of_one_side(serve, connect, in_thread):
    target = serve(lambda conn: conn.sendall(str(len(b"".join(iter(lambda: conn.recv(65536), b"")))).encode()))
    server = serve(Forwarder([target.address]))
    client = connect(server)
    in_thread(client.sendall, b"x" * 3_000_000)
    client.shutdown(socket.SHUT_WR)
    assert in_thread(client.recv, 100) == b"3000000"
    assert in_thread(client.recv, 100) == b""


def test_the_first_target_that_is_up_serves_and_the_one_that_was_down_is_left_alone(serve, answers, caplog):
    down = closed_port()
    up = serve(named(b"up"))
    forward = Forwarder([down, up.address])
    assert answers(serve(forward), 5) == ["up"] * 5
    assert (forward.targets[0].failed, forward.targets[1].connected) == (1, 5)
    assert [record.getMessage() for record in caplog.records if "is down" in record.getMessage()] == [
        f"target {down} is down: [Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}"
    ]


def test_a_target_that_comes_back_is_noticed(serve, answers, caplog, monkeypatch):
    monkeypatch.setattr(forwarder, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(forwarder, "LONGEST_PAUSE", 0.05)
    first, second = closed_port(), serve(named(b"second"))
    server = serve(Forwarder([first, second.address]))
    assert answers(server, 1) == ["second"]
    serve(named(b"first"), first)
    wait_until(lambda: answers(server, 1) == ["first"])
    assert f"target {first} is up again" in caplog.text


def test_all_are_down_and_the_client_is_reset_and_then_one_is_up(serve, connect, in_thread, answers):
    target = closed_port()
    server = serve(Forwarder([target]))
    for _ in range(2):  # put aside, it is tried all the same: there is no other
        with pytest.raises(ConnectionResetError):
            in_thread(connect(server).recv, 100)
    serve(named(b"here"), target)
    assert answers(server, 1) == ["here"]
    assert server.stats().handler_errors == 0


def test_one_client_tries_a_target_that_was_down_and_the_others_do_not_wait_for_that(
    serve, connect, in_thread, spawn_thread, answers, monkeypatch
):
    monkeypatch.setattr(forwarder, "FIRST_PAUSE", 0.01)
    serving, trusting = tls_contexts()
    first, second = closed_port(), serve(named(b"second"), tls=serving)
    forward = Forwarder([first, second.address], tls=trusting, connect_timeout=SOON)
    server = serve(forward)
    assert answers(server, 1) == ["second"]
    host, port = first.split(":")
    with socket.create_server((host, int(port))) as silent:
        wait_until(lambda: forward.targets[0].aside_until <= monotonic())
        patient = spawn_thread(connect(server).recv, 100)
        on_trial, _ = in_thread(silent.accept)
        assert answers(server, 3) == ["second"] * 3
        on_trial.close()
    assert patient.get(timeout=SOON) == b"second"
    assert (forward.targets[0].failed, forward.targets[0].pause) == (2, 0.02)


def test_clients_that_find_a_target_down_together_put_it_aside_once(serve, connect, in_thread, spawn_thread):
    _, trusting = tls_contexts()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        forward = Forwarder(["{}:{}".format(*silent.getsockname())], tls=trusting, connect_timeout=SOON)
        server = serve(forward)
        clients = [spawn_thread(connect(server).recv, 100) for _ in range(5)]
        for _ in clients:
            in_thread(silent.accept)[0].close()
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.get(timeout=SOON)
    assert (forward.targets[0].failed, forward.targets[0].pause) == (5, forwarder.FIRST_PAUSE)


def test_a_lack_of_descriptors_is_no_targets_fault(serve, in_thread, caplog):
    target = serve(echo)
    forward = Forwarder([target.address])
    server = serve(forward)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(SOON)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one for the client's connection, none behind it
        try:
            with pytest.raises(ConnectionResetError):  # which may come before connect() has returned
                in_thread(client.connect, ("127.0.0.1", server.port))
                in_thread(client.recv, 100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (forward.targets[0].failed, forward.targets[0].pause) == (0, 0.0)
    assert "Too many open files" in caplog.text


def test_round_robin_gives_each_target_its_turn(serve, answers):
    targets = [serve(named(name)).address for name in (b"a", b"b", b"c")]
    assert answers(serve(Forwarder(targets, balance="round-robin")), 6) == ["a", "b", "c"] * 2


def test_least_gives_a_client_to_the_target_with_the_fewest(serve, connect, in_thread):
    targets = [serve(echo) for _ in range(3)]
    server = serve(Forwarder([target.address for target in targets], balance="least"))
    for _ in range(6):
        assert in_thread(ask, connect(server)) == b"hello"
    assert [target.active_connections for target in targets] == [2, 2, 2]


def test_a_silent_pair_is_ended_after_the_idle_timeout(serve, connect, in_thread):
    server = serve(Forwarder([serve(echo).address], idle_timeout=0.05))
    assert in_thread(connect(server).recv, 100) == b""
    wait_until(lambda: server.active_connections == 0)


def test_a_target_that_resets_resets_the_client(serve, connect, in_thread):
    server = serve(Forwarder([serve(lambda conn: (conn.recv(1), conn.abort())).address]))
    client = connect(server)
    client.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 100)


def test_unix_target(serve, answers, tmp_path):
    target = serve(named(b"unix"), f"unix:{tmp_path}/target.sock")
    assert answers(serve(Forwarder([target.address])), 1) == ["unix"]


def tls_contexts():
    """Of a server at 127.0.0.1, and of a client that trusts it."""
    authority = trustme.CA()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    trusting = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trusting)
    return serving, trusting


def test_encrypted_target_is_checked(serve, connect, in_thread, answers):
    serving, trusting = tls_contexts()
    target = serve(named(b"secret"), tls=serving)
    wary = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert answers(serve(Forwarder([target.address], tls=trusting)), 1) == ["secret"]
    with pytest.raises(ConnectionResetError):
        in_thread(connect(serve(Forwarder([target.address], tls=wary))).recv, 100)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "targets must be a list of one or more addresses, got []"),
        (["*:80"], {}, 'targets must be "host:port", "[IPv6]:port" or "unix:/path", got \'*:80\''),
        (["x:0"], {}, "targets must be"),
        (["x"], {}, "targets must be"),
        (["x:1"], {"balance": "random"}, 'balance must be "first", "round-robin" or "least", got \'random\''),
        (["x:1"], {"connect_timeout": 0}, "connect_timeout must be"),
        (["x:1"], {"idle_timeout": -1}, "idle_timeout must be"),
        (["x:1"], {"tls": True}, "tls must be"),
        (
            ["x:1", "unix:/y"],
            {"tls": gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)},
            "tls must not check host names (check_hostname) for unix:/y, which has none",
        ),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ConfigError) as raised:
        Forwarder(arguments, **options)
    assert message in str(raised.value)


def run(*arguments):
    done = run_command("forward", *arguments)
    return done.returncode, done.stderr.strip()


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line_and_status_2():
    assert run("127.0.0.1:0") == (2, "gtcpserver: missing TARGET...")
    assert run("nowhere", "127.0.0.1:1")[0] == 2
    status, said = run("127.0.0.1:0", "x")
    assert (status, said) == (
        2,
        'gtcpserver: targets must be "host:port", "[IPv6]:port" or "unix:/path", got \'x\'',
    )
    status, said = run("127.0.0.1:0", "x:1", "--connect-timeout", "0")
    assert status == 2
    assert said.startswith("gtcpserver: --connect-timeout: must be ")
    assert (
        run("127.0.0.1:0", "x:1", "--target-cafile", __file__)[1] == "gtcpserver: --target-cafile: needs --target-tls"
    )
    status, said = run("127.0.0.1:0", "unix:/y", "--target-tls")
    assert (status, said) == (
        2,
        "gtcpserver: --target-tls: unix:/y has no host name to check its certificate against",
    )


@pytest.mark.slow
def test_the_command_forwards_and_stops_in_order(serve, in_thread):
    target = serve(echo)
    with subprocess.Popen(
        [sys.executable, "-m", "gtcpserver", "forward", "127.0.0.1:0", closed_port(), target.address],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", in_thread(process.stderr.readline))[1])
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                assert in_thread(ask, client) == b"hello"
            process.send_signal(signal.SIGTERM)
            assert in_thread(process.wait) == 0
        finally:
            process.kill()


def test_it_is_a_handler_like_any_other(connect, in_thread, serve):
    with Server("127.0.0.1:0", Forwarder([serve(echo).address])) as server:
        client = connect(server)
        assert in_thread(ask, client) == b"hello"
        client.close()
