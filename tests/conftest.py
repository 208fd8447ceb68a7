"""What the tests share: servers that are gone at the end of a test, and clients that know nothing of gevent.

The tests' own greenlet runs the server's event loop whenever it waits, so it must never wait in a plain socket:
`in_thread(sock.recv, 100)` does that in a native thread.
"""

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from gevent import socket as gevent_socket
from gevent.threadpool import ThreadPool
from hypothesis import HealthCheck, settings

import gtcpserver
from gtcpserver import Server, StreamServer

pytest.register_assert_rewrite("kit")

from kit.handing import close_lines  # noqa: E402
from kit.patience import SOON  # noqa: E402
from kit.waiting import wait_until  # noqa: E402

pytest_plugins = ["injection.started", "kit.acme_fixtures", "kit.selection", "kit.watchdog"]

# An ordinary user's PATH has no sshd, nginx or ip.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"

# The same examples each time, and no judgement of how long a busy machine takes for them. To look further:
# HYPOTHESIS_PROFILE=default.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_report_header(config):
    return f"gtcpserver: {'compiled' if gtcpserver.compiled else f'pure Python ({gtcpserver.why_pure})'}"


def pytest_configure(config):
    # A shell starts what it puts into the background with SIGINT ignored, and nohup(1) with SIGHUP. All that tests
    # start would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """What one test configures is not the next one's."""
    ours = [logging.getLogger(name) for name in ("gtcpserver", "gtcpserver.access")]
    before = [(one, one.level, one.propagate, one.disabled, one.handlers[:]) for one in ours]
    yield
    for one, level, propagate, disabled, handlers in before:
        one.setLevel(level)
        one.propagate, one.disabled, one.handlers[:] = propagate, disabled, handlers


@pytest.fixture(scope="session")
def _threads():
    threads = ThreadPool(64)
    yield threads
    threads.kill()


@pytest.fixture
def spawn_thread(_threads):
    """`spawn_thread(function, *args)` runs it in a native thread; `.get(timeout=SOON)` waits for what it returns."""
    return _threads.spawn


@pytest.fixture
def in_thread(_threads):
    """`in_thread(function, *args)` runs it in a native thread while the event loop goes on, and returns its value."""
    return lambda function, *args: _threads.spawn(function, *args).get(timeout=SOON)


@pytest.fixture
def need_descriptors():
    """`need_descriptors(n)` raises the soft limit for this test, or skips it where the hard one is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def need(number):
        if number > hard != resource.RLIM_INFINITY:
            pytest.skip(f"needs {number} descriptors, and ulimit -Hn is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))

    yield need
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def access_records(caplog):
    """`access_records(n)` waits for n lines of the access log, and returns all there are."""
    caplog.set_level(logging.INFO, "gtcpserver.access")

    def found(number):
        records = [record for record in caplog.records if record.name == "gtcpserver.access"]
        return records if len(records) >= number else None

    return lambda number=1: wait_until(lambda: found(number))


@pytest.fixture
def lines(access_records):
    """`lines(n)`: the same, each as a dict of its fields."""
    return lambda number=1: [record.access for record in access_records(number)]


@pytest.fixture
def serve():
    """`serve(handler, address="127.0.0.1:0", **options)` starts a Server, which is halted after the test."""
    servers = []

    def start(handler, address="127.0.0.1:0", **options):
        server = Server(address, handler, **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.halt()
    for server in servers:
        close_lines(server)


@pytest.fixture
def serve_stream():
    """`serve_stream(handle, **options)` starts a StreamServer, which is stopped after the test."""
    servers = []

    def start(handle, listener=("127.0.0.1", 0), server_class=StreamServer, **options):
        server = server_class(listener, handle, **options)
        servers.append(server)
        server.start()
        server.address_text = f"127.0.0.1:{server.server_port}"
        return server

    yield start
    for server in servers:
        server.stop(timeout=0.1)


@pytest.fixture
def connect():
    """`connect(server)` gives a plain blocking socket that is connected; it is closed after the test."""
    clients = []

    def connect_to(server, receive_buffer=None):
        address = server if isinstance(server, str) else server.address
        if address.startswith("unix:"):
            client = socket.socket(socket.AF_UNIX)
            target = "\0" + address[6:] if address.startswith("unix:@") else address[5:]
        else:
            client = socket.socket(socket.AF_INET6 if address.startswith("[") else socket.AF_INET)
            host, _, port = address.rpartition(":")
            target = ({"*": "127.0.0.1"}.get(host, host.strip("[]")), int(port))
        clients.append(client)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(SOON)
        client.connect(target)
        return client

    yield connect_to
    for client in clients:
        client.close()


@pytest.fixture
def listening():
    """A listening socket of gevent, without a server."""
    with gevent_socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.fixture
def python():
    """`python(source, *args, **popen_options)` starts a Python process; it is killed after the test."""
    processes = []

    def start(source, *args, **options):
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        options.setdefault("stdin", subprocess.PIPE)
        options.setdefault("env", {**os.environ, "PYTHONUNBUFFERED": "1"})
        command = [sys.executable, "-c", textwrap.dedent(source), *map(str, args)]
        process = subprocess.Popen(command, **options)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
