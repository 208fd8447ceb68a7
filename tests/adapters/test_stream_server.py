"""StreamServer: the drop-in for gevent's. gevent's own tests of its server run on it."""

import subprocess
import sys

import gevent
import gevent.pool
import gevent.server
import gevent.socket
import gevent.ssl
import pytest
import trustme
from gevent.hub import get_hub
from greenlet import getcurrent

import gtcpserver
from gtcpserver import Connection, HandlerPool, StreamServer
from gtcpserver.pool.greenlets import HandlerGreenlet
from kit.patience import SOON
from kit.waiting import wait_until

RUN_GEVENTS_TESTS = """
import sys, unittest
import gevent.server
if sys.argv.pop(1) == "ours":
    import gtcpserver
    gevent.server.StreamServer = gtcpserver.StreamServer
import gevent.tests.test__server as tests
if "gtcpserver" in sys.modules:
    assert tests.StreamServer is tests.Settings.ServerClass is gtcpserver.StreamServer
    assert issubclass(tests.SimpleStreamServer, gtcpserver.StreamServer)
result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromModule(tests))
print(result.testsRun, len(result.skipped), len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses))
"""


@pytest.mark.slow
def test_gevents_own_server_tests_pass():
    outcomes = {}
    for whose in ("gevent", "ours"):
        ran = subprocess.run(
            [sys.executable, "-c", RUN_GEVENTS_TESTS, whose], capture_output=True, text=True, timeout=SOON
        )
        assert ran.stdout, ran.stderr
        outcomes[whose] = tuple(map(int, ran.stdout.split()[-3:]))
        assert outcomes[whose][2] == 0, ran.stderr
    assert outcomes["ours"][0] >= outcomes["gevent"][0] > 30
    assert outcomes["ours"][1] <= outcomes["gevent"][1]


RUN_GEVENTS_WSGI_TESTS = """
import sys, unittest
import gevent.server, gtcpserver
gevent.server.StreamServer = gtcpserver.StreamServer
sys.modules.pop("gevent.pywsgi", None)
import gevent.pywsgi
import gevent.tests.test__pywsgi as tests
assert issubclass(tests.pywsgi.WSGIServer, gtcpserver.StreamServer)
result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromModule(tests))
print(result.testsRun, len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses))
"""


@pytest.mark.slow
def test_gevents_own_wsgi_server_passes_its_tests_on_it():
    ran = subprocess.run([sys.executable, "-c", RUN_GEVENTS_WSGI_TESTS], capture_output=True, text=True, timeout=SOON)
    assert ran.stdout, ran.stderr
    run, failed = map(int, ran.stdout.split()[-2:])
    assert run > 100
    assert failed == 0, ran.stderr


@pytest.fixture
def serve():
    servers = []

    def start(*args, server_class=StreamServer, **options):
        server = server_class(("127.0.0.1", 0), *args, **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop(timeout=0.1)


@pytest.fixture
def connect():
    clients = []

    def connect_to(server):
        client = gevent.socket.create_connection(("127.0.0.1", server.server_port))
        client.settimeout(SOON)
        clients.append(client)
        return client

    yield connect_to
    for client in clients:
        client.close()


def echo(sock, address):
    while data := sock.recv(4096):
        sock.sendall(data)


def test_it_is_a_gevent_server_with_the_same_signature():
    assert issubclass(StreamServer, gevent.server.StreamServer)
    assert gtcpserver.StreamServer is StreamServer


def test_the_handler_gets_our_connection_and_the_address(serve, connect):
    seen = []

    def handle(sock, address):
        seen.append((type(sock), address, type(getcurrent())))
        sock.sendall(b"bye")

    client = connect(serve(handle))
    assert client.recv(10) == b"bye"
    assert client.recv(10) == b""  # closed when the handler has returned
    assert seen == [(Connection, client.getsockname(), HandlerGreenlet)]


def test_greenlets_are_used_again(serve, connect):
    numbers = set()

    def handle(sock, address):
        numbers.add(id(getcurrent()))

    server = serve(handle)
    for _ in range(5):
        assert connect(server).recv(10) == b""
    assert len(numbers) == 1


def test_a_subclass_may_define_handle(serve, connect):
    class Shouting(StreamServer):
        def handle(self, sock, address):
            sock.sendall(sock.recv(100).upper())

    client = connect(serve(server_class=Shouting))
    client.sendall(b"hello")
    assert client.recv(100) == b"HELLO"


def test_connection_class_can_be_set_on_a_subclass(serve, connect):
    class Mine(Connection):
        pass

    class Server(StreamServer):
        connection_class = Mine

        def handle(self, sock, address):
            sock.sendall(type(sock).__name__.encode())

    assert connect(serve(server_class=Server)).recv(100) == b"Mine"


@pytest.mark.parametrize("make_spawn", [lambda: gevent.pool.Pool(2), lambda: HandlerPool(2), lambda: 2])
def test_a_pool_or_a_number_limits_the_handlers(serve, connect, make_spawn):
    begun = []

    def handle(sock, address):
        begun.append(address)
        sock.recv(1)

    server = serve(handle, spawn=make_spawn())
    clients = [connect(server) for _ in range(3)]
    wait_until(lambda: len(begun) == 2)
    gevent.sleep(0.02)
    assert len(begun) == 2
    assert server.full()
    clients[0].sendall(b"x")
    wait_until(lambda: len(begun) == 3)
    for client in clients[1:]:
        client.sendall(b"x")
    assert server.pool.join(SOON)
    for _ in range(3):  # full and free again, more than once
        client = connect(server)
        client.sendall(b"x")
        assert client.recv(1) == b""


def test_spawn_raw(serve, connect):
    client = connect(serve(echo, spawn=gevent.spawn_raw))
    client.sendall(b"hello")
    assert client.recv(10) == b"hello"


def test_spawn_of_ones_own(serve, connect):
    spawned = []

    def spawn(function, *args):
        spawned.append(args)
        return gevent.spawn(function, *args)

    client = connect(serve(echo, spawn=spawn))
    client.sendall(b"hello")
    assert client.recv(10) == b"hello"
    assert len(spawned) == 1


def test_no_spawn_runs_the_handler_in_the_event_loop(serve, connect):
    seen = []

    def handle(sock, address):
        seen.append(getcurrent() is get_hub())
        sock.sendall(b"bye")
        with pytest.raises(AssertionError, match="Impossible to call blocking function"):
            sock.recv(1)

    assert connect(serve(handle, spawn=None)).recv(10) == b"bye"
    assert seen == [True]


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    path = tmp_path_factory.mktemp("tls")
    certificate.private_key_pem.write_to_path(path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(path / "cert.pem")
    server = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(server)
    client = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client, {"keyfile": str(path / "key.pem"), "certfile": str(path / "cert.pem")}


@pytest.mark.parametrize("given_as", ["ssl_context", "files"])
def test_ssl_arguments(serve, connect, tls, given_as):
    server_context, client_context, files = tls
    seen = []

    def handle(sock, address):
        seen.append(type(sock))
        echo(sock, address)

    server = serve(handle, **({"ssl_context": server_context} if given_as == "ssl_context" else files))
    assert server.ssl_enabled
    with client_context.wrap_socket(connect(server), server_hostname="localhost") as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
    assert seen == [Connection]


def test_a_handler_that_fails_is_reported_and_its_connection_closed(serve, connect, monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(kind))

    def handle(sock, address):
        if sock.recv(1) == b"!":
            raise ValueError
        sock.sendall(b"fine")

    server = serve(handle)
    client = connect(server)
    client.sendall(b"!")
    assert client.recv(10) == b""
    client = connect(server)
    client.sendall(b".")
    assert client.recv(10) == b"fine"
    assert reported == [ValueError]


def test_serve_forever_and_stop(connect):
    server = StreamServer(("127.0.0.1", 0), echo)
    serving = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.started)
    client = connect(server)
    client.sendall(b"hello")
    assert client.recv(10) == b"hello"
    server.stop()
    serving.get(timeout=SOON)
    client.sendall(b"still served")  # as gevent's: without a pool handlers run on
    assert client.recv(100) == b"still served"
    with StreamServer(("127.0.0.1", 0), echo) as server:
        server.start()
    assert server.closed


def test_it_takes_a_listening_socket(connect):
    listener = gevent.socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with StreamServer(listener, echo) as server:
        server.start()
        client = connect(server)
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        with pytest.raises(TypeError, match="backlog"):
            StreamServer(listener, echo, backlog=5)


@pytest.mark.slow
def test_swapping_the_class_in_gevents_module_works():
    source = """
import gevent.server, gevent.socket, gtcpserver
gevent.server.StreamServer = gtcpserver.StreamServer
server = gevent.server.StreamServer(("127.0.0.1", 0), lambda sock, address: sock.sendall(b"hello"))
server.start()
print(gevent.socket.create_connection(server.address).recv(10).decode())
"""
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON)
    assert ran.stdout == "hello\n", ran.stderr
