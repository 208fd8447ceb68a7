"""gtcpserver.testing and its pytest plugin: servers, clients, certificates for users' own tests."""

import http.client
import os
import socket
import ssl
import subprocess
import sys
import textwrap

import gevent
import pytest

from gtcpserver import ConfigError, ProxyProtocol, TLSConfig
from gtcpserver.proxy_protocol import ProxyHeader
from gtcpserver.testing import HandlerFailed, certificates, connect, in_thread, serving
from kit.patience import SOON


def echo(conn):
    while data := conn.recv(65536):
        conn.sendall(data)


# -- without pytest ----------------------------------------------------------------------------------------------------


def test_a_server_serves_while_its_client_waits():
    with serving(echo) as server, connect(server) as client:
        client.sendall(b"one\ntwo\nthree")
        assert client.recv_until(b"\n") == b"one\n"
        assert client.recv_exactly(2) == b"tw"
        client.half_close()
        assert client.recv_all() == b"o\nthree"
    assert server.stopping
    assert server.stats().accepted == 1


@pytest.mark.parametrize("address", ["[::1]:0", "*:0", "unix:{}/s"])
def test_any_address_will_do(address, tmp_path):
    with serving(echo, address.format(tmp_path)) as server, connect(server) as client:
        client.sendall(b"x")
        assert client.recv() == b"x"


def test_a_handler_that_raised_fails_the_block_and_is_its_cause():
    def handler(conn):
        raise KeyError("lost")

    says = r"a handler raised KeyError: 'lost' \(1 more exceptions\)"
    with pytest.raises(HandlerFailed, match=says) as caught, serving(handler) as server:
        for _ in range(2):
            with connect(server) as client:
                assert client.recv() == b""
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_handler_whose_client_left_without_waiting_has_its_time_to_fail():
    def handler(conn):
        conn.recv(1)
        raise KeyError("lost")

    with pytest.raises(HandlerFailed), serving(handler) as server:
        client = connect(server)
        client.sendall(b"x")
        client.close()


def test_errors_may_be_allowed_and_are_kept_then():
    def handler(conn):
        raise KeyError("lost")

    with serving(handler, allow_errors=True) as server, connect(server) as client:
        client.recv()
    assert [repr(error) for error in server.errors] == ["KeyError('lost')"]


def test_what_the_client_is_to_blame_for_is_no_error_of_the_handler():
    with serving(echo, timeout=0.01) as server:
        client = connect(server)
        client.sendall(b"x" * 100)
        client.recv_exactly(100)
        client.reset()
        with connect(server) as silent:
            assert silent.recv() == b""
    assert server.stats().resets == server.stats().timeouts == 1
    assert server.errors == []


def test_a_user_s_on_error_is_called_too():
    seen = []

    def handler(conn):
        raise KeyError("lost")

    def on_error(conn, error):
        seen.append(error)

    with serving(handler, allow_errors=True, on_error=on_error) as server, connect(server) as client:
        client.recv()
    assert server.errors == seen


def test_an_error_of_the_block_itself_comes_through():
    def handler(conn):
        raise KeyError("lost")

    with pytest.raises(ZeroDivisionError), serving(handler) as server, connect(server) as client:
        client.recv()
        raise ZeroDivisionError


def test_a_handler_that_waits_for_something_else_is_ended():
    ended = []

    def handler(conn):
        try:
            gevent.sleep(1000)
        finally:
            ended.append(True)

    with serving(handler, stop_timeout=0.01) as server:
        connect(server).close()
        gevent.sleep(0)
    assert ended == [True]


@pytest.mark.slow
def test_a_handler_that_would_not_end_fails_the_block():
    over = gevent.event.Event()

    def stubborn(conn):
        while not over.is_set():
            try:
                over.wait()
            except gevent.GreenletExit:
                pass

    says = r"1 handler would not end: .* in stubborn, would not end"
    with pytest.raises(HandlerFailed, match=says), serving(stubborn, stop_timeout=0.01) as server:
        connect(server)
    over.set()


def test_blocking_clients_run_in_threads():
    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")

    def get(port):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
        client.request("GET", "/")
        return client.getresponse().read()

    with serving(answer) as server:
        assert in_thread(get, server.port) == b"hello"
        several = [gevent.spawn(in_thread, get, server.port) for _ in range(5)]
        assert [one.get() for one in several] == [b"hello"] * 5


def test_a_thread_s_error_and_its_time_out_are_raised():
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 / 0)
    ours, theirs = socket.socketpair()
    with pytest.raises(TimeoutError, match=r"has not returned within 0\.05 seconds"):
        in_thread(ours.recv, 1, timeout=0.05)
    theirs.close()
    ours.close()


@pytest.mark.slow
def test_tls():
    def handler(conn):
        conn.sendall(conn.tls.server_name.encode() + b" " + conn.recv(10) + b"x" * 100_000)

    with certificates() as made, serving(handler, tls=made.server) as server:
        with connect(server, tls=made.client) as client:
            client.sendall(b"hello")
            assert client.recv_until(b" ") == b"localhost "
            assert client.recv_all() == b"hello" + b"x" * 100_000
            assert client.tls.version() == "TLSv1.3"
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(server, tls=ssl.create_default_context())
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(server, tls=made.client, server_hostname="elsewhere.test")
    assert not made.keyfile.exists()


def test_clients_with_certificates():
    names = []

    def handler(conn):
        names.append(conn.tls.peer_certificate["subject"])

    with certificates() as made:
        config = TLSConfig(made.certfile, made.keyfile, client_auth="required", client_ca=made.ca_file)
        with serving(handler, tls=config) as server:
            with connect(server, tls=made.client_with_certificate("Ada")) as client:
                client.recv()
            with pytest.raises(OSError), connect(server, tls=made.client) as client:
                client.recv()
    assert (("commonName", "Ada"),) in names[0]
    assert len(names) == 1


@pytest.mark.parametrize(
    ("proxy", "address"),
    [
        ("192.0.2.7:4000", ("192.0.2.7", 4000)),
        ("[2001:db8::7]:4000", ("2001:db8::7", 4000, 0, 0)),
        (ProxyHeader(local=True), None),
    ],
)
def test_a_client_behind_a_balancer(proxy, address):
    seen = []

    def handler(conn):
        seen.append((conn.client_address, conn.peer_address))

    balancers = ProxyProtocol(["127.0.0.1"])
    with serving(handler, proxy_protocol=balancers) as server, connect(server, proxy=proxy) as client:
        client.recv()
        ours = client.address
    assert seen == [(address or ours, ours)]


def test_the_client_of_a_proxy_header_must_be_an_address():
    with pytest.raises(ConfigError, match="proxy must be a ProxyHeader, or \"ip:port\", got 'somewhere:1'"):
        connect("127.0.0.1:1", proxy="somewhere:1")


# -- the plugin --------------------------------------------------------------------------------------------------------


def test_fixtures(gtcp_serve, gtcp_connect, gtcp_tls, gtcp_in_thread):
    plain, encrypted = gtcp_serve(echo), gtcp_serve(echo, tls=gtcp_tls.server)
    for client in (gtcp_connect(plain), gtcp_connect(encrypted, tls=gtcp_tls.client)):
        client.sendall(b"hello")
        assert client.recv_exactly(5) == b"hello"

    def blocking():
        with socket.create_connection(("127.0.0.1", plain.port), SOON) as sock:
            sock.sendall(b"x")
            return sock.recv(1)

    assert gtcp_in_thread(blocking) == b"x"


#: pytest without the plugins that this environment has for other tests, half a second of imports.
ONLY_OURS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_gtcpserver"}


def run_pytest(folder, source, **environment):
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    environment |= {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "test_it.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON, cwd=folder, env=environment)


@pytest.mark.slow
def test_the_plugin_imports_nothing_before_a_fixture_is_used_and_fails_a_test_whose_handler_raised(tmp_path):
    done = run_pytest(
        tmp_path,
        """
        import sys

        def handler(conn):
            raise KeyError("lost")

        def test_nothing(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("gtcpserver")
            assert not {"gevent", "gtcpserver", "greenlet"} & sys.modules.keys()

        def test_bad(gtcp_connect, gtcp_serve):
            gtcp_connect(gtcp_serve(handler)).recv()

        def test_told_otherwise(gtcp_connect, gtcp_serve):
            gtcp_connect(gtcp_serve(handler, allow_errors=True)).recv()
        """,
    )
    assert done.returncode == 1
    assert "HandlerFailed: a handler raised KeyError: 'lost'" in done.stdout
    assert 'raise KeyError("lost")' in done.stdout
    assert "3 passed, 1 error" in done.stdout


@pytest.mark.slow
def test_all_of_it_works_in_a_patched_program(tmp_path):
    done = run_pytest(
        tmp_path,
        """
        from gevent import monkey
        monkey.patch_all()

        import socket, threading
        from gtcpserver.testing import check_faults

        lock = threading.Lock()

        def echo(conn):
            while data := conn.recv(65536):
                with lock:
                    conn.sendall(data)

        def test_plain_sockets_of_the_test_itself(gtcp_serve):
            server = gtcp_serve(echo)
            with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"

        def test_threads(gtcp_serve, gtcp_in_thread):
            server = gtcp_serve(echo)
            def blocking():
                with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
                    sock.sendall(b"x")
                    return sock.recv(1)
            assert gtcp_in_thread(blocking) == b"x"

        def test_tls(gtcp_serve, gtcp_connect, gtcp_tls):
            client = gtcp_connect(gtcp_serve(echo, tls=gtcp_tls.server), tls=gtcp_tls.client)
            client.sendall(b"x")
            assert client.recv() == b"x"

        def test_faults():
            report = check_faults(echo, [(b"x", b"x")], leave_out=["unread answers"])
            assert report.ok, report
        """,
        **ONLY_OURS,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
