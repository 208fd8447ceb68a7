"""Lists of directories, however large, and files that the system cannot read just now."""

import errno
import http.client
import logging
import os
import socket
import tracemalloc
from types import SimpleNamespace

import gevent
import pytest

from gtcpserver import Connection
from gtcpserver.static_files import StaticFiles, handler, lookup
from kit.patience import SOON
from kit.waiting import wait_until


@pytest.fixture
def many(tmp_path):
    """A directory with 3,000 files and one more."""
    for number in range(3000):
        os.close(os.open(tmp_path / f"{number:05} <&>.txt", os.O_CREAT | os.O_WRONLY))
    (tmp_path / "sub").mkdir()
    return tmp_path


def fetch(server, method="GET", path="/", version=11):
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SOON)
    client._http_vsn = version  # noqa: SLF001  http.client has no public option for it
    client._http_vsn_str = f"HTTP/{version // 10}.{version % 10}"  # noqa: SLF001
    client.request(method, path)
    answer = client.getresponse()
    body = answer.read()
    client.close()
    return answer, body.decode()


@pytest.mark.slow
@pytest.mark.parametrize("version", [10, 11])
def test_a_long_list_is_complete_and_sorted(serve, in_thread, many, version):
    server = serve(StaticFiles(many, listing=True))
    answer, body = in_thread(fetch, server, "GET", "/", version)
    assert answer.getheader("Content-Length") is None
    names = [line.split(">")[2].split("<")[0] for line in body.splitlines() if line.startswith("<li>")]
    assert names == ["sub/", *(f"{number:05} &lt;&amp;&gt;.txt" for number in range(3000))]
    assert body.endswith("</ul>\n</html>\n")
    assert "more" not in body


@pytest.mark.slow
def test_the_connection_is_kept_after_a_long_list_and_head_has_none(serve, connect, in_thread, many):
    client = connect(serve(StaticFiles(many, listing=True)))
    client.sendall(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    client.shutdown(socket.SHUT_WR)

    def read():
        got = b""
        while more := client.recv(65536):
            got += more
        return got

    got = in_thread(read)
    assert got.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert got.count(b"\r\n0\r\n\r\n") == 2
    assert got.index(b"<ul>") > got.index(b"\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.slow
def test_a_list_that_would_be_too_long_says_so(serve, in_thread, many, monkeypatch):
    monkeypatch.setattr(handler, "MOST_LISTED", 250)
    read = []

    def scandir(fd):
        return _Counting(os.scandir(fd), read)

    monkeypatch.setattr(lookup, "os", SimpleNamespace(**{**vars(os), "scandir": scandir}))
    _, body = in_thread(fetch, serve(StaticFiles(many, listing=True)))
    assert body.count("<li>") == 250
    assert "<p>There are more: only 250 are listed.</p>" in body
    assert len(read) == 251


class _Counting:
    """What os.scandir gives, with a note of each entry."""

    def __init__(self, found, read):
        self._found, self._read = found, read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._found.close()

    def __iter__(self):
        for entry in self._found:
            self._read.append(entry.name)
            yield entry


@pytest.mark.slow
def test_others_are_served_while_a_long_list_is_made(serve, in_thread, many):
    """It is read by a thread, and each piece of it is followed by a turn of the others."""
    turns = 0
    server = serve(StaticFiles(many, listing=True))

    def count_turns():
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(0)

    reading = gevent.spawn(in_thread, fetch, server)
    wait_until(lambda: server.active_connections)
    counting = gevent.spawn(count_turns)
    _, body = reading.get(timeout=SOON)
    counting.kill()
    assert body.count("<li>") == 3001
    assert turns >= 3001 / handler.ROWS_A_PIECE


@pytest.mark.slow
def test_clients_that_do_not_read_their_list_hold_little_memory(serve, connect, many):
    """The names, but not the page, which is six times as long here."""

    def small_buffer(conn):
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    server = serve(StaticFiles(many, listing=True), on_connect=small_buffer)
    clients = [connect(server, receive_buffer=4096) for _ in range(5)]
    tracemalloc.start()
    try:
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: sum(conn.stream.writer() is not None for conn in server.connections()) == 5)
        held = tracemalloc.get_traced_memory()[0] / len(clients) / 3000
    finally:
        tracemalloc.stop()
    assert held < 150  # bytes a name


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["fstat", "read", "listing"])
def test_what_the_system_cannot_read_just_now_is_a_503_and_the_client_is_served_on(
    serve, in_thread, tmp_path, monkeypatch, caplog, call, number
):
    (tmp_path / "a.txt").write_text("content")
    files = StaticFiles(tmp_path, listing=True)
    server = serve(files)
    failing = True

    def fail_or(function):
        def call_or_fail(*arguments):
            if failing:
                raise OSError(number, os.strerror(number))
            return function(*arguments)

        return call_or_fail

    if call == "fstat":
        monkeypatch.setattr(handler, "os", SimpleNamespace(**{**vars(os), "fstat": fail_or(os.fstat)}))
    elif call == "read":
        files.directory.read = fail_or(files.directory.read)
    else:
        monkeypatch.setattr(handler, "list_directory", fail_or(lookup.list_directory))
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SOON)

    def ask():
        client.request("GET", "/" if call == "listing" else "/a.txt")
        answer = client.getresponse()
        return answer.status, answer.read()

    assert [in_thread(ask)[0] for _ in range(100)] == [503] * 100
    failing = False
    status, body = in_thread(ask)
    client.close()
    assert status == 200
    assert b"content" in body or b"a.txt" in body
    assert server.accepted_connections == 1
    assert server.stats().handler_counters == {"file_error": 100}
    logged = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert 1 <= len(logged) <= 6
    assert {record.exc_info for record in logged} == {None}
    assert os.strerror(number) in logged[0].getMessage()


def test_a_disk_that_fails_in_the_midst_of_a_file_resets_the_connection(
    serve, connect, in_thread, tmp_path, monkeypatch, caplog
):
    (tmp_path / "large").write_bytes(bytes(1_000_000))
    server = serve(StaticFiles(tmp_path))

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Connection, "sendfile", fail)
    client = connect(server)
    client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")

    def read():
        while client.recv(65536):
            pass

    with pytest.raises(ConnectionResetError):
        in_thread(read)
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handler_errors == 0
    assert server.stats().handler_counters == {"file_error": 1}
    assert "Input/output error" in caplog.text


@pytest.mark.parametrize("path", ["/a.html", "/none", "/", "/a.html?range"])
def test_no_answer_is_sniffed(serve, in_thread, tmp_path, path):
    (tmp_path / "a.html").write_text("<script>")
    answer, _ = in_thread(fetch, serve(StaticFiles(tmp_path, listing=True)), "GET", path)
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
