"""Handlers written for the standard library's socketserver, and WSGI applications, unchanged on our server."""

import gc
import http.client
import http.server
import logging
import logging.handlers
import os
import pickle
import re
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import weakref
import wsgiref.simple_server
import xmlrpc.client
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.validate import validator
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

import gevent
import pytest
import trustme

from gtcpserver import ConfigError, ListenConfig, TLSConfig
from gtcpserver.adapters import from_socketserver, from_wsgi
from kit.clients import converse
from kit.commands import run_command
from kit.patience import SOON
from kit.waiting import wait_until


class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())


class Impatient(Upper):
    timeout = 0.1
    disable_nagle_algorithm = True


class WhoAmI(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(repr((self.client_address, self.server.server_address)).encode())


def test_stream_and_base_handlers(serve, connect, in_thread):
    assert in_thread(converse, connect(serve(from_socketserver(Upper))), b"a\nb\n" * 10_000) == b"A\nB\n" * 10_000
    client = connect(serve(from_socketserver(WhoAmI)))
    assert in_thread(client.recv, 1000) == repr((client.getsockname(), client.getpeername())).encode()


def test_the_handlers_own_timeout_holds(serve, connect, in_thread):
    server = serve(from_socketserver(Impatient))
    assert in_thread(connect(server).recv, 10) == b""
    wait_until(lambda: server.stats().timeouts == 1)


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_http_server(serve, in_thread, tmp_path, protocol):
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)

    class Files(http.server.SimpleHTTPRequestHandler):
        protocol_version = protocol

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    server = serve(from_socketserver(Files))

    def fetch():
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SOON)
        found = []
        for path in ("/file", "/", "/none"):
            client.request("GET", path)
            answer = client.getresponse()
            found.append((answer.status, answer.read()))
        client.close()
        return found

    file, listing, none = in_thread(fetch)
    assert file == (200, content)
    assert none[0] == 404
    assert b"file" in listing[1]
    assert server.accepted_connections == (3 if protocol == "HTTP/1.0" else 1)


def test_a_stop_closes_http_connections_that_wait_for_a_request(serve, connect, in_thread):
    class Hello(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    for handler in (from_socketserver(Hello), from_wsgi(hello)):
        server = serve(handler)
        client = connect(server)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert in_thread(client.recv, 1000).startswith(b"HTTP/1.1 20")
        wait_until(lambda server=server: server.stats().idle == 1)
        report = gevent.spawn(server.stop, SOON).get(timeout=SOON / 2)
        assert (report.finished, report.ended) == (1, 0)


def test_xmlrpc(serve, in_thread):
    dispatcher = SimpleXMLRPCServer(("", 0), SimpleXMLRPCRequestHandler, logRequests=False, bind_and_activate=False)
    dispatcher.register_function(pow)
    dispatcher.server_close()
    server = serve(from_socketserver(SimpleXMLRPCRequestHandler, dispatcher))

    def call():
        with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{server.port}/RPC2") as proxy:
            return [proxy.pow(2, number) for number in range(5)]

    assert in_thread(call) == [1, 2, 4, 8, 16]


def test_a_receiver_of_log_records(serve, in_thread):
    seen = []

    class Receiver(socketserver.StreamRequestHandler):  # as the standard library's logging cookbook has it
        def handle(self):
            while len(head := self.connection.recv(4)) == 4:
                size = struct.unpack(">L", head)[0]
                data = b""
                while len(data) < size:
                    data += self.connection.recv(size - len(data))
                seen.append(logging.makeLogRecord(pickle.loads(data)).getMessage())

    server = serve(from_socketserver(Receiver))

    def send():
        handler = logging.handlers.SocketHandler("127.0.0.1", server.port)
        logger = logging.Logger("remote")
        logger.addHandler(handler)
        for number in range(10):
            logger.warning("message %d", number)
        handler.close()

    in_thread(send)
    wait_until(lambda: len(seen) == 10)
    assert seen == [f"message {number}" for number in range(10)]


def test_wsgirefs_handler(serve, in_thread):
    holder = wsgiref.simple_server.WSGIServer(("", 0), WSGIRequestHandler, bind_and_activate=False)
    holder.server_close()
    holder.server_name, holder.server_port = "example.com", 80
    holder.setup_environ()
    holder.set_app(validator(hello))
    server = serve(from_socketserver(WSGIRequestHandler, holder))
    ((status, headers, body),) = in_thread(ask, server.port, [("GET", "/", None)])
    assert (status, body) == (200, b"hello")
    assert headers["Server"].startswith("WSGIServer/")


@pytest.mark.parametrize("own_server", [False, True])
def test_a_handler_may_shut_its_server_down(serve, connect, in_thread, own_server):
    class Last(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.server.shutdown()
            self.wfile.write(b"bye")

    holder = None
    if own_server:
        holder = socketserver.ThreadingTCPServer(("", 0), Last, bind_and_activate=False)
        holder.server_close()
    server = serve(from_socketserver(Last, holder))
    client = connect(server)
    assert in_thread(converse, client, b"x\n") == b"bye"
    server.wait_stopped()
    assert (server.stop().ended, server.stats().handler_errors) == (0, 0)


def test_a_socket_that_is_detached_is_the_handlers(serve, connect, in_thread):
    taken = []

    class Keep(socketserver.StreamRequestHandler):
        def handle(self):
            taken.append(self.request.detach())

    server = serve(from_socketserver(Keep))
    client = connect(server)
    wait_until(lambda: taken)
    wait_until(lambda: server.active_connections == 0)
    with socket.socket(fileno=taken[0]) as sock:
        sock.setblocking(True)
        in_thread(sock.sendall, b"still there")
        assert in_thread(client.recv, 100) == b"still there"
    assert in_thread(client.recv, 100) == b""
    assert server.stats().handler_errors == 0


def test_what_setup_does_to_the_socket_holds(serve, connect, in_thread):
    seen = []

    class Sets(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True
        wbufsize = -1  # flushed by finish()

        def setup(self):
            super().setup()
            self.request.settimeout(0.1)

        def handle(self):
            seen.append(self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.wfile.write(b"wait")
            try:
                self.rfile.read(1)
            except TimeoutError:
                seen.append("timeout")

    server = serve(from_socketserver(Sets), listen=ListenConfig(no_delay=False))
    assert in_thread(connect(server).recv, 10) == b"wait"
    assert seen == [1, "timeout"]


@pytest.mark.slow
def test_nothing_is_left_of_handlers_when_connections_have_ended(serve, connect, in_thread):
    instances = weakref.WeakSet()

    class Counted(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            instances.add(self)

        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = serve(from_socketserver(Counted))
    gc.collect()
    gc.disable()  # it would hide a cycle
    try:
        for _ in range(20):
            client = connect(server)
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert in_thread(client.recv, 1000).startswith(b"HTTP/1.1 204")
            client.close()
        wait_until(lambda: server.active_connections == 0)
        assert server.accepted_connections == 20
        wait_until(lambda: not instances, 2)
    finally:
        gc.enable()


def test_what_goes_wrong_in_a_handler_is_logged_as_ever(serve, connect, in_thread, caplog):
    class Broken(socketserver.StreamRequestHandler):
        def handle(self):
            raise RuntimeError("as expected")

    server = serve(from_socketserver(Broken))
    assert in_thread(connect(server).recv, 1) == b""
    wait_until(lambda: server.stats().handler_errors == 1)
    assert "as expected" in caplog.text


@pytest.mark.parametrize("wrong", [None, int, Upper.handle, "x"])
def test_what_is_no_handler_class(wrong):
    with pytest.raises(ConfigError, match=r"handler_class must be a subclass of socketserver\.Base"):
        from_socketserver(wrong)


def test_classes_for_udp_and_server_classes_are_told():
    class Datagram(socketserver.DatagramRequestHandler):
        pass

    with pytest.raises(ConfigError, match="must be made for TCP, got Datagram: a DatagramRequestHandler is for UDP"):
        from_socketserver(Datagram)
    server = socketserver.UDPServer(("", 0), Upper, bind_and_activate=False)
    server.server_close()
    with pytest.raises(ConfigError, match=r"server must be made for TCP, got <socketserver\.UDPServer"):
        from_socketserver(Upper, server)
    with pytest.raises(ConfigError, match="must be a handler class, got the server class HTTPServer"):
        from_socketserver(http.server.HTTPServer)


# -- WSGI --------------------------------------------------------------------------------------------------------------


def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"hello"]


def tell(environ, start_response):
    """Sends back what came, and what it is told."""
    body = environ["wsgi.input"].read()
    names = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "SERVER_PORT", "wsgi.url_scheme", "REMOTE_ADDR")
    start_response(
        "200 OK", [("Content-Type", "text/plain"), *((f"X-{i}", str(environ[n])) for i, n in enumerate(names))]
    )
    yield body
    yield b"!"


def ask(port, requests, context=None):
    kind = http.client.HTTPConnection if context is None else http.client.HTTPSConnection
    more = {} if context is None else {"context": context}
    client = kind("localhost", port, timeout=SOON, **more)
    found = []
    for method, path, body in requests:
        client.request(method, path, body, encode_chunked=True)
        answer = client.getresponse()
        found.append((answer.status, dict(answer.getheaders()), answer.read()))
    client.close()
    return found


def test_wsgi_over_one_connection(serve, in_thread):
    server = serve(from_wsgi(tell))
    big = os.urandom(1_000_000)
    requests = [("GET", "/a%20b?c=d", None), ("POST", "/", big), ("PUT", "/", iter([b"in ", b"chunks"]))]
    first, second, third = in_thread(ask, server.port, requests)
    assert first[2] == b"!"
    assert [first[1][f"X-{i}"] for i in range(6)] == ["GET", "/a b", "c=d", str(server.port), "http", "127.0.0.1"]
    assert second[2] == big + b"!"
    assert third[2] == b"in chunks!"
    assert server.accepted_connections == 1


def test_the_standard_librarys_validator_has_nothing_to_say(serve, in_thread):
    ((status, _, body),) = in_thread(ask, serve(from_wsgi(validator(hello))).port, [("GET", "/", None)])
    assert (status, body) == (200, b"hello")


@pytest.mark.slow
def test_wsgi_over_tls_and_a_unix_socket(serve, connect, in_thread, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "x")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    server = serve(from_wsgi(tell), tls=TLSConfig(tmp_path / "x"))
    ((_, headers, _),) = in_thread(ask, server.port, [("GET", "/", None)], trust)
    assert headers["X-4"] == "https"
    client = connect(serve(from_wsgi(hello), f"unix:{tmp_path}/socket"))
    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert in_thread(converse, client, b"").endswith(b"\r\n\r\nhello")


def test_a_stop_finishes_the_request_that_is_under_way(serve, connect, in_thread):
    begun, go_on = gevent.event.Event(), gevent.event.Event()

    def slow(environ, start_response):
        begun.set()
        go_on.wait()
        return hello(environ, start_response)

    server = serve(from_wsgi(slow))
    client = connect(server)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    begun.wait(SOON)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.stopping)
    go_on.set()
    assert in_thread(converse, client, b"").endswith(b"hello")
    assert stopping.get(timeout=SOON).ended == 0


def test_an_application_that_fails_is_a_500_and_pipelined_requests_are_answered(serve, connect, in_thread, caplog):
    def fail(environ, start_response):
        raise RuntimeError("as expected")

    client = connect(serve(from_wsgi(fail)))
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert in_thread(client.recv, 1000).startswith(b"HTTP/1.1 500 ")
    assert "as expected" in caplog.text
    client = connect(serve(from_wsgi(hello)))
    answer = in_thread(converse, client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    assert answer.count(b"hello") == 3
    client = connect(serve(from_wsgi(hello)))
    assert in_thread(converse, client, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_many_clients_at_once(serve, in_thread):
    together = threading.Barrier(20)
    server = serve(from_wsgi(hello))

    def one():
        together.wait(SOON)
        return ask(server.port, [("GET", "/", None)] * 5)

    def all_of_them():
        found = []
        threads = [threading.Thread(target=lambda: found.extend(one())) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        return found

    assert [answer[2] for answer in in_thread(all_of_them)] == [b"hello"] * 100


def test_what_is_no_application():
    with pytest.raises(ConfigError, match="application 'x' is not callable, it is a str"):
        from_wsgi("x")


# -- the command -------------------------------------------------------------------------------------------------------

APP = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--workers", "1"]])
@pytest.mark.parametrize(
    ("words", "answer"),
    [(["http.server:SimpleHTTPRequestHandler"], b"def app"), (["app.py:app", "--wsgi"], b"hello")],
)
def test_the_command_serves_them(in_thread, tmp_path, words, answer, more):
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "gtcpserver", "serve", *words, "--bind", "127.0.0.1:0", *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:

            def listening():
                while line := process.stderr.readline():
                    if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                        return int(found[1])
                raise AssertionError("it does not listen")

            ((status, _, body),) = in_thread(ask, in_thread(listening), [("GET", "/app.py", None)])
            assert status == 200
            assert answer in body
        finally:
            process.terminate()
            in_thread(process.communicate)


@pytest.mark.slow
def test_the_command_says_what_is_no_application(tmp_path):
    (tmp_path / "app.py").write_text("def one(x): pass")
    done = run_command("serve", "app.py:one", "--wsgi", cwd=tmp_path)
    assert done.returncode == 2
    assert "app.py:one must take two arguments, the environment and start_response; it takes (x)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["socketserver:DatagramRequestHandler", "http.server:HTTPServer"])
def test_the_command_says_what_it_cannot_serve(reference):
    done = run_command("serve", reference)
    assert done.returncode == 2
    assert done.stderr.startswith("gtcpserver: MODULE:HANDLER: must be ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_http_servers_lines_cannot_stop_it_when_nobody_reads_them(in_thread, tmp_path):
    """A pipe is full after 64 KiB: http.server itself writes to stderr, and waits."""
    command = [sys.executable, "-m", "gtcpserver", "serve", "http.server:SimpleHTTPRequestHandler"]
    with subprocess.Popen([*command, "--bind", "127.0.0.1:0"], stderr=subprocess.PIPE, cwd=tmp_path) as process:
        try:

            def use():
                said = b""
                while not (found := re.search(rb"listening on 127\.0\.0\.1:(\d+)", said)):
                    said += os.read(process.stderr.fileno(), 4096)
                for _ in range(30):
                    # 4 kB in the log each
                    assert ask(int(found[1]), [("GET", "/" + "x" * 4000, None)])[0][0] == 404
                said = os.read(process.stderr.fileno(), 8192)
                assert re.search(rb'INFO gtcpserver\.http: 127\.0\.0\.1 "GET /xxx', said)

            in_thread(use)
        finally:
            process.terminate()
            in_thread(process.communicate)
