"""sendfile and recv_to_file: files to and from connections."""

import contextlib
import errno
import gzip
import hashlib
import importlib
import io
import os
import random
import socket
import struct
import tempfile
from pathlib import Path

import gevent
import pytest
import trustme
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl

from gtcpserver import Connection
from gtcpserver.errors import DeadlineExceeded
from gtcpserver.transfer import PIPES, disk, recv_to_file, sendfile

#: The module; the package has the function under this name.
RECV_TO_FILE = importlib.import_module("gtcpserver.transfer.recv_to_file")

DATA = random.Random(4).randbytes(5_000_000)


@pytest.fixture(params=[gevent_socket.socket, Connection], ids=["gevent socket", "Connection"])
def cls(request):
    return request.param


@pytest.fixture
def pair(cls, listening):
    """(client, connection); a byte the client gets was sent by the connection."""
    client = gevent_socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
    client.settimeout(60)
    connection = cls(fileno=accepted.detach())
    yield client, connection
    client.close()
    connection.close()


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(DATA)
    return file


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    gevent.sleep(0)
    disk.pool().apply(int)  # its thread and loop have descriptors of their own
    PIPES.close_unused()
    before = set(os.listdir("/proc/self/fd"))
    yield
    PIPES.close_unused()
    assert PIPES.taken == 0
    gevent.sleep(0.001)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 2


def receive(sock, size=None):
    data = bytearray()
    while size is None or len(data) < size:
        piece = sock.recv(1 << 18 if size is None else min(1 << 18, size - len(data)))
        if not piece:
            break
        data += piece
    return bytes(data)


def sent_and_received(pair, *arguments, **options):
    client, connection = pair
    reader = gevent.spawn(receive, client)
    sent = sendfile(connection, *arguments, **options)
    connection.shutdown(socket.SHUT_WR)
    return sent, reader.get(timeout=60)


# -- sendfile --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "str", "descriptor", "buffered", "raw", "temporary", "BytesIO", "gzip"])
def test_any_kind_of_file_is_sent(pair, path, kind):
    with path.open("rb") as buffered, path.open("rb", buffering=0) as raw, tempfile.NamedTemporaryFile() as temporary:
        temporary.write(DATA)
        temporary.flush()
        zipped = io.BytesIO(gzip.compress(DATA, 1))
        file = {
            "path": path,
            "str": str(path),
            "descriptor": raw.fileno(),
            "buffered": buffered,
            "raw": raw,
            "temporary": temporary,
            "BytesIO": io.BytesIO(DATA),
            "gzip": gzip.GzipFile(fileobj=zipped),
        }[kind]
        sent, received = sent_and_received(pair, file)
        assert sent == len(DATA)
        assert received == DATA
        if isinstance(pair[1], Connection):
            assert pair[1].bytes_sent == len(DATA)
        if kind in ("buffered", "raw", "temporary"):
            assert file.tell() == len(DATA)
        if kind == "descriptor":
            assert os.lseek(file, 0, os.SEEK_CUR) == 0


@pytest.mark.slow
@pytest.mark.parametrize("from_memory", [False, True])
@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, 0), (0, 1), (1, 4095), (4096, None), (17, 1_234_567), (4_999_999, 10), (5_000_000, None), (6_000_000, 5)],
)
def test_a_part_is_sent_exactly(pair, path, offset, count, from_memory):
    file = io.BytesIO(DATA) if from_memory else path
    sent, received = sent_and_received(pair, file, offset, count)
    expected = DATA[offset:] if count is None else DATA[offset : offset + count]
    assert received == expected
    assert sent == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Connection], indirect=True)
def test_a_file_of_more_than_4_gib_is_sent_whole(pair):
    size = (4 << 30) + 12_345
    client, connection = pair

    def count_bytes():
        buffer, received = bytearray(1 << 20), 0
        while n := client.recv_into(buffer, 1 << 20, socket.MSG_TRUNC):  # thrown away by the kernel
            received += n
        return received

    reader = gevent.spawn(count_bytes)
    # In memory where possible: there a hole takes no page of the cache.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryFile(dir=memory) as sparse:
        sparse.truncate(size)
        assert sendfile(connection, sparse) == size
    connection.shutdown(socket.SHUT_WR)
    assert reader.get(timeout=60) == size


def test_an_offset_beyond_4_gib(pair, tmp_path):
    size = (5 << 30) + 3
    file = tmp_path / "sparse"
    with file.open("wb") as sparse:
        sparse.seek(size - 3)
        sparse.write(b"end")
    assert sent_and_received(pair, file, size - 10, 100) == (10, b"\0" * 7 + b"end")


def test_a_file_cut_short_meanwhile_ends_early_with_the_true_count(pair, tmp_path):
    client, connection = pair
    file = tmp_path / "file"
    with file.open("wb") as whole:
        whole.truncate(64 << 20)
    sending = gevent.spawn(sendfile, connection, file, 0, 64 << 20)
    first = receive(client, 1_000_000)
    os.truncate(file, 2_000_000)
    rest = gevent.spawn(receive, client)
    sent = sending.get(timeout=60)
    connection.shutdown(socket.SHUT_WR)
    assert len(first) + len(rest.get(timeout=60)) == sent < 64 << 20


@pytest.mark.slow
def test_a_file_that_grew_is_sent_to_its_new_end(pair, tmp_path):
    client, connection = pair
    file = tmp_path / "file"
    file.write_bytes(bytes(30 << 20))
    sending = gevent.spawn(sendfile, connection, file)
    first = receive(client, 1000)
    with file.open("ab") as more:
        more.write(b"more")
    rest = gevent.spawn(receive, client)
    assert sending.get(timeout=60) == (30 << 20) + 4
    connection.shutdown(socket.SHUT_WR)
    assert (first + rest.get(timeout=60)).endswith(b"\0more")


def test_a_file_that_does_not_know_its_size(pair):
    sent, received = sent_and_received(pair, "/proc/self/status")
    assert sent == len(received) > 100
    assert received.startswith(b"Name:")


def test_a_fifo_is_sent_as_it_comes_and_nobody_waits_for_it(pair, tmp_path):
    client, connection = pair
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sending = gevent.spawn(sendfile, connection, fifo)
    gevent.sleep(0.01)
    assert not sending.ready()
    with open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as writer:
        writer.write(b"first")
        assert client.recv(100) == b"first"
        writer.write(b"second")
        assert client.recv(100) == b"second"
    assert sending.get(timeout=60) == 11
    with pytest.raises(ValueError, match="offset"):
        sendfile(connection, fifo, offset=5)


def test_a_device_is_sent_up_to_count(pair):
    assert sent_and_received(pair, "/dev/zero", count=300_000) == (300_000, bytes(300_000))


def test_wrong_arguments(pair, path):
    _, connection = pair
    for options in ({"offset": -1}, {"count": -1}):
        with pytest.raises(ValueError, match="negative"):
            sendfile(connection, path, **options)
    with path.open(encoding="latin-1") as text, pytest.raises(ValueError, match="binary"):
        sendfile(connection, text)
    with pytest.raises(TypeError, match="read"):
        sendfile(connection, object())
    with pytest.raises(FileNotFoundError):
        sendfile(connection, path.with_name("missing"))
    with pytest.raises(IsADirectoryError):
        sendfile(connection, path.parent)
    connection.settimeout(0)
    with pytest.raises(ValueError, match="timeout"):
        sendfile(connection, path)


@pytest.mark.slow
def test_the_time_out_counts_from_the_last_byte(pair, tmp_path):
    client, connection = pair
    file = tmp_path / "file"
    with file.open("wb") as whole:
        whole.truncate(100 << 20)
    connection.settimeout(0.6)
    sending = gevent.spawn(sendfile, connection, file)
    for _ in range(8):  # slow, but it moves: longer in all than the timeout
        receive(client, 4 << 20)
        gevent.sleep(0.1)
    assert not sending.ready()
    with pytest.raises(TimeoutError):
        sending.get(timeout=60)


@pytest.mark.slow
def test_a_deadline_counts_in_all(pair, tmp_path):
    client, connection = pair
    if not isinstance(connection, Connection):
        pytest.skip("gevent's sockets have no deadline")
    file = tmp_path / "file"
    with file.open("wb") as whole:
        whole.truncate(4 << 30)
    drain = gevent.spawn(receive, client)
    with connection.deadline(0.1), pytest.raises(DeadlineExceeded):
        sendfile(connection, file)
    drain.kill()


@pytest.mark.slow
def test_a_reset_is_an_oserror_and_a_close_by_another_greenlet_too(pair, tmp_path):
    client, connection = pair
    file = tmp_path / "file"
    with file.open("wb") as whole:
        whole.truncate(100 << 20)
    sending = gevent.spawn(sendfile, connection, file)
    receive(client, 1000)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(OSError, match=r"reset|pipe"):
        sending.get(timeout=60)


@pytest.mark.slow
def test_a_close_by_another_greenlet_ends_it(pair, tmp_path):
    client, connection = pair
    file = tmp_path / "file"
    with file.open("wb") as whole:
        whole.truncate(100 << 20)
    sending = gevent.spawn(sendfile, connection, file)
    receive(client, 1000)
    gevent.sleep(0.05)
    connection.close()
    with pytest.raises(OSError) as caught:
        sending.get(timeout=60)
    assert caught.value.errno == errno.EBADF


@pytest.mark.slow
def test_other_greenlets_run_while_a_fast_client_gets_a_large_file(pair, path):
    client, connection = pair
    reader = gevent.spawn(receive, client)
    turns = 0

    def count_turns():
        nonlocal turns
        while True:
            gevent.sleep(0)
            turns += 1

    counting = gevent.spawn(count_turns)
    sendfile(connection, path)
    counting.kill()
    connection.close()
    reader.get(timeout=60)
    assert turns >= len(DATA) // disk.WINDOW


@pytest.mark.slow
def test_what_is_not_in_the_page_cache_is_read_by_a_thread(pair, path, monkeypatch):
    threads = []
    real = disk.in_thread
    monkeypatch.setattr(disk, "in_thread", lambda *arguments: (threads.append(arguments[2]), real(*arguments)))
    with path.open("rb") as file:
        cache = disk.PageCache(file.fileno())
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cache._is_cached(0, 4096) is not False:  # noqa: SLF001  what the page cache has
            pytest.skip("this file system does not say what is cached, or keeps it")
        assert cache.make_ready(0, len(DATA)) == disk.WINDOW
        assert threads == [0]
        assert cache._is_cached(0, disk.WINDOW)  # noqa: SLF001  what the page cache has
        assert sent_and_received(pair, file) == (len(DATA), DATA)
        assert 0 not in threads[1:]
        asked = len(threads)
        assert cache.make_ready(0, len(DATA)) == disk.WINDOW
        assert len(threads) == asked  # what is there is not read again


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_where_the_cache_cannot_be_asked_a_thread_takes_samples(pair, path, monkeypatch, seconds):
    samples = []
    monkeypatch.setattr(disk, "RWF_NOWAIT", 0)
    monkeypatch.setattr(disk, "in_thread", lambda read, fd, position, size: samples.append(position) or seconds)
    assert sent_and_received(pair, path) == (len(DATA), DATA)
    assert samples == ([0] if not seconds else list(range(0, len(DATA), disk.WINDOW)))


@pytest.mark.slow
@pytest.mark.parametrize("failure", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_does_not_say_what_is_cached(pair, path, monkeypatch, failure):
    def preadv(*arguments):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "preadv", preadv)
    assert sent_and_received(pair, path) == (len(DATA), DATA)


@pytest.mark.slow
def test_a_file_that_sendfile_cannot_read_is_read(pair, path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EINVAL, "not this file")

    monkeypatch.setattr(os, "sendfile", refuse)
    assert sent_and_received(pair, path) == (len(DATA), DATA)


@pytest.fixture(scope="module")
def tls():
    authority = trustme.CA()
    server = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = gevent_ssl.SSLContext(gevent_ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def tls_pair(tls, listening):
    raw = gevent_socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
    accepting = gevent.spawn(tls[0].wrap_socket, accepted, server_side=True)
    client = tls[1].wrap_socket(raw, server_hostname="localhost")
    server = accepting.get(timeout=60)
    yield client, server
    client.close()
    server.close()


@pytest.mark.slow
def test_over_tls_the_file_is_encrypted(tls_pair, path):
    client, server = tls_pair
    reader = gevent.spawn(receive, client, 4_000_000)
    assert sendfile(server, path, 1_000_000) == 4_000_000
    assert reader.get(timeout=60) == DATA[1_000_000:]


# -- recv_to_file ----------------------------------------------------------------------------------------------------


def sender(client, data):
    return gevent.spawn(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["path", "descriptor", "buffered", "raw", "append", "BytesIO"])
def test_what_comes_is_in_the_file(pair, tmp_path, kind):
    client, connection = pair
    file = tmp_path / "file"
    file.write_bytes(b"old" if kind == "append" else b"")
    sending = sender(client, DATA)
    digest = hashlib.sha256(DATA).digest()
    if kind == "path":
        assert recv_to_file(connection, file) == len(DATA)
    elif kind == "BytesIO":
        memory = io.BytesIO()
        assert recv_to_file(connection, memory) == len(DATA)
        file.write_bytes(memory.getvalue())
    elif kind == "descriptor":
        fd = os.open(file, os.O_WRONLY)
        assert recv_to_file(connection, fd) == len(DATA)
        os.close(fd)
    elif kind == "append":
        with file.open("ab") as opened:
            assert recv_to_file(connection, opened) == len(DATA)
        assert file.read_bytes().startswith(b"old")
        file.write_bytes(file.read_bytes()[3:])
    else:
        with file.open("wb", buffering=-1 if kind == "buffered" else 0) as opened:
            opened.write(b"head")
            assert recv_to_file(connection, opened) == len(DATA)
            assert opened.tell() == 4 + len(DATA)
            opened.write(b"tail")
        content = file.read_bytes()
        assert (content[:4], content[-4:]) == (b"head", b"tail")
        file.write_bytes(content[4:-4])
    sending.get(timeout=60)
    assert hashlib.sha256(file.read_bytes()).digest() == digest
    if isinstance(connection, Connection):
        assert connection.bytes_received == len(DATA)


def test_count_bytes_are_taken_and_the_rest_stays(pair, tmp_path):
    client, connection = pair
    sending = sender(client, DATA)
    assert recv_to_file(connection, tmp_path / "0", 0) == 0
    assert recv_to_file(connection, tmp_path / "1", 3_000_001) == 3_000_001
    assert connection.recv(1) == DATA[3_000_001:3_000_002]
    assert recv_to_file(connection, tmp_path / "2", 9_000_000) == len(DATA) - 3_000_002
    assert (tmp_path / "1").read_bytes() == DATA[:3_000_001]
    assert (tmp_path / "2").read_bytes() == DATA[3_000_002:]
    sending.get(timeout=60)


def test_what_recv_until_read_ahead_comes_first(pair, tmp_path):
    client, connection = pair
    if not isinstance(connection, Connection):
        pytest.skip("gevent's sockets read nothing ahead")
    client.sendall(b"PUT\nbodynext")
    assert connection.recv_until(b"\n") == b"PUT\n"
    assert recv_to_file(connection, tmp_path / "file", 2) == 2
    gevent.spawn_later(0.01, client.sendall, b"!")
    assert recv_to_file(connection, tmp_path / "rest", 7) == 7
    assert (tmp_path / "file").read_bytes() + (tmp_path / "rest").read_bytes() == b"bodynext!"


def test_a_slow_disk_is_waited_for_by_a_thread(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(RECV_TO_FILE, "SLOW_WRITE", -1.0)
    client, connection = pair
    sending = sender(client, DATA)
    assert recv_to_file(connection, tmp_path / "file") == len(DATA)
    sending.get(timeout=60)
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.slow
def test_a_kill_while_a_thread_writes_leaves_nothing_behind(pair, tmp_path, monkeypatch):
    module = RECV_TO_FILE
    monkeypatch.setattr(module, "SLOW_WRITE", -1.0)
    client, connection = pair
    in_thread, may_go_on = os.pipe()
    real = module._empty  # noqa: SLF001  what the page cache has
    writes = 0

    def slow(pipe, fd, size):
        nonlocal writes
        writes += 1
        if writes == 2:
            os.read(in_thread, 1)
        real(pipe, fd, size)

    monkeypatch.setattr(module, "_empty", slow)
    receiving = gevent.spawn(recv_to_file, connection, tmp_path / "file")
    pouring = gevent.spawn(client.sendall, DATA * 10)
    while writes < 2:
        gevent.sleep(0.001)
    pouring.kill()
    receiving.kill()
    assert PIPES.taken == 1
    os.write(may_go_on, b"x")
    while PIPES.taken:
        gevent.sleep(0.001)
    os.close(in_thread)
    os.close(may_go_on)


def test_a_full_disk_is_an_oserror(pair):
    client, connection = pair
    sending = sender(client, DATA)
    with pytest.raises(OSError, match="No space") as caught:
        recv_to_file(connection, "/dev/full")
    assert caught.value.errno == errno.ENOSPC
    sending.kill()


@pytest.mark.slow
def test_into_a_fifo_nobody_reads_only_this_greenlet_waits(pair, tmp_path):
    client, connection = pair
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    receiving = gevent.spawn(recv_to_file, connection, writing, 1_000_000)
    sending = sender(client, DATA[:1_000_000])
    gevent.sleep(0.02)
    assert not receiving.ready()
    received = bytearray()
    while len(received) < 1_000_000:
        gevent.sleep(0)
        with contextlib.suppress(BlockingIOError):
            received += os.read(reading, 65536)
    assert receiving.get(timeout=60) == 1_000_000
    assert received == DATA[:1_000_000]
    sending.get(timeout=60)
    os.close(reading)
    os.close(writing)


def test_time_outs_apply_to_what_is_received(pair, tmp_path):
    client, connection = pair
    connection.settimeout(0.05)
    client.sendall(b"some")
    with pytest.raises(TimeoutError):
        recv_to_file(connection, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"some"
    if isinstance(connection, Connection):
        connection.settimeout(None)
        with connection.deadline(0.05), pytest.raises(DeadlineExceeded):
            recv_to_file(connection, tmp_path / "file")


def test_without_pipes_it_is_copied(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(PIPES, "take", lambda: None)
    client, connection = pair
    sending = sender(client, DATA)
    assert recv_to_file(connection, tmp_path / "file") == len(DATA)
    assert (tmp_path / "file").read_bytes() == DATA
    sending.get(timeout=60)


def test_from_tls_it_is_decrypted(tls_pair, tmp_path):
    client, server = tls_pair
    sending = gevent.spawn(client.sendall, DATA)
    assert recv_to_file(server, tmp_path / "file", len(DATA)) == len(DATA)
    assert Path(tmp_path / "file").read_bytes() == DATA
    sending.get(timeout=60)
