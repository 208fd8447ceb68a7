"""Zero-copy calls that the system refuses: the bytes are copied instead, and what broke never looks complete."""

import errno
import fcntl
import os
import random
import resource
import socket
import ssl

import gevent
import pytest
from gevent import socket as gevent_socket

from gtcpserver import Connection
from gtcpserver.testing.certificates import certificates
from gtcpserver.transfer import PIPES, pipe, recv_to_file, relay, sendfile
from gtcpserver.transfer import disk as disk_module
from gtcpserver.transfer import pipes as pipes_module
from injection.started import Source, receive_all, whole
from injection.strace import needs_strace, rule

DATA = random.Random(1).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def fresh_pipes():
    PIPES.close_unused()
    yield
    assert PIPES.taken == 0
    PIPES.close_unused()


@pytest.fixture
def source():
    server = Source(DATA)
    yield server
    server.close()


FORWARD = """
import gtcpserver.forwarder
serve(Server("127.0.0.1:0", gtcpserver.forwarder.Forwarder(["127.0.0.1:" + sys.argv[1]]), linger=0.5))
"""

FILES = """
def send(conn):
    conn.recv(1)
    conn.sendfile(sys.argv[1])
serve(Server("127.0.0.1:0", send))
"""

RECEIVE = """
def receive(conn):
    size = conn.recv_to_file(sys.argv[1])
    conn.sendall(b"%d" % size)
serve(Server("127.0.0.1:0", receive))
"""

# -- over real processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    ("name", "when"),
    [("EPERM", ""), ("ENOSYS", ""), ("EACCES", "2"), ("ENOMEM", "1"), ("EIO", "2"), ("EINVAL", "3"), ("EPERM", "4+")],
)
def test_a_relay_that_may_not_splice_copies(injected, source, name, when):
    subject = injected(FORWARD, rule("splice", name, when), arguments=[source.port])
    with subject.connect() as client:
        client.sendall(b"x")
        assert receive_all(client) == whole(DATA)
    subject.wait_for_failed_call()
    assert subject.log().count("splice(2) was refused") == 1


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    "injection",
    [
        rule("recvfrom", "ENOMEM", "1"),
        rule("recvfrom", "ENOBUFS", "2+"),
        rule("sendto", "ENOMEM", "1"),
        rule("splice", "ECONNRESET", "3"),
        rule("splice", "ETIMEDOUT", "4"),
    ],
)
def test_a_relay_that_broke_never_ends_in_order(injected, source, injection):
    subject = injected(FORWARD, injection, arguments=[source.port])
    with subject.connect() as client:
        client.sendall(b"x")
        received = receive_all(client)
    subject.wait_for_failed_call()
    assert received.how == "reset" or received == whole(DATA)  # where the call was one after the last byte


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    "injection",
    [
        rule("sendfile", "EPERM"),
        rule("sendfile", "ENOSYS", "2+"),
        rule("sendfile", "ENOMEM", "2"),
        rule("preadv2", "EPERM"),
        rule("preadv2", "ENOMEM", "2"),
    ],
)
def test_a_file_that_may_not_be_sent_by_the_kernel_is_copied(injected, tmp_path, injection):
    file = tmp_path / "file"
    file.write_bytes(DATA)
    subject = injected(FILES, injection, arguments=[file])
    with subject.connect() as client:
        client.sendall(b"x")
        assert receive_all(client) == whole(DATA)
    subject.wait_for_failed_call()


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("injection", [rule("sendfile", "ESTALE", "2"), rule("sendfile", "EOVERFLOW", "2")])
def test_a_file_that_broke_off_never_ends_in_order(injected, tmp_path, injection):
    file = tmp_path / "file"
    file.write_bytes(DATA)
    subject = injected(FILES, injection, arguments=[file])
    with subject.connect() as client:
        client.sendall(b"x")
        received = receive_all(client)
    subject.wait_for_failed_call()
    assert received.how == "reset"


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(("name", "when"), [("EPERM", ""), ("EINVAL", "2"), ("ENOMEM", "3"), ("EIO", "4")])
def test_a_file_is_received_whole_without_splice(injected, tmp_path, name, when):
    file = tmp_path / "file"
    subject = injected(RECEIVE, rule("splice", name, when), arguments=[file])
    with subject.connect() as client:
        client.sendall(DATA)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"%d" % len(DATA)
    assert file.read_bytes() == DATA
    subject.wait_for_failed_call()


# -- call by call ----------------------------------------------------------------------------------------------------


def tcp_pair(cls=Connection):
    with gevent_socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        client = gevent_socket.socket()
        client.connect(listening.getsockname())
        accepted, _ = listening.accept()
    client.settimeout(60)
    return client, cls(fileno=accepted.detach())


def broken(number):
    return OSError(number, os.strerror(number))


class Calls:
    """Stands in for a system call: fails at some calls (counted from 1), or from one on."""

    def __init__(self, real, number, *at, onward=None):
        self._real, self._number, self._at, self._onward, self.count = real, number, at, onward, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count in self._at or (self._onward is not None and self.count >= self._onward):
            raise broken(self._number)
        return self._real(*args, **kwargs)


def relayed(data=DATA, **options):
    """What the client got through a relay, and how its connection ended, and the relay's result."""
    client, a = tcp_pair()
    server, b = tcp_pair()

    def run():
        with a, b:
            return relay(a, b, **options)

    running = gevent.spawn(run)

    def upload():
        server.sendall(data)
        server.shutdown(socket.SHUT_WR)

    sending = gevent.spawn(upload)
    client.shutdown(socket.SHUT_WR)
    received = receive_all(client)
    result = running.get(timeout=60)
    sending.kill()
    for sock in (client, server):
        sock.close()
    return received, result


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("call", ["pipe2", "getrlimit", "fcntl"])
def test_a_relay_that_gets_no_pipe_copies(monkeypatch, call, number):
    module = {"pipe2": os, "getrlimit": resource, "fcntl": fcntl}[call]
    monkeypatch.setattr(module, call, Calls(getattr(module, call), number, onward=1))
    received, result = relayed()
    assert received == whole(DATA)
    assert result.reason == "closed"


def test_a_pipe_that_cannot_be_large_is_small(monkeypatch):
    monkeypatch.setattr(fcntl, "fcntl", Calls(fcntl.fcntl, errno.ENOMEM, 2))
    made = pipes_module.Pipe(1 << 20)
    made.close()
    assert made.size == 1 << 19


@pytest.mark.parametrize("at", range(1, 7))
def test_an_error_that_is_the_connections_is_not_taken_for_a_refusal(monkeypatch, at):
    """A kernel that tells ECONNRESET to splice tells a read that follows that the stream has ended."""
    monkeypatch.setattr(os, "splice", Calls(os.splice, errno.ECONNRESET, at))
    received, result = relayed()
    assert received.how == "reset"
    assert result.reason in ("reset_a", "reset_b")


def test_a_refusal_by_a_connection_that_is_broken_breaks_the_relay(monkeypatch):
    """The kernel tells an error once: after splice has got it, a read finds an end. EACCES is one (RFC 4443 type 1)."""
    server = None
    real = os.splice

    def splice(*args, **kwargs):
        # The source is reset, and splice gets the error in the place of ECONNRESET.
        reset_socket(server)
        try:
            while True:
                real(*args, **kwargs)
        except OSError:
            raise broken(errno.EACCES) from None

    client, a = tcp_pair()
    server, b = tcp_pair()

    def run():
        with a, b:
            return relay(a, b)

    running = gevent.spawn(run)
    server.sendall(bytes(pipes_module.SMALLEST))
    monkeypatch.setattr(os, "splice", splice)
    server.sendall(bytes(100_000))
    received = receive_all(client)
    assert running.get(timeout=60).reason == "reset_b"
    assert received.how == "reset"
    client.close()


def reset_socket(sock):
    sock._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock._sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "buffered"])
@pytest.mark.parametrize("end", ["idle", "kill"])
def test_bytes_that_were_lost_are_never_followed_by_an_end_in_order(way, end):
    client, a = tcp_pair()
    server, b = tcp_pair()

    def run():
        with a, b:
            options = {"pace": lambda direction, size: 0.0} if way == "buffered" else {}
            relay(a, b, idle_timeout=0.1 if end == "idle" else None, **options)

    running = gevent.spawn(run)
    sending = gevent.spawn(server.sendall, bytes(50_000_000))
    if end == "kill":
        gevent.sleep(0.1)
        running.kill()
    running.join()
    sending.kill()
    assert receive_all(client).how == "reset"
    for sock in (client, server):
        sock.close()


def test_a_pipe_that_is_killed_resets_its_sink():
    client, a = tcp_pair()
    server, b = tcp_pair()

    def run():
        with a, b:
            pipe(a, b)

    running = gevent.spawn(run)
    client.sendall(b"half")
    assert server.recv(100) == b"half"
    running.kill()
    assert receive_all(server).how == "reset"
    for sock in (client, server):
        sock.close()


def test_an_end_that_cannot_be_passed_on_breaks_the_relay():
    client, a = tcp_pair()
    server, b = tcp_pair()

    class NoShutdown:
        def __init__(self, sock):
            self._sock = sock

        def __getattr__(self, name):
            return getattr(self._sock, name)

        def shutdown(self, how):
            raise broken(errno.ENOMEM)

    b._sock = b.stream.sock = NoShutdown(b._sock)
    running = gevent.spawn(relay, a, b)
    client.shutdown(socket.SHUT_WR)
    assert running.get(timeout=60).reason == "reset_b"
    for sock in (client, a, server):
        sock.close()
    b._sock = b.stream.sock = b._sock._sock
    b.close()


@pytest.mark.parametrize("call", ["posix_fadvise", "sendfile", "open"])
def test_a_thread_reads_ahead_in_a_sandbox_too(monkeypatch, tmp_path, call):
    file = tmp_path / "file"
    file.write_bytes(DATA)
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args) or pread(*args))
    with file.open("rb") as opened:
        monkeypatch.setattr(os, call, Calls(getattr(os, call), errno.EPERM, onward=1))
        disk_module._read(opened.fileno(), 0, len(DATA))
    assert bool(read) == (call != "posix_fadvise")


class Breaks:
    """A file whose disk fails at the third block."""

    def __init__(self):
        self.reads = 0

    def read(self, size):
        self.reads += 1
        if self.reads == 3:
            raise broken(errno.EIO)
        return bytes(size)


@pytest.mark.parametrize("cls", [Connection, gevent_socket.socket])
def test_a_file_object_that_fails_halfway_resets(cls):
    client, conn = tcp_pair(cls)
    with conn, pytest.raises(OSError, match="Input/output error"):
        sendfile(conn, Breaks())
    assert receive_all(client).how == "reset"
    client.close()


def test_a_file_that_fails_halfway_does_not_end_tls_in_order(serve, in_thread):
    """RFC 8446 section 6.1: a close_notify would say that this was all."""
    with certificates() as made:
        server = serve(lambda conn: conn.sendfile(Breaks()), tls=made.server)

        def talk():
            with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
                options = {"server_hostname": "localhost", "suppress_ragged_eofs": False}
                with made.client.wrap_socket(sock, **options) as client:
                    while client.recv(65536):
                        pass

        with pytest.raises((ConnectionError, ssl.SSLError), match=r"(?i)EOF|reset"):
            in_thread(talk)


def test_a_file_that_cannot_be_read_at_all_leaves_room_for_an_answer():
    client, conn = tcp_pair()
    broken_file = Breaks()
    broken_file.reads = 2
    with conn:
        with pytest.raises(OSError, match="Input/output error"):
            sendfile(conn, broken_file)
        conn.sendall(b"sorry")
    assert client.recv(100) == b"sorry"
    assert receive_all(client).how == "end"
    client.close()


def test_a_disk_that_is_full_is_told_although_splice_was_tried(monkeypatch, tmp_path):
    client, conn = tcp_pair()
    monkeypatch.setattr(pipes_module.Pipe, "empty", lambda *_: (_ for _ in ()).throw(broken(errno.ENOSPC)))
    monkeypatch.setattr(os, "write", Calls(os.write, errno.ENOSPC, onward=1))
    client.sendall(b"data")
    with conn, pytest.raises(OSError, match="No space left"):
        recv_to_file(conn, tmp_path / "file")
    client.close()
