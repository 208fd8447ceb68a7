"""What test_locust.py lets another process do, since locust replaces parts of the standard library when imported.

Each function that begins with `case_` is a test. The process reads their names, a line each, and answers with a JSON
line: null, or the traceback.
"""

from kit.paths import ROOT

from locust import User, constant, task  # isort: skip (first: it replaces what others import)
from locust.env import Environment  # isort: skip

import argparse
import itertools
import json
import os
import re
import ssl
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager

import gevent
import pytest
import trustme
from gevent.event import Event
from locust.event import Events
from locust.exception import RescheduleTask, ResponseError, StopTest, StopUser

from kit.patience import SOON
from kit.ports import free_port

sys.path.insert(0, str(ROOT))

from gtcpserver import Server, TLSConfig
from loadtests.load import locustfile, pass_criteria, shapes, tunnels
from loadtests.tcp_user import (
    Address,
    ClosedByServer,
    Reconnect,
    RequestFailed,
    TcpUser,
    insecure_context,
)


class Reported(list):
    """The events, as dictionaries."""

    def names(self):
        return [event["name"] for event in self]

    def failed(self):
        return [event["name"] for event in self if event["exception"]]


def raises(kind, text=""):
    return pytest.raises(kind, match=re.escape(text))


def echo(conn):
    while data := conn.recv(65536):
        conn.sendall(data)


@contextmanager
def user_of(handler, address="127.0.0.1:0", tls=None, host=None, **attributes):
    """A user of a server with this handler, and what it reports."""
    server = Server(address, handler, tls=tls)
    server.start()
    try:
        with user_at(host or server.address, **attributes) as (user, reported):
            yield user, reported
    finally:
        server.halt()


@contextmanager
def user_at(host, **attributes):
    environment = Environment(events=Events())
    reported = Reported()
    environment.events.request.add_listener(lambda **event: reported.append(event))
    user = type("SomeUser", (TcpUser,), {"host": host, **attributes})(environment)
    try:
        yield user, reported
    finally:
        user.client.close()


def dead_address():
    """Nobody listens there."""
    return f"127.0.0.1:{free_port()}"


# -- what is reported --------------------------------------------------------------------------------------------------


def case_each_call_is_reported_with_type_name_time_and_length():
    with user_of(echo) as (user, reported):
        user.client.send(b"hello")
        assert user.client.receive_exactly(5, name="answer") == b"hello"
    assert reported.names() == ["connect", "send", "answer"]
    assert {event["request_type"] for event in reported} == {"TCP"}
    assert [event["response_length"] for event in reported] == [0, 5, 5]
    assert all(0 <= event["response_time"] < SOON * 1000 and event["exception"] is None for event in reported)
    assert abs(reported[0]["start_time"] - time.time()) < SOON
    assert reported[2]["response"] == b"hello"


def case_a_request_of_several_steps_is_one_event():
    with (
        user_of(echo, context=lambda self: {"user": 1, "both": 1}) as (user, reported),
        user.client.request("ping", context={"both": 2}) as request,
    ):
        user.client.send(b"hello world")
        assert user.client.receive_exactly(5) == b"hello"
        assert user.client.receive_exactly(6) == b" world"
        request.name = "pong"
    assert reported.names() == ["connect", "pong"]
    assert reported[1]["response_length"] == 11
    assert reported[1]["context"] == {"user": 1, "both": 2}


def case_response_time_is_that_of_the_server_in_milliseconds():
    def slow_echo(conn):
        while data := conn.recv(100):
            gevent.sleep(0.1)
            conn.sendall(data)

    with user_of(slow_echo) as (user, reported), user.client.request("slow") as request:
        request.sleep(0.3)
        user.client.send(b"x")
        user.client.receive()
    assert 100 <= reported[1]["response_time"] < 290, reported[1]


def case_a_failure_that_was_marked_keeps_the_connection():
    with user_of(echo) as (user, reported):
        for _ in range(2):
            with user.client.request("ping") as request:
                user.client.send(b"x")
                user.client.receive()
                request.failure("wrong")
    assert reported.names() == ["connect", "ping", "ping"]
    assert [str(event["exception"]) for event in reported[1:]] == ["wrong", "wrong"]


def case_an_assertion_is_a_failure_and_ends_the_task():
    with user_of(echo) as (user, reported):
        with raises(RescheduleTask, "ping: not the answer"), user.client.request("ping"):
            raise AssertionError("not the answer")
        assert user.client.socket is None
    assert isinstance(reported[1]["exception"], AssertionError)


def case_a_fault_of_the_test_is_reported_and_not_hidden():
    with user_of(echo) as (user, reported), raises(ValueError, "invalid literal"), user.client.request("ping"):
        int("x")
    assert reported.failed() == ["ping"]


def case_a_failed_request_ends_the_task_and_no_other():
    class SomeUser(TcpUser):
        reconnect = Reconnect(first=0.01)
        rounds = 0

        @task
        def some(self):
            SomeUser.rounds += 1
            if SomeUser.rounds == 3:
                enough.set()
            self.client.receive()
            raise AssertionError("not reached")

    enough = Event()
    server = Server("127.0.0.1:0", lambda conn: None)
    server.start()
    SomeUser.host = server.address
    environment = Environment(user_classes=[SomeUser], events=Events())
    runner = environment.create_local_runner()
    runner.start(1, 1)
    assert enough.wait(SOON)
    runner.quit()
    server.halt()
    assert runner.exceptions == {}
    assert environment.stats.get("receive", "TCP").num_failures >= 2
    errors = [str(error.error) for error in environment.stats.errors.values()]
    assert errors == ["the server closed the connection before an answer"]


def case_a_user_that_is_stopped_closes_its_connection_and_reports_nothing():
    waiting, gone = Event(), Event()

    def handler(conn):
        waiting.set()
        assert conn.recv(1) == b""
        gone.set()

    class SomeUser(TcpUser):
        @task
        def some(self):
            with self.client.request("forever"):
                self.client.receive()

        def on_stop(self):
            """Without a call of the base class's."""

    server = Server("127.0.0.1:0", handler)
    server.start()
    SomeUser.host = server.address
    environment = Environment(user_classes=[SomeUser], events=Events())
    runner = environment.create_local_runner()
    runner.start(1, 1)
    assert waiting.wait(SOON)
    runner.quit()
    assert gone.wait(SOON)
    server.halt()
    assert [name for name, _ in environment.stats.entries] == ["connect"]
    assert not environment.stats.errors


def case_a_user_that_is_stopped_between_tasks_closes_its_connection():
    asked, gone = Event(), Event()

    def handler(conn):
        conn.recv_exactly(1)
        asked.set()
        assert conn.recv(1) == b""
        gone.set()

    class SomeUser(TcpUser):
        wait_time = constant(1000)

        @task
        def some(self):
            users.append(self)
            self.client.send(b"x")

        def on_stop(self):
            """Without a call of the base class's."""

    users = []
    server = Server("127.0.0.1:0", handler)
    server.start()
    SomeUser.host = server.address
    runner = Environment(user_classes=[SomeUser], events=Events()).create_local_runner()
    runner.start(1, 1)
    assert asked.wait(SOON)
    runner.quit()
    assert gone.wait(SOON)  # while users holds the user: not by the garbage collector
    server.halt()


# -- receiving ---------------------------------------------------------------------------------------------------------


def drip(data, pause=0.0):
    def handler(conn):
        for byte in data:
            conn.sendall(bytes([byte]))
            gevent.sleep(pause)

    return handler


def case_receives_messages_however_they_are_cut():
    for handler in (drip(b"one\r\ntwo\r\nthree!four", 0.002), lambda conn: conn.sendall(b"one\r\ntwo\r\nthree!four")):
        with user_of(handler) as (user, _):
            client = user.client
            assert client.receive_until(b"\r\n") == b"one\r\n"
            assert client.receive_until(b"\r\n") == b"two\r\n"
            assert client.receive(1) == b"t"
            assert client.receive_exactly(5) == b"hree!"
            assert client.receive_exactly(0) == b""
            assert client.receive_to_end() == b"four"


def case_what_was_kept_of_a_connection_ends_with_it():
    def lines(conn):
        conn.sendall(b"one\ntwo\n")
        conn.recv(1)

    with user_of(lines) as (user, _):
        assert user.client.receive_until() == b"one\n"
        user.client.close()
        assert user.client.receive_until() == b"one\n"
        with raises(RequestFailed), user.client.request("ping"):
            raise AssertionError
        assert user.client.receive_until() == b"one\n"


def case_receives_more_than_the_kernel_holds():
    data = os.urandom(3_000_000)
    with user_of(lambda conn: conn.sendall(data + b"rest")) as (user, reported):
        assert user.client.receive_exactly(len(data)) == data
        assert user.client.receive() == b"rest"
    assert reported[1]["response_length"] == len(data)


def case_a_delimiter_must_come_within_the_limit():
    for sent in (b"x" * 11, b"x" * 10 + b"\n"):
        with user_of(lambda conn, sent=sent: conn.sendall(sent)) as (user, reported):
            with raises(RequestFailed, "no b'\\n' within 10 bytes"):
                user.client.receive_until(b"\n", 10)
            assert user.client.socket is None
        assert isinstance(reported[1]["exception"], ResponseError)
    with user_of(lambda conn: conn.sendall(b"x" * 9 + b"\n")) as (user, _):
        assert len(user.client.receive_until(b"\n", 10)) == 10
        with raises(ValueError, "delimiter must be"):
            user.client.receive_until(b"")
    with user_of(lambda conn: conn.sendall(b"x" * 11)) as (user, _), raises(RequestFailed, "more than 10 bytes"):
        user.client.receive_to_end(10)


def case_an_early_end_is_a_failure_and_its_message_does_not_vary():
    messages = set()
    for sent in (b"ab", b"abc"):
        for call, argument in (("receive_exactly", 9), ("receive_until", b"\n")):
            with user_of(lambda conn, sent=sent: conn.sendall(sent)) as (user, reported), raises(RequestFailed):
                getattr(user.client, call)(argument)
            error = reported[1]["exception"]
            assert isinstance(error, ClosedByServer)
            assert error.partial == sent
            messages.add(str(error))
    assert messages == {"the server closed the connection in the midst of an answer"}
    with user_of(lambda conn: None) as (user, _), raises(RequestFailed, "before an answer"):
        user.client.receive()


def case_a_server_that_drips_does_not_stretch_the_time_out():
    began = time.monotonic()
    late = raises(RequestFailed, "no whole answer within 0.15 s")
    with user_of(drip(b"x" * 1000, 0.02), timeout=0.15) as (user, reported), late:
        user.client.receive_exactly(1000)
    assert time.monotonic() - began >= 0.15
    assert isinstance(reported[1]["exception"], TimeoutError)


def case_a_server_that_does_not_read_runs_into_the_time_out():
    def handler(conn):
        conn.server.stopping_event.wait(SOON)

    with user_of(handler, timeout=0.1) as (user, _), raises(RequestFailed, "did not take it within 0.1 s"):
        user.client.send(bytes(50_000_000))


# -- connecting --------------------------------------------------------------------------------------------------------


def case_connects_again_after_a_failure_and_not_at_once():
    policy = Reconnect(first=0.1, factor=3, jitter=0)
    with user_at(dead_address(), reconnect=policy) as (user, reported):
        times = []
        for _ in range(3):
            began = time.monotonic()
            with raises(RequestFailed, "refused"):
                user.client.send(b"x")
            times.append(time.monotonic() - began)
    assert reported.names() == ["connect"] * 3
    for seconds, pause, event in zip(times, (0, 0.1, 0.3), reported, strict=True):
        assert event["response_time"] / 1000 <= seconds - pause, "the pause is missing, or reported as the server's"


def case_a_server_that_hangs_up_at_once_is_not_hammered():
    accepted = []
    with user_of(accepted.append, reconnect=Reconnect(first=0.05, factor=2, jitter=0)) as (user, _):
        began = time.monotonic()
        for _ in range(4):
            with raises(RequestFailed):
                user.client.receive()
        assert time.monotonic() - began >= 0.05 + 0.1 + 0.2
    assert len(accepted) == 4


def case_bytes_from_the_server_end_the_wait():
    # Each failure but the first in a row would wait for 10 s.
    policy = Reconnect(first=0.01, factor=1000, longest=10, jitter=0)
    with user_of(lambda conn: conn.sendall(b"x"), reconnect=policy) as (user, _), gevent.Timeout(5):
        for _ in range(3):
            assert user.client.receive() == b"x"
            with raises(RequestFailed, "before an answer"):
                user.client.receive()


def case_a_user_gives_up_as_its_policy_says():
    with user_at(dead_address(), reconnect=None) as (user, _):
        with raises(RequestFailed):
            user.client.connect()
        with raises(StopUser, "gave up after 1 failures"):
            user.client.send(b"x")
    with user_at(dead_address(), reconnect=Reconnect(first=0, attempts=2)) as (user, reported):
        for kind in (RequestFailed, RequestFailed, StopUser):
            with raises(kind), user.client.request("ping", connect=True):
                raise AssertionError("not reached")
    assert reported.names() == ["ping", "ping"]


def case_waits_grow_to_a_limit_and_vary():
    steady = Reconnect(first=0.1, factor=2, longest=1, jitter=0)
    assert [steady.wait(failures) for failures in (1, 2, 3, 4, 5, 10**6)] == [0.1, 0.2, 0.4, 0.8, 1, 1]
    waits = [Reconnect(first=1, jitter=0.5).wait(1) for _ in range(200)]
    assert 0.5 <= min(waits) < 0.8
    assert 1.2 < max(waits) <= 1.5


def case_a_request_may_connect_within_its_time():
    def greeting(conn):
        gevent.sleep(0.1)
        conn.sendall(b"hi\n")
        echo(conn)

    connected = []

    def on_connect(self):
        connected.append(1)
        with self.client.request("log in"):
            assert self.client.receive_until() == b"hi\n"

    with user_of(greeting, on_connect=on_connect) as (user, reported):
        for _ in range(2):
            with user.client.request("all of it", connect=True):
                user.client.send(b"x")
                assert user.client.receive() == b"x"
    assert reported.names() == ["all of it"] * 2
    assert len(connected) == 2
    assert reported[1]["response_time"] >= 100
    assert reported[1]["response_length"] == 4


def case_on_connect_greets_on_each_new_connection():
    def on_connect(self):
        self.client.send(b"hello\n", name="HELLO")
        assert self.client.receive_until(name="HELLO answer") == b"hello\n"

    with user_of(echo, on_connect=on_connect) as (user, reported):
        for _ in range(2):
            with user.client:
                user.client.send(b"x")
            assert user.client.socket is None
    assert reported.names() == ["connect", "HELLO", "HELLO answer", "send"] * 2


def case_a_greeting_that_fails_closes_the_connection():
    closed = Event()

    def handler(conn):
        conn.sendall(b"no\n")
        assert conn.recv(1) == b""
        closed.set()

    def on_connect(self):
        with self.client.request("log in"):
            assert self.client.receive_until() == b"yes\n", "not let in"

    with user_of(handler, on_connect=on_connect) as (user, reported):
        with raises(RequestFailed, "not let in"):
            user.client.send(b"x")
        assert closed.wait(SOON)
    assert reported.names() == ["connect", "log in"]


def case_a_fault_of_on_connect_leaves_no_connection_behind():
    def on_connect(self):
        raise ZeroDivisionError

    with user_of(echo, on_connect=on_connect) as (user, reported):
        for _ in range(2):
            with raises(ZeroDivisionError):
                user.client.send(b"x")
            assert user.client.socket is None
    assert reported.names() == ["connect", "connect"]


def case_a_failure_of_a_part_is_one_of_the_whole():
    def on_connect(self):
        with self.client.request("log in") as request:
            request.failure("not let in")

    with user_of(echo, on_connect=on_connect) as (user, reported), user.client.request("all", connect=True):
        pass
    assert [(event["name"], str(event["exception"])) for event in reported] == [("all", "not let in")]


def case_prepare_socket_comes_before_connect():
    seen = []

    def handler(conn):
        seen.append(conn.client_address[0])
        conn.sendall(b"x")

    with user_of(handler, prepare_socket=lambda self, sock: sock.bind(("127.0.0.77", 0))) as (user, _):
        user.client.receive()
    assert seen == ["127.0.0.77"]


def case_half_close_and_reset_are_what_they_are():
    ends = []

    def handler(conn):
        try:
            ends.append(conn.recv_until(b"\n"))
            ends.append(conn.recv(1))
            conn.sendall(b"late")
        except OSError as error:
            ends.append(type(error).__name__)
        done.set()

    for act in ("half_close", "reset"):
        done = Event()
        with user_of(handler) as (user, _):
            user.client.send(b"x\n")
            while len(ends) % 2 == 0:
                gevent.sleep(0.001)
            getattr(user.client, act)()
            if act == "half_close":
                assert user.client.receive_to_end() == b"late"
            assert done.wait(SOON)
    assert ends == [b"x\n", b"", b"x\n", "ConnectionResetError"], ends


def case_unix_sockets():
    with tempfile.TemporaryDirectory() as folder, user_of(echo, address=f"unix:{folder}/s") as (user, _):
        user.client.send(b"x")
        assert user.client.receive() == b"x"


def case_addresses():
    for text, host, port, tls in [
        ("localhost:80", "localhost", 80, False),
        ("[::1]:80", "::1", 80, False),
        ("tcp://10.0.0.1:5000", "10.0.0.1", 5000, False),
        ("tls://example.org:443", "example.org", 443, True),
        ("unix:/run/x.sock", "/run/x.sock", 0, False),
    ]:
        address = Address.parse(text)
        assert (address.host, address.port, address.tls) == (host, port, tls), text
    for text in (
        "",
        "localhost",
        ":80",
        "a:b",
        "a:70000",
        "a:0",
        "http://a:80",
        "a:80/x",
        "u@a:80",
        "unix:",
        "[::1:80",
    ):
        with raises(ValueError, f"got {text!r}"):
            Address.parse(text)


def case_a_user_without_a_host_is_told():
    with raises(StopTest, "SomeUser needs a host"), user_at(None):
        pass
    with raises(StopTest, "host of SomeUser must be"), user_at("nonsense"):
        pass


# -- TLS ---------------------------------------------------------------------------------------------------------------


def certificates(folder):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(f"{folder}/server.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return TLSConfig(f"{folder}/server.pem"), context


def case_tls_is_a_handshake_and_then_the_same():
    with tempfile.TemporaryDirectory() as folder:
        server_side, trusting = certificates(folder)
        for tls in (trusting, insecure_context()):
            with user_of(echo, tls=server_side, tls_server_name="localhost") as (user, reported):
                user.tls = tls
                data = os.urandom(300_000)
                with user.client.request("ping"):
                    writer = gevent.spawn(user.client._send, data)  # noqa: SLF001  one send, without its event
                    assert user.client.receive_exactly(len(data)) == data
                    writer.get()
                assert user.client.socket.version() == "TLSv1.3"
            assert reported.names() == ["connect", "TLS handshake", "ping"]


def case_a_certificate_that_nobody_vouches_for_is_a_failure():
    with tempfile.TemporaryDirectory() as folder:
        server_side, _ = certificates(folder)
        with user_of(echo, tls=server_side) as (user, reported):
            user.client.address = Address.parse(f"tls://{user.host}")
            with raises(RequestFailed, "CERTIFICATE_VERIFY_FAILED"):
                user.client.send(b"x")
            assert user.client.socket is None
    assert reported.failed() == ["TLS handshake"]


def case_a_certificate_of_another_name_is_a_failure():
    with tempfile.TemporaryDirectory() as folder:
        server_side, trusting = certificates(folder)
        with user_of(echo, tls=server_side) as (user, _):
            user.tls = trusting
            with raises(RequestFailed, "certificate is not valid for '127.0.0.1'"):
                user.client.send(b"x")


def case_a_server_that_does_not_shake_hands_runs_into_the_time_out():
    with user_of(lambda conn: conn.server.stopping_event.wait(SOON), tls=None) as (user, reported):
        user.tls, user.connect_timeout = insecure_context(), 0.1
        with raises(RequestFailed, "no TLS within 0.1 s"):
            user.client.connect()
    assert reported.failed() == ["TLS handshake"]


def case_tls_may_begin_later():
    with tempfile.TemporaryDirectory() as folder:
        server_side, _ = certificates(folder)

        def handler(conn):
            assert conn.recv_until() == b"STARTTLS\n"
            conn.sendall(b"GO\n")
            conn.start_tls(server_side)
            echo(conn)

        def on_connect(self):
            self.client.send(b"STARTTLS\n")
            assert self.client.receive_until() == b"GO\n"
            self.tls = insecure_context()
            self.client.start_tls("STARTTLS")
            self.tls = False

        with user_of(handler, on_connect=on_connect) as (user, reported):
            user.client.send(b"x")
            assert user.client.receive() == b"x"
            assert user.client.socket.version()
        assert reported.names() == ["connect", "send", "receive", "STARTTLS", "send", "receive"]


def case_what_came_before_a_handshake_is_not_taken_for_encrypted():
    with user_of(lambda conn: conn.sendall(b"GO\nSMUGGLED\n")) as (user, reported):
        user.client.receive_until()
        with raises(RequestFailed, "before the TLS handshake"):
            user.client.start_tls()
    assert reported.failed() == ["TLS handshake"]


# -- proxies -----------------------------------------------------------------------------------------------------------


@contextmanager
def tunnel_user(user_class, proxy, target):
    """A user of the locustfile that goes through a proxy with this handler, and what it reports."""
    environment = Environment(events=Events())
    reported = Reported()
    environment.events.request.add_listener(lambda **event: reported.append(event))
    server = Server("127.0.0.1:0", proxy)
    server.start()
    environment.parsed_options = argparse.Namespace(
        proxy_server=server.address, target=target, echo_server=None, size=16, pace=1.0
    )
    user = user_class(environment)
    try:
        yield user, reported
    finally:
        user.client.close()
        server.halt()


def case_socks5_destinations_are_addresses_or_encoded_names():
    for target, where in [
        ("127.0.0.1:7", b"\x01\x7f\x00\x00\x01\x00\x07"),
        ("[2001:db8::1]:7", b"\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\x00\x07"),
        ("example.org:7", b"\x03\x0bexample.org\x00\x07"),
        ("b\xfccher.example:7", b"\x03\x15xn--bcher-kva.example\x00\x07"),
    ]:
        asked = []

        def proxy(conn, where=where, asked=asked):
            assert conn.recv_exactly(3) == b"\x05\x01\x00"
            conn.sendall(b"\x05\x00")
            asked.append(conn.recv_exactly(3 + len(where)))
            conn.sendall(b"\x05\x00\x00\x04" + bytes(18))  # as from an IPv6 address
            echo(conn)

        with tunnel_user(locustfile.Socks5User, proxy, target) as (user, reported):
            user.tunnel()
            assert reported.names() == ["SOCKS5 tunnel"] + ["echo through SOCKS5"] * 5, target
            assert reported.failed() == []
            assert asked == [b"\x05\x01\x00" + where], target


def case_connect_destinations_are_authorities():
    for target, authority in [
        ("127.0.0.1:7", b"127.0.0.1:7"),
        ("[2001:db8::1]:7", b"[2001:db8::1]:7"),
        ("b\xfccher.example:7", b"xn--bcher-kva.example:7"),
    ]:
        asked = []

        def proxy(conn, asked=asked):
            asked.append(bytes(conn.recv_until(b"\r\n\r\n", 4096)))
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            echo(conn)

        with tunnel_user(locustfile.HttpTunnelUser, proxy, target) as (user, reported):
            user.tunnel()
            assert reported.failed() == []
            assert asked == [b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (authority, authority)]


def case_no_destination_for_a_proxy():
    for host in ("a" * 300, "x." * 140 + "example"):
        with raises(ValueError):
            tunnels.socks5_request(host, 1)


def case_urls_of_http_users():
    for text, url in [
        ("localhost:80", "http://localhost:80"),
        ("tcp://localhost:80", "http://localhost:80"),
        ("tls://[::1]:443", "https://[::1]:443"),
        ("https://example.org", "https://example.org"),
    ]:
        assert tunnels.http_url(text) == url
    with raises(ValueError, "HTTP users need HOST:PORT, got 'unix:/x'"):
        tunnels.http_url("unix:/x")


# -- shapes and criteria -----------------------------------------------------------------------------------------------


def users_over_time(shape, users=100, seconds=100):
    environment = Environment(events=Events(), user_classes=[User])
    environment.parsed_options = type("Options", (), {"num_users": users, "spawn_rate": 7, "run_time": seconds})
    shape.runner = environment.create_local_runner()
    counts = []
    for second in range(seconds):
        shape.get_run_time = lambda second=second: second + 0.5
        counts.append(shape.tick())
    shape.get_run_time = lambda: seconds
    assert shape.tick() is None
    assert {rate for _, rate in counts} == {7}
    return [count for count, _ in counts]


def case_shapes():
    steps = users_over_time(shapes.Steps())
    assert steps == sorted(steps)
    assert sorted(set(steps)) == [20, 40, 60, 80, 100]
    spikes = users_over_time(shapes.Spikes())
    assert set(spikes) == {10, 100}
    assert sum(a < b for a, b in itertools.pairwise(spikes)) == 3
    soak = users_over_time(shapes.Soak())
    assert max(soak[0], soak[-1]) < 20
    assert set(soak[6:94]) == {100}
    assert min(users_over_time(shapes.Spikes(), users=1)) == 1


def case_criteria():
    environment = Environment(events=Events())
    stats = environment.stats
    assert pass_criteria.judge(stats, 0.5, None, None) == ["0 requests, expected at least 1"]
    for number in range(100):
        stats.log_request("TCP", "quick", 5, 10)
        stats.log_request("TCP", "slow", 90 if number < 98 else 400, 10)
    stats.log_error("TCP", "slow", OSError("x"))
    assert pass_criteria.judge(stats, 0.005, 400, 200) == []
    assert pass_criteria.judge(stats, 0.004, 399, 201) == [
        "200 requests, expected at least 201",
        "1 of 200 requests failed, 0.50%; allowed: 0.40%",
        "99 % of TCP slow within 400 ms, allowed: 399 ms",
    ]
    assert pass_criteria.judge(stats, None, 1000, None) == ["1 of 200 requests failed, 0.50%; allowed: 0.00%"]


def case_mistakes_in_criteria():
    for kind, good, bad in [
        (pass_criteria.ratio, ("0", "1", "0.01", "1%", "100%"), ("", "-1", "2", "101%", "nan", "x", "%")),
        (pass_criteria.milliseconds, ("1", "0.5"), ("", "0", "-1", "nan", "inf", "1ms")),
        (pass_criteria.count, ("0", "7"), ("", "-1", "1.5", "x")),
    ]:
        for text in good:
            kind(text)
        for text in bad:
            with raises(argparse.ArgumentTypeError, f"got {text!r}"):
                kind(text)
    assert pass_criteria.ratio("1%") == 0.01


def main():
    for line in sys.stdin:
        try:
            with gevent.Timeout(25):
                globals()[line.strip()]()
            answer = None
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
