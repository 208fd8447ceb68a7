"""Clients are told to go elsewhere before the server ends their connections: `Server.draining`."""

import http.client
import signal

import gevent
import pytest

from gtcpserver import Server, from_wsgi
from gtcpserver.monitoring import Monitor
from gtcpserver.static_files import StaticFiles
from kit.patience import SOON
from kit.supervised import masters, wait_until

APP = """
from gtcpserver import from_wsgi

def application(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

handler = from_wsgi(application)
"""


def application(environ, start_response):
    start_response("200 OK", [("Content-Length", "2"), ("Connection", "keep-alive")])
    return [b"ok"]


@pytest.fixture(params=["files", "wsgi"])
def handler(request, tmp_path):
    (tmp_path / "index.html").write_text("ok")
    return from_wsgi(application) if request.param == "wsgi" else StaticFiles(tmp_path)


class Client:
    """An HTTP client that keeps its connection."""

    def __init__(self, port):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
        self._connection.connect()
        self.sock = self._connection.sock

    def ask(self):
        """The status, and whether the connection is kept."""
        self._connection.request("GET", "/")
        answer = self._connection.getresponse()
        assert answer.read() == b"ok"
        return answer.status, not answer.will_close


def test_answers_say_close_before_a_stop_begins(serve, handler, in_thread):
    server = serve(handler)
    client = in_thread(Client, server.port)
    assert in_thread(client.ask) == (200, True)
    server.draining = True
    assert in_thread(client.ask) == (200, False)
    late = in_thread(Client, server.port)  # it serves, all the same
    assert in_thread(late.ask) == (200, False)


def test_a_request_that_is_here_already_is_answered_before_the_connection_ends(serve, handler, in_thread):
    server = serve(handler)
    client = in_thread(Client, server.port)
    server.draining = True
    in_thread(client.sock.sendall, 2 * b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answers = in_thread(lambda: client.sock.makefile("rb").read())
    assert answers.count(b" 200 OK") == 2
    assert answers.count(b"Connection: close") == 1


def test_an_answer_that_a_stop_finds_unfinished_says_close(serve, in_thread, spawn_thread):
    begun, go = gevent.event.Event(), gevent.event.Event()

    def slow(environ, start_response):
        begun.set()
        go.wait(SOON)
        return application(environ, start_response)

    server = serve(from_wsgi(slow))
    client = in_thread(Client, server.port)
    asked = spawn_thread(client.ask)
    assert begun.wait(SOON)
    stop = gevent.spawn(server.stop, SOON)
    assert server.stopping_event.wait(SOON)
    go.set()
    assert asked.get(timeout=SOON) == (200, False)
    assert stop.get(timeout=SOON).ended == 0


def test_a_request_that_has_come_is_served_though_the_answer_before_it_promised_to_keep(serve, in_thread):
    """The first answer left before the stop; the second request came before the handler looked for it."""
    go, begun = gevent.event.Event(), gevent.event.Event()

    def body():
        yield b"o"
        begun.set()
        go.wait(SOON)
        yield b"k"

    def slow(environ, start_response):
        start_response("200 OK", [("Content-Length", "2")])
        return body()

    server = serve(from_wsgi(slow))
    client = in_thread(Client, server.port)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    in_thread(client.sock.sendall, 2 * request)
    assert begun.wait(SOON)
    stop = gevent.spawn(server.stop, SOON)
    assert server.stopping_event.wait(SOON)
    go.set()
    answers = in_thread(lambda: client.sock.makefile("rb").read())
    assert answers.count(b"200 OK") == 2
    assert answers.count(b"Connection: close") == 1
    assert stop.get(timeout=SOON).ended == 0


def test_readyz_says_so(serve, in_thread):
    server = serve(lambda conn: None)
    with Monitor(server, "127.0.0.1:0") as monitor:

        def ask():
            connection = http.client.HTTPConnection(monitor.address, timeout=SOON)
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert in_thread(ask) == (200, b"ready\n")
        server.draining = True
        assert in_thread(ask) == (503, b"draining\n")


def test_it_begins_with_the_stop_where_nothing_else_began_it():
    server = Server("127.0.0.1:0", lambda conn: None)
    server.start()
    assert not server.draining
    server.stop(SOON)
    assert server.draining


@pytest.mark.slow
def test_workers_tell_clients_from_the_first_moment_of_a_drain_delay(tmp_path):
    with masters(tmp_path) as start:
        master = start("--workers", "1", "--drain-delay", "60", app=APP)
        client = Client(master.port)
        assert client.ask() == (200, True)
        master.send_signal(signal.SIGTERM)
        wait_until(lambda: client.ask() == (200, False))
        assert Client(master.port).ask() == (200, False)
        assert master.stop() == 0  # the second SIGTERM does not wait


@pytest.mark.slow
def test_a_reload_in_which_connections_move_sends_nobody_away(tmp_path):
    with masters(tmp_path) as start:
        master = start("--workers", "1", "--handover", "--probation", "0", app=APP)
        client = Client(master.port)
        assert client.ask() == (200, True)
        master.ask("reload")
        assert client.ask() == (200, True)
