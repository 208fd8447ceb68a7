"""TLS over real sockets: servers with tls=..., start_tls in a handler, and clients of other makes."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import time

import gevent
import gevent.event
import gevent.ssl
import pytest

from gtcpserver import (
    Connection,
    DeadlineExceeded,
    EarlyEOF,
    LimitExceeded,
    StartTLSError,
    StreamServer,
    TLSConfig,
    TruncatedStream,
)
from gtcpserver.server import stopping as stopping_module
from kit.handlers import echo
from kit.patience import SOON
from kit.programs import needs
from kit.tls import (
    FAILURES,
    Files,
    MemoryClient,
    client_context,
    memory_shutdown,
    read,
    read_all,
    read_exactly,
    s_client,
    strict_context,
)
from kit.waiting import wait_until

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset
PLENTY = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    files = Files(tmp_path_factory.mktemp("tls"))
    files.server = files.issue("server", "server.example.com", "localhost", "127.0.0.1")
    files.other = files.issue("other")
    files.client = files.issue("client", "client@example.com")
    return files


@pytest.fixture
def quiet(caplog, capfd):
    """No traceback and no error in the test, on stderr or in the log."""
    caplog.set_level(logging.INFO)
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]
    assert "Traceback" not in capfd.readouterr().err


def hello(conn):
    conn.sendall(b"hello\n")


def failures(server):
    return server.stats().handshake_failures


# -- the openssl command ----------------------------------------------------------------------------------------------


@needs("openssl")
@pytest.mark.parametrize(("option", "version"), [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")])
def test_the_openssl_command_and_the_version(serve, tls, shared, in_thread, option, version):
    seen = []

    def handle(conn):
        seen.append((conn.tls.version, conn.tls.cipher.name, conn.tls.session_reused))
        conn.sendall(b"hello\n")

    server = serve(handle, tls=tls)
    status, output = in_thread(s_client, server, option, "-CAfile", shared.ca_file, "-verify_return_error")
    assert status == 0
    assert "\nhello\n" in output
    assert f"{version}, Cipher is {seen[0][1]}" in output
    assert seen == [(version, seen[0][1], False)]
    assert output.rstrip().endswith("closed")  # by close_notify; otherwise openssl says "read:errno=0"
    assert failures(server) == {}


@needs("openssl")
@pytest.mark.parametrize("option", ["-tls1", "-tls1_1"])
def test_versions_that_are_too_old_are_refused(serve, tls, in_thread, option, quiet):
    server = serve(hello, tls=tls)
    status, output = in_thread(s_client, server, option, "-cipher", "ALL:@SECLEVEL=0")
    assert status == 1
    assert "alert protocol version" in output
    wait_until(lambda: failures(server) == {"version": 1})
    assert server.stats().handler_errors == 0


@needs("openssl")
def test_the_openssl_command_gets_the_certificate_of_the_name_it_asks_for(serve, shared, in_thread):
    seen = []
    config = TLSConfig(*shared.server, sni={"other.example.com": shared.other})
    server = serve(lambda conn: seen.append(conn.tls.server_name), tls=config)
    _, output = in_thread(s_client, server, "-servername", "other.example.com", "-CAfile", shared.ca_file,
                          "-verify_hostname", "other.example.com")  # fmt: skip
    assert "Verification: OK" in output
    _, output = in_thread(s_client, server, "-noservername", "-CAfile", shared.ca_file,
                          "-verify_hostname", "server.example.com")  # fmt: skip
    assert "Verification: OK" in output
    assert seen == ["other.example.com", None]


@needs("openssl")
def test_the_openssl_command_agrees_on_a_protocol(serve, shared, in_thread):
    seen = []
    config = TLSConfig(*shared.server, alpn=["h2", "http/1.1"])
    server = serve(lambda conn: seen.append(conn.tls.alpn), tls=config)
    assert "ALPN protocol: h2" in in_thread(s_client, server, "-alpn", "http/1.1,h2")[1]
    assert "No ALPN negotiated" in in_thread(s_client, server, "-alpn", "smtp")[1]
    assert seen == ["h2", None]


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize("option", ["-tls1_2", "-tls1_3"])
def test_the_openssl_command_shows_a_certificate(serve, shared, in_thread, option, quiet):
    seen = []
    server = serve(
        lambda conn: seen.append(conn.tls.peer_certificate["subjectAltName"]),
        tls=TLSConfig(*shared.server, client_auth="required", client_ca=shared.ca_file),
    )
    certfile, keyfile = shared.client
    assert in_thread(s_client, server, option, "-cert", certfile, "-key", keyfile)[0] == 0
    assert seen == [(("email", "client@example.com"),)]
    _, output = in_thread(s_client, server, option)
    assert re.search("alert (certificate required|handshake failure)", output)
    wait_until(lambda: failures(server) == {"client_certificate": 1})
    assert len(seen) == 1


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize("option", ["-tls1_2", "-tls1_3"])
def test_the_openssl_command_resumes_a_session(serve, tls, in_thread, tmp_path, option):
    seen = []

    def handle(conn):
        seen.append(conn.tls.session_reused)
        conn.sendall(b"hello\n")

    server = serve(handle, tls=tls)
    session = str(tmp_path / "session.pem")
    assert "\nNew, TLSv1." in in_thread(s_client, server, option, "-sess_out", session)[1]
    assert "\nReused, TLSv1." in in_thread(s_client, server, option, "-sess_in", session)[1]
    server.reload_tls()
    assert "\nReused, TLSv1." in in_thread(s_client, server, option, "-sess_in", session)[1]
    assert seen == [False, True, True]


@pytest.mark.slow
@needs("openssl")
def test_the_openssl_command_reconnects(serve, tls, in_thread):
    server = serve(lambda conn: gevent.sleep(0.05), tls=tls)
    _, output = in_thread(s_client, server, "-tls1_2", "-reconnect")
    assert output.count("Reused, TLSv1.2") == 5


# -- other clients ----------------------------------------------------------------------------------------------------


def http(conn):
    with contextlib.suppress(EarlyEOF):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("version", ["--tlsv1.2 --tls-max 1.2", "--tlsv1.3"])
def test_curl(serve, tls, shared, in_thread, version):
    server = serve(http, tls=tls)
    url = f"https://localhost:{server.port}/"
    done = in_thread(run, "curl", "-sS", "-4", *version.split(), "--cacert", shared.ca_file, url)
    assert (done.stdout, done.stderr) == ("hello\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_node(serve, tls, shared, in_thread):
    server = serve(http, tls=tls)
    source = f"""
        const options = {{host: "127.0.0.1", port: {server.port}, servername: "localhost",
                          ca: require("fs").readFileSync({json.dumps(shared.ca_file)})}};
        require("https").get(options, answer => answer.on("data", data => process.stdout.write(data)));
    """
    done = in_thread(run, "node", "-e", source)
    assert (done.stdout, done.stderr) == ("hello\n", "")


@pytest.mark.parametrize("ready", [ssl.SSLContext, gevent.ssl.SSLContext])
def test_a_ready_context(serve, shared, tls_client, in_thread, ready):
    context = ready(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*shared.server)
    context.set_alpn_protocols(["one", "two"])
    seen = []
    context.sni_callback = lambda sock, name, context: seen.append(name)
    server = serve(echo, tls=context)
    client = tls_client(server, alpn=["two"])
    assert client.selected_alpn_protocol() == "two"
    client.sendall(b"hello")
    assert in_thread(client.recv, 100) == b"hello"
    assert seen == ["localhost"]


# -- the same Connection ----------------------------------------------------------------------------------------------


def test_what_a_connection_tells(serve, tls_client, tls):
    seen = []
    server = serve(lambda conn: seen.append((conn, conn.tls, repr(conn.tls), conn.tls.peer_certificate)), tls=tls)
    client = tls_client(server)
    conn, info, text, certificate = wait_until(lambda: seen)[0]
    assert type(conn) is Connection
    assert info.version == client.version() == "TLSv1.3"
    assert info.cipher.name == client.cipher()[0]
    assert info.server_name == "localhost"
    assert (info.alpn, info.session_reused, certificate) == (None, False, None)
    assert "TLSv1.3" in text


def test_a_plain_connection_has_no_tls(serve, connect):
    seen = []
    server = serve(lambda conn: seen.append(conn.tls))
    connect(server)
    assert wait_until(lambda: seen) == [None]


def test_reading_in_every_way(serve, tls, tls_client, in_thread):
    seen = []

    def handle(conn):
        conn.settimeout(SOON)
        seen.append(conn.recv_until(b"\n"))
        seen.append(conn.recv(3))
        seen.append(conn.recv_exactly(4))
        buffer = bytearray(10)
        size = conn.recv_into(buffer)
        seen.append(bytes(buffer[:size]))
        conn.sendall(b"more?")
        size = conn.recv_into(memoryview(buffer)[2:], 2)
        seen.append((size, bytes(buffer[2:4])))
        with pytest.raises(LimitExceeded):
            conn.recv_until(b"\n", 5)
        seen.append(conn.recv_exactly(8))
        with conn.makefile("rb") as file:
            seen.append(file.readline())
        with pytest.raises(EarlyEOF) as caught:
            conn.recv_exactly(100)
        seen.append(caught.value.partial)
        seen.append(conn.recv(10))

    server = serve(handle, tls=tls)
    client = tls_client(server)
    client.sendall(b"line\nabcdefgrest")
    assert in_thread(client.recv, 10) == b"more?"
    client.sendall(b"xytoo longfrom a file\n")
    gevent.sleep(0.02)
    client.sendall(b"partial")
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: not server.active_connections)
    assert seen == [b"line\n", b"abc", b"defg", b"rest", (2, b"xy"), b"too long", b"from a file\n", b"partial", b""]
    assert server.stats().bytes_received == len(b"line\nabcdefgrestxytoo longfrom a file\npartial")
    assert server.stats().handler_errors == 0


def test_writing_in_every_way(serve, tls, tls_client, in_thread):
    def handle(conn):
        conn.sendall(b"")
        assert conn.send(b"a") == 1
        conn.sendall(bytearray(b"b"))
        conn.sendall(memoryview(b"-c-")[1:2])
        conn.sendall(memoryview(struct.pack("=3I", 1, 2, 3)).cast("I"))
        with conn.makefile("wb") as file:
            file.write(b"file")
        conn.sendall(PLENTY)

    server = serve(handle, tls=tls)
    expected = b"abc" + struct.pack("=3I", 1, 2, 3) + b"file" + PLENTY
    assert in_thread(read_all, tls_client(server)) == expected
    wait_until(lambda: not server.active_connections)
    assert server.stats().bytes_sent == len(expected)
    assert server.stats().handler_errors == 0


@pytest.mark.parametrize("bufsize", [1, 100, 4096, 16384, 65536])
def test_many_reads_of_records_larger_than_the_buffer(serve, tls, tls_client, in_thread, bufsize):
    """What is decrypted and not read does not make the socket readable."""
    total = min(len(PLENTY), bufsize * 3000)

    def handle(conn):
        received = 0
        while received < total:
            received += len(conn.recv(bufsize))
            if received == total:
                conn.sendall(b"all")

    client = tls_client(serve(handle, tls=tls))
    in_thread(client.sendall, PLENTY[:total])
    assert in_thread(client.recv, 10) == b"all"


def test_a_full_read_that_empties_a_record_waits_for_the_next(serve, tls, tls_client, in_thread):
    def handle(conn):
        while data := conn.recv(100):
            conn.sendall(data[:1])

    client = tls_client(serve(handle, tls=tls))
    for _ in range(40):
        client.sendall(b"x" * 100)
        assert in_thread(client.recv, 10) == b"x"


def test_a_greenlet_that_reads_and_one_that_writes(serve, tls, tls_client, in_thread):
    def handle(conn):
        writing = gevent.spawn(conn.sendall, PLENTY)
        assert conn.recv_exactly(len(PLENTY)) == PLENTY
        writing.get()

    server = serve(handle, tls=tls)
    client = tls_client(server)

    def talk():
        received = b""
        for place in range(0, len(PLENTY), 65536):
            client.sendall(PLENTY[place : place + 65536])
            received += read_exactly(client, 65536)
        return received

    assert in_thread(talk) == PLENTY
    assert server.stats().handler_errors == 0


def test_timeouts_and_deadlines(serve, tls, tls_client, in_thread):
    seen = []

    def handle(conn):
        conn.settimeout(0.02)
        with pytest.raises(TimeoutError) as caught:
            conn.recv(10)
        seen.append(type(caught.value))
        with pytest.raises(TimeoutError) as caught:
            while True:
                conn.sendall(PLENTY)
        seen.append(type(caught.value))
        conn.settimeout(None)
        with pytest.raises(DeadlineExceeded), conn.deadline(0.02):
            conn.recv_exactly(10)
        with pytest.raises(DeadlineExceeded), conn.deadline(0.02):
            conn.sendall(PLENTY)
        conn.settimeout(0)
        with pytest.raises(BlockingIOError):
            conn.recv(10)
        seen.append("end")

    server = serve(handle, tls=tls)
    tls_client(server)
    wait_until(lambda: len(seen) == 3)
    assert seen == [TimeoutError, TimeoutError, "end"]


def test_a_timeout_in_the_midst_of_a_record_loses_nothing(serve, tls, shared, connect, in_thread):
    """The client's bytes come one by one, each later than the timeout."""
    seen = []

    def handle(conn):
        conn.settimeout(0.005)
        timeouts = 0
        while len(seen) < 1:
            try:
                seen.append(conn.recv_exactly(5))
            except TimeoutError:
                timeouts += 1
        seen.append(timeouts)

    server = serve(handle, tls=tls)
    client = MemoryClient(connect(server), client_context(shared.ca_file))
    in_thread(client.handshake)
    client.tls.write(b"hello")
    record = client.outgoing.read()
    for place in (3, 10, len(record)):
        client.sock.sendall(record[:place])
        record = record[place:]
        if record:
            gevent.sleep(0.02)
    wait_until(lambda: len(seen) == 2)
    assert seen[0] == b"hello"
    assert seen[1] >= 1


@pytest.mark.slow
def test_what_a_client_gets_of_a_write_that_timed_out_is_its_beginning(serve, tls, tls_client, in_thread, quiet):
    def handle(conn):
        conn.settimeout(0.05)
        conn.sendall(PLENTY * 64)

    server = serve(handle, tls=tls)
    client = tls_client(server)
    wait_until(lambda: server.stats().timeouts == 1)
    received = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        received = in_thread(read_all, client)
    assert (PLENTY * 64).startswith(received)


def test_a_write_that_failed_for_want_of_buffers_leaves_no_gap(serve, tls, tls_client, in_thread):
    def handler(conn):
        layer = conn.stream.tls
        transmit = layer._transmit  # noqa: SLF001  fails once

        def fail_once(data):
            layer._transmit = transmit  # noqa: SLF001  fails once
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

        layer._transmit = fail_once  # noqa: SLF001  fails once
        with pytest.raises(OSError, match="No buffer space"):
            conn.sendall(b"one")
        conn.sendall(b"two")

    client = tls_client(serve(handler, tls=tls))
    assert in_thread(read_all, client) == b"onetwo"


@pytest.mark.slow
def test_a_large_write_that_moves_is_no_slow_client(serve, tls, shared, tls_client, in_thread, spawn_thread, quiet):
    """One call moves 3 MiB over longer than the window in which something must move."""
    size = 48 * 65536
    server = serve(lambda conn: conn.sendall(bytes(size)), tls=tls, min_rate=1000, min_rate_window=1.0)
    client = tls_client(server)

    def read_slowly():
        received = 0
        while more := client.recv(65536):
            received += len(more)
            time.sleep(0.025)
        return received

    assert spawn_thread(read_slowly).get(timeout=SOON) == size
    assert server.stats().slow_clients == 0


@pytest.mark.slow
def test_bytes_count_while_a_large_write_goes_on(serve, tls, tls_client, in_thread):
    conns = []

    def handle(conn):
        conns.append(conn)
        conn.sendall(bytes(64 << 20))

    server = serve(handle, tls=tls)
    client = tls_client(server)
    wait_until(lambda: conns and conns[0].bytes_sent)
    in_thread(read_exactly, client, 8 << 20)
    assert conns[0].bytes_sent >= 8 << 20


def test_an_idle_connection_is_ended_by_a_stop(serve, tls, tls_client, in_thread):
    def handle(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            conn.sendall(data)

    server = serve(handle, tls=tls, pool=1)
    first, second = tls_client(server), tls_client(server)  # an idle one holds no place
    for client in (first, second):
        client.sendall(b"hello")
        assert in_thread(client.recv, 10) == b"hello"
    assert server.stats().idle == 2
    report = server.stop(timeout=SOON)
    assert (report.finished, report.ended) == (2, 0)
    assert in_thread(first.recv, 10) == b""


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(20))
def test_an_answer_arrives_whole_although_input_was_unread(serve, tls, tls_client, in_thread, repetition):
    def handle(conn):
        conn.recv(1)
        conn.sendall(PLENTY)

    server = serve(handle, tls=tls)
    client = tls_client(server)
    client.sendall(b"x" * 100_000)
    gevent.sleep(0)
    client.sendall(b"x" * 100_000)
    assert in_thread(read_all, client) == PLENTY


def test_half_close_by_the_client(serve, tls, tls_client, in_thread):
    """The client says goodbye on its side and reads on (RFC 8446 section 6.1)."""

    def handle(conn):
        received = b"".join(iter(lambda: conn.recv(100), b""))
        conn.sendall(PLENTY[: len(received)])

    server = serve(handle, tls=tls)
    client = tls_client(server)
    client.sendall(b"hello")
    memory_shutdown(client)
    assert in_thread(read_exactly, client, 5) == PLENTY[:5]
    with pytest.raises(ssl.SSLZeroReturnError):  # the server's goodbye, as a client hears it that has said its own
        in_thread(client.recv, 10)


def test_half_close_by_the_server(serve, tls, tls_client, in_thread):
    seen = []

    def handle(conn):
        conn.sendall(b"bye")
        conn.shutdown(socket.SHUT_WR)
        seen.append(conn.recv_exactly(5))
        seen.append(conn.recv(10))

    server = serve(handle, tls=tls)
    client = tls_client(server, context=strict_context())
    assert in_thread(read_all, client) == b"bye"  # would raise if no close_notify had come
    client.sendall(b"hello")
    client.close()
    wait_until(lambda: not server.active_connections)
    assert seen == [b"hello", b""]


def test_half_close_by_the_server_with_input_unread(serve, tls, tls_client, in_thread):
    seen = []

    def handle(conn):
        seen.append(conn.recv_exactly(1))
        conn.shutdown(socket.SHUT_WR)
        seen.append(conn.recv_exactly(9))

    server = serve(handle, tls=tls)
    client = tls_client(server)
    client.sendall(b"1")
    client.sendall(b"2345")
    client.sendall(b"67890")
    assert in_thread(read_all, client) == b""
    wait_until(lambda: not server.active_connections)
    assert seen == [b"1", b"234567890"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_close_notify_is_sent(serve, tls, tls_client, in_thread, version):
    client = tls_client(serve(hello, tls=tls), context=strict_context())
    client.suppress_ragged_eofs = False
    assert in_thread(read_all, client) == b"hello\n"
    in_thread(client.unwrap)


def test_an_aborted_answer_does_not_look_whole_to_its_client(serve, tls, tls_client, in_thread):
    def handler(conn):
        conn.sendall(b"half of it")
        conn.abort()

    client = tls_client(serve(handler, tls=tls))
    client.suppress_ragged_eofs = False
    with pytest.raises((ssl.SSLError, ConnectionResetError), match=r"(?i)EOF|reset"):
        in_thread(read_all, client)


def test_an_end_without_close_notify_is_quiet(serve, shared, tls_client, quiet):
    seen = []

    def handle(conn):
        seen.append(conn.recv(10))
        seen.append(conn.recv(10))

    # Tickets that the client has not read make a reset of its close.
    server = serve(handle, tls=TLSConfig(*shared.server, session_tickets=0))
    client = tls_client(server)
    client.sendall(b"hello")
    socket.socket(fileno=client.detach()).close()
    wait_until(lambda: len(seen) == 2)
    assert seen == [b"hello", b""]


def test_an_end_without_close_notify_is_reported_if_asked_for(serve, shared, tls_client, quiet):
    seen = []

    def handle(conn):
        seen.append(conn.recv(10))
        try:
            conn.recv(10)
        except TruncatedStream as error:
            seen.append(error)
            raise

    server = serve(handle, tls=TLSConfig(*shared.server, report_truncation=True, session_tickets=0))
    client = tls_client(server)
    client.sendall(b"hello")
    socket.socket(fileno=client.detach()).close()
    wait_until(lambda: not server.active_connections and len(seen) == 2)
    assert "close_notify" in str(seen[1])
    assert (server.stats().resets, server.stats().handler_errors) == (1, 0)
    polite = tls_client(server)
    memory_shutdown(polite)
    wait_until(lambda: len(seen) == 3)
    assert seen[2] == b""


def test_bytes_that_are_no_tls_after_the_handshake_are_the_clients_fault(serve, tls, tls_client, quiet):
    server = serve(echo, tls=tls)
    with socket.socket(fileno=tls_client(server).detach()) as raw:
        raw.sendall(b"this is not a record of TLS at all")
        wait_until(lambda: server.stats().resets == 1)
    assert server.stats().handler_errors == 0


def test_a_fault_of_the_handlers_own_tls_is_still_printed(serve, tls, tls_client, caplog):
    def handle(conn):
        raise ssl.SSLError(1, "of a connection to somewhere else")

    server = serve(handle, tls=tls)
    tls_client(server)
    wait_until(lambda: server.stats().handler_errors == 1)
    assert "somewhere else" in caplog.text


# -- what would pass by the encryption --------------------------------------------------------------------------------


def test_methods_that_would_pass_by_the_encryption_are_refused(serve, tls, tls_client, in_thread):
    refused = {}

    def handle(conn):
        buffer = bytearray(10)
        calls = {
            "recv": lambda: conn.recv(1, socket.MSG_PEEK),
            "recv_into": lambda: conn.recv_into(buffer, 1, socket.MSG_PEEK),
            "send": lambda: conn.send(b"x", socket.MSG_OOB),
            "sendall": lambda: conn.sendall(b"x", socket.MSG_OOB),
            "recvfrom": lambda: conn.recvfrom(1),
            "recvfrom_into": lambda: conn.recvfrom_into(buffer),
            "recvmsg": lambda: conn.recvmsg(1),
            "recvmsg_into": lambda: conn.recvmsg_into([buffer]),
            "sendto": lambda: conn.sendto(b"x", conn.client_address),
            "sendmsg": lambda: conn.sendmsg([b"x"]),
            "dup": conn.dup,
        }
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                refused[name] = (type(error), "on an encrypted connection" in str(error))
        conn.sendall(b"still in step")

    client = tls_client(serve(handle, tls=tls))
    client.sendall(b"hello")
    assert in_thread(read_all, client) == b"still in step"
    assert refused == {
        **dict.fromkeys(["recv", "recv_into", "send", "sendall"], (ValueError, True)),
        **dict.fromkeys(["recvfrom", "recvfrom_into", "sendto"], (ValueError, True)),
        **dict.fromkeys(["recvmsg", "recvmsg_into", "sendmsg", "dup"], (NotImplementedError, True)),
    }


def test_the_methods_of_an_ssl_socket(serve, shared, tls_client, in_thread):
    seen = {}

    def handle(conn):
        conn.recv(1)
        seen.update(
            certificate=conn.getpeercert()["subjectAltName"],
            der=conn.getpeercert(binary_form=True),
            cipher=conn.cipher(),
            shared=conn.shared_ciphers(),
            version=conn.version(),
            alpn=conn.selected_alpn_protocol(),
            pending=conn.pending(),
            compression=conn.compression(),
            binding=conn.get_channel_binding(),
            properties=(conn.server_side, conn.server_hostname, conn.session_reused),
            session=bool(conn.tls.session.id),
        )
        with pytest.raises(ValueError, match="not implemented"):
            conn.get_channel_binding("tls-exporter")

    config = TLSConfig(*shared.server, client_auth="required", client_ca=shared.ca_file, alpn=["x"])
    server = serve(handle, tls=config)
    client = tls_client(server, client=shared.client, alpn=["x"])
    client.sendall(b"hello")
    wait_until(lambda: not server.active_connections and seen)
    assert seen["certificate"] == (("email", "client@example.com"),)
    assert seen["der"] == ssl.PEM_cert_to_DER_cert(read(shared.client[0]).decode())
    assert seen["cipher"] == client.cipher()
    assert seen["shared"]
    assert (seen["version"], seen["alpn"], seen["pending"]) == ("TLSv1.3", "x", 4)
    assert (seen["compression"], seen["properties"]) == (None, (True, None, False))
    assert server.stats().handler_errors == 0


def test_the_methods_of_an_ssl_socket_on_a_plain_connection(connect, serve):
    refused = []

    def handle(conn):
        for name in ("getpeercert", "cipher", "shared_ciphers", "compression", "version", "selected_alpn_protocol",
                     "pending", "unwrap", "get_channel_binding", "verify_client_post_handshake"):  # fmt: skip
            with pytest.raises(ValueError, match="No SSL wrapper around"):
                getattr(conn, name)()
            refused.append(name)
        assert (conn.server_side, conn.server_hostname, conn.session_reused) == (None,) * 3
        refused.append("")

    connect(serve(handle))
    wait_until(lambda: len(refused) == 11)


# -- start_tls and stop_tls -------------------------------------------------------------------------------------------


def starttls(conn):
    """A line protocol that goes to TLS and back."""
    while line := conn.recv_until(b"\n"):
        if line == b"STARTTLS\n":
            conn.sendall(b"go ahead\n")
            conn.start_tls()
        elif line == b"STOPTLS\n":
            conn.sendall(b"back\n")
            conn.stop_tls()
        else:
            conn.sendall(line.upper())


@pytest.fixture
def starttls_server(serve, tls):
    """A plain server whose connections start TLS with a configuration of their own."""

    class Upgrading(Connection):
        def start_tls(self, config=None, **options):
            return super().start_tls(config or tls, **options)

    return serve(starttls, connection_class=Upgrading)


def test_tls_is_started_and_stopped_in_a_handler(starttls_server, connect, in_thread, shared):
    sock = connect(starttls_server)
    context = client_context(shared.ca_file)

    def talk(sock, line):
        sock.sendall(line)
        return sock.recv(100)

    for _ in range(3):
        assert in_thread(talk, sock, b"plain\n") == b"PLAIN\n"
        assert in_thread(talk, sock, b"STARTTLS\n") == b"go ahead\n"
        encrypted = in_thread(lambda sock=sock: context.wrap_socket(sock, server_hostname="localhost"))
        assert in_thread(talk, encrypted, b"secret\n") == b"SECRET\n"
        assert in_thread(talk, encrypted, b"STOPTLS\n") == b"back\n"
        sock = in_thread(encrypted.unwrap)
        sock.settimeout(SOON)
    assert in_thread(talk, sock, b"plain\n") == b"PLAIN\n"
    sock.close()


def test_start_tls_tells_what_was_agreed_on(serve, tls, shared, connect, in_thread):
    seen = []

    def handle(conn):
        info = conn.start_tls(tls)
        seen.append((info.version, info.server_name, conn.tls.version))
        with pytest.raises(StartTLSError, match="already"):
            conn.start_tls(tls)
        conn.sendall(b"hello")

    sock = connect(serve(handle))
    client = in_thread(lambda: client_context(shared.ca_file).wrap_socket(sock, server_hostname="localhost"))
    assert in_thread(client.recv, 10) == b"hello"
    assert seen == [("TLSv1.3", "localhost", "TLSv1.3")]
    client.close()


def test_start_tls_and_stop_tls_in_the_wrong_state(serve, connect):
    seen = []

    def handle(conn):
        for call, message in ((conn.start_tls, "no TLS configuration"), (conn.stop_tls, "not encrypted")):
            with pytest.raises(StartTLSError, match=message) as caught:
                call()
            seen.append(caught.value)

    connect(serve(handle))
    wait_until(lambda: len(seen) == 2)


def test_plaintext_read_ahead_is_not_smuggled_in(serve, tls, connect, in_thread):
    """RFC 3207 section 6: what stands behind STARTTLS in the same packet may be another's."""
    seen = []

    def handle(conn):
        assert conn.recv_until(b"\n") == b"STARTTLS\n"
        conn.sendall(b"go ahead\n")
        with pytest.raises(StartTLSError, match="12 unencrypted bytes") as caught:
            conn.start_tls(tls)
        assert conn.tls is None
        seen.append(caught.value)

    client = connect(serve(handle))
    client.sendall(b"STARTTLS\nDELETE MAIL\n")
    assert in_thread(read_all, client) == b"go ahead\n"
    assert len(seen) == 1


def test_plaintext_in_the_kernel_is_not_smuggled_in(serve, tls, connect, in_thread, quiet):
    """It is read as the begin of the handshake, which fails."""
    served = []

    def handle(conn):
        assert conn.recv_exactly(9) == b"STARTTLS\n"
        gevent.sleep(0.02)  # until the rest is there
        conn.sendall(b"go ahead\n")
        conn.start_tls(tls)
        served.append(conn.recv_until(b"\n"))

    server = serve(handle)
    client = connect(server)
    client.sendall(b"STARTTLS\nEXPUNGE\n")
    assert in_thread(read_all, client).startswith(b"go ahead\n\x15\x03")  # and an alert
    assert served == []
    wait_until(lambda: failures(server) == {"not_tls": 1})
    assert server.stats().handler_errors == 0


def test_start_tls_is_bounded_in_time(serve, tls, connect, in_thread, quiet):
    seen = []

    def handle(conn):
        try:
            conn.start_tls(tls, timeout=0.02)
        except TimeoutError as error:
            seen.append(error)
            raise

    server = serve(handle)
    client = connect(server)
    assert in_thread(client.recv, 10) == b""
    assert len(seen) == 1
    assert failures(server) == {"timeout": 1}
    assert server.stats().timeouts == 1


def test_stop_tls_with_a_peer_that_goes_away(serve, tls, tls_client):
    seen = []

    def handle(conn):
        try:
            conn.stop_tls()
        except OSError as error:
            seen.append(error)

    client = tls_client(serve(handle, tls=tls))
    socket.socket(fileno=client.detach()).close()
    wait_until(lambda: seen)


# -- reload -----------------------------------------------------------------------------------------------------------


def served_certificate(client):
    return client.getpeercert()["serialNumber"]


def test_reload_serves_the_new_certificate_and_leaves_connections_alone(serve, tmp_path, connect, in_thread):
    files = Files(tmp_path)
    server = serve(echo, tls=TLSConfig(*files.issue("server", "localhost")))
    context = client_context(files.ca_file)

    def open_client():
        sock = connect(server)
        return in_thread(lambda: context.wrap_socket(sock, server_hostname="localhost"))

    old = open_client()
    files.issue("server", "localhost")
    server.reload_tls()
    new = open_client()
    assert served_certificate(new) != served_certificate(old)
    files.write("server.key", b"broken")
    with pytest.raises(ValueError, match="private key"):
        server.reload_tls()
    newest = open_client()
    assert served_certificate(newest) == served_certificate(new)
    for client in (old, new, newest):
        client.sendall(b"hello")
        assert in_thread(client.recv, 10) == b"hello"
        client.close()


# -- clients that do not do their part --------------------------------------------------------------------------------


def test_200_silent_clients_do_not_keep_a_good_one_waiting(serve, tls, connect, tls_client, in_thread):
    server = serve(echo, tls=tls, pool=100)
    silent = [connect(server) for _ in range(200)]
    wait_until(lambda: server.stats().handshaking == 200)
    assert server.stats().handlers == 0
    client = tls_client(server)
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    assert server.stats().active == 1
    assert server.stats().handshaking == len(silent)


def test_the_lane_drops_the_oldest_when_it_is_full(serve, shared, connect, tls_client, in_thread, quiet):
    server = serve(echo, tls=TLSConfig(*shared.server, max_handshakes=3))
    silent = []
    for number in range(5):
        silent.append(connect(server))
        wait_until(lambda number=number: server.accepted_connections == number + 1)
    for oldest in silent[:2]:
        assert in_thread(oldest.recv, 10) == b""
    assert failures(server) == {"crowded_out": 2}
    client = tls_client(server)
    client.sendall(b"hello")
    assert in_thread(client.recv, 10) == b"hello"
    assert failures(server) == {"crowded_out": 3}
    assert server.stats().handshaking == 2


@pytest.mark.slow
def test_a_lane_of_one_is_waited_for_by_a_stop(serve, shared, connect, in_thread):
    """The oldest makes room for the newest: at no time does the server seem to have nobody connected."""
    server = serve(hello, tls=TLSConfig(*shared.server, max_handshakes=1))
    connect(server)
    wait_until(lambda: server.stats().handshaking == 1)
    sock = connect(server)
    wait_until(lambda: failures(server) == {"crowded_out": 1})
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.stopping)
    gevent.sleep(0.05)
    client = in_thread(lambda: client_context(shared.ca_file).wrap_socket(sock, server_hostname="localhost"))
    assert in_thread(read_all, client) == b"hello\n"
    client.close()
    report = stopping.get(timeout=SOON)
    assert (report.finished, report.ended) == (1, 0)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_handshake_byte_by_byte(serve, tls, shared, connect, in_thread, spawn_thread, version):
    server = serve(hello, tls=tls)
    sock = connect(server)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client = MemoryClient(sock, client_context(shared.ca_file, version=version))

    def drip(data):
        for place in range(len(data)):
            sock.sendall(data[place : place + 1])
            time.sleep(0)

    spawn_thread(client.handshake, drip).get(timeout=SOON)
    while True:
        with contextlib.suppress(ssl.SSLWantReadError):
            assert client.tls.read(10) == b"hello\n"
            break
        client.incoming.write(in_thread(sock.recv, 65536))


def test_a_handshake_that_takes_too_long(serve, shared, connect, in_thread, quiet):
    server = serve(hello, tls=TLSConfig(*shared.server, handshake_timeout=0.05))
    silent, dripping = connect(server), connect(server)
    dripping.sendall(b"\x16\x03\x01")
    assert in_thread(silent.recv, 10) == b""
    assert in_thread(dripping.recv, 10) == b""
    assert failures(server) == {"timeout": 2}
    assert server.stats().handshaking == 0


@pytest.mark.slow
def test_each_slow_handshake_is_ended_though_others_came_before(serve, shared, connect, in_thread):
    server = serve(hello, tls=TLSConfig(*shared.server, handshake_timeout=0.1))
    for _ in range(2):
        silent = []
        for _ in range(3):
            silent.append(connect(server))
            gevent.sleep(0.04)
        for client in silent:
            assert in_thread(client.recv, 10) == b""
    assert failures(server) == {"timeout": 6}


@pytest.fixture
def descriptors():
    before = len(os.listdir("/proc/self/fd"))
    return lambda: len(os.listdir("/proc/self/fd")) - before


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH", "OPTIONS"])
def test_plain_http_gets_a_400_that_says_so(serve, tls, connect, in_thread, method, quiet):
    server = serve(hello, tls=tls)
    client = connect(server)
    client.sendall(f"{method} /a?b HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = in_thread(read_all, client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"speaks TLS" in body
    assert f"Content-Length: {len(body)}".encode() in head
    assert failures(server) == {"http_request": 1}


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_with_plain_http_is_told(serve, tls, in_thread):
    server = serve(http, tls=tls)
    done = in_thread(run, "curl", "-sS", "-w", " %{http_code}", f"http://{server.address}/")
    assert done.stdout == "This port speaks TLS. Use https:// instead. 400"


@pytest.mark.slow
def test_1000_plain_text_clients(serve, tls, connect, spawn_thread, descriptors, quiet):
    before = descriptors()
    server = serve(hello, tls=tls)

    def talk():
        answers = []
        for number in range(1000):
            data = b"GET / HTTP/1.1\r\n\r\n" if number % 2 else b"SSH-2.0-OpenSSH_9.2\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=SOON) as sock:
                sock.sendall(data)
                answers.append(read_all(sock))
        return answers

    answers = spawn_thread(talk).get(timeout=SOON)
    assert all(answer.startswith(b"HTTP/1.1 400 ") for answer in answers[1::2])
    assert set(answers[::2]) == {b"\x15\x03\x01\x00\x02\x02\x0a"}  # alert: unexpected_message
    assert failures(server) == {"http_request": 500, "not_tls": 500}
    assert server.stats().handler_errors == 0
    server.halt()
    wait_until(lambda: descriptors() <= before)


@pytest.mark.slow
def test_2000_resets_before_and_in_the_handshake(serve, tls, spawn_thread, descriptors, quiet):
    before = descriptors()
    server = serve(hello, tls=tls)
    hello_bytes = client_hello()

    def reset():
        for number in range(2000):
            with socket.create_connection(("127.0.0.1", server.port), timeout=SOON) as sock:
                if number % 4:
                    sock.sendall(hello_bytes[: (0, 1, 100, None)[number % 4]])
                if number % 4 == 3:
                    sock.recv(1)  # the server is in the midst of its part
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    spawn_thread(reset).get(timeout=SOON)

    def counted():
        stats = server.stats()
        return stats.left_in_queue + stats.handshake_failures.get("reset", 0) == 2000

    wait_until(counted)
    assert set(failures(server)) <= {"reset"}
    assert server.stats().handshaking == server.stats().active == server.stats().handler_errors == 0
    server.halt()
    wait_until(lambda: descriptors() <= before)


def client_hello():
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        client_context().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("end", [b"", b"\x16\x03\x01", None])
def test_clients_that_close_in_the_handshake(serve, tls, connect, end, quiet):
    server = serve(hello, tls=tls)
    sock = connect(server)
    sock.sendall(client_hello() if end is None else end)
    sock.shutdown(socket.SHUT_WR)
    wait_until(lambda: failures(server) == {"eof": 1})


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize(("options", "client", "kind"), FAILURES)
def test_every_alert_ends_in_a_counter(serve, shared, in_thread, caplog, options, client, kind):
    caplog.set_level(logging.DEBUG, "gtcpserver")
    if "client_auth" in options:
        options = {**options, "client_ca": shared.ca_file}
    server = serve(hello, tls=TLSConfig(*shared.server, **options))
    in_thread(s_client, server, *client)
    wait_until(lambda: failures(server) == {kind: 1})
    assert (server.stats().active, server.stats().handshaking, server.stats().handler_errors) == (0, 0, 0)
    lines = [record for record in caplog.records if "TLS handshake with" in record.message]
    assert len(lines) == 1
    assert f"({kind})" in lines[0].message
    assert lines[0].levelno == logging.DEBUG
    assert lines[0].exc_info is None


# -- places, limits, stops --------------------------------------------------------------------------------------------


def test_handshakes_that_finish_while_the_pool_is_full_wait_for_a_place(serve, tls, shared, connect, in_thread):
    running = []

    def handle(conn):
        running.append(conn)
        conn.sendall(b"hello")
        conn.recv(1)
        running.remove(conn)

    server = serve(handle, tls=tls, pool=1)
    socks = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().handshaking == 3)
    context = client_context(shared.ca_file)
    clients = [in_thread(lambda sock=sock: context.wrap_socket(sock, server_hostname="localhost")) for sock in socks]
    for client in clients:
        assert in_thread(client.recv, 10) == b"hello"
        assert len(running) == server.stats().handlers == 1
        client.close()
    wait_until(lambda: not running)


@pytest.mark.parametrize("on_full", ["wait", "close_idle"])
def test_max_connections_holds_for_handshakes_that_finish_together(
    serve, tls, shared, connect, in_thread, on_full
):  # fmt: skip
    def handle(conn):
        conn.sendall(b"hello")
        with conn.idle():
            conn.recv(1)

    server = serve(handle, tls=tls, max_connections=1, on_full=on_full)
    socks = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().handshaking == 3)
    context = client_context(shared.ca_file)
    clients = [in_thread(lambda sock=sock: context.wrap_socket(sock, server_hostname="localhost")) for sock in socks]
    for client in clients:
        assert in_thread(client.recv, 10) == b"hello"
        if on_full == "wait":
            client.close()
    assert server.stats().peak == 1


def test_a_graceful_stop_finishes_handshakes_and_serves_them(serve, tls, shared, connect, in_thread):
    server = serve(echo, tls=tls)
    socks = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().handshaking == 3)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.stopping)
    gevent.sleep(0.05)
    context = client_context(shared.ca_file)
    for sock in socks:
        client = in_thread(lambda sock=sock: context.wrap_socket(sock, server_hostname="localhost"))
        client.sendall(b"hello")
        assert in_thread(client.recv, 10) == b"hello"
        client.close()
    report = stopping.get(timeout=SOON)
    assert (report.finished, report.ended) == (3, 0)
    assert failures(server) == {}


def test_a_stop_ends_when_the_last_handshake_has_failed(serve, tls, connect, monkeypatch):
    monkeypatch.setattr(stopping_module, "LONGEST_WITHOUT_A_LOOK", SOON)
    server = serve(hello, tls=tls)
    client = connect(server)
    wait_until(lambda: server.stats().handshaking == 1)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.listening_ended.is_set())
    client.close()
    assert stopping.get(timeout=SOON / 2).ended == 0


@pytest.mark.slow
def test_a_stop_does_not_wait_longer_than_a_handshake_may_take(serve, shared, connect, quiet):
    server = serve(echo, tls=TLSConfig(*shared.server, handshake_timeout=0.1))
    connect(server)
    wait_until(lambda: server.stats().handshaking == 1)
    report = server.stop(timeout=SOON)
    assert (report.finished, report.ended) == (0, 0)
    assert failures(server) == {"timeout": 1}


@pytest.mark.slow
def test_a_handler_that_began_after_its_handshake_in_a_stop_is_reported(serve, tls, shared, connect, in_thread):
    server = serve(echo, tls=tls)
    sock = connect(server)
    wait_until(lambda: server.stats().handshaking == 1)
    stopping = gevent.spawn(server.stop, 0.3)
    wait_until(lambda: server.stopping)
    client = in_thread(lambda: client_context(shared.ca_file).wrap_socket(sock, server_hostname="localhost"))
    report = stopping.get(timeout=SOON)
    assert (report.finished, report.ended) == (0, 1)
    client.close()


def test_a_client_that_a_stop_leaves_without_a_place_gets_a_reset_and_no_empty_answer(
    serve, tls, shared, connect, in_thread
):
    go = gevent.event.Event()
    server = serve(lambda conn: go.wait(), tls=tls, pool=1, linger=2)
    socks = [connect(server) for _ in range(2)]  # both are accepted: a handshake holds no place
    wait_until(lambda: server.stats().handshaking == 2)
    context = client_context(shared.ca_file)
    options = {"server_hostname": "localhost", "suppress_ragged_eofs": False}
    clients = [in_thread(lambda sock=sock: context.wrap_socket(sock, **options)) for sock in socks]
    wait_until(lambda: server.active_connections == 1 and not server.stats().handshaking)
    clients[1].sendall(b"request")
    assert server.stop(0.1).ended == 2
    with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):  # an end in order gives b""
        in_thread(clients[1].recv, 10)
    for client in clients:
        client.close()


def test_halt_drops_handshakes(serve, tls, connect, in_thread, descriptors, quiet):
    server = serve(echo, tls=tls)
    socks = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().handshaking == 3)
    report = server.halt()
    assert (report.finished, report.ended) == (0, 0)
    assert failures(server) == {"stopped": 3}
    for sock in socks:
        with contextlib.suppress(ConnectionError):
            assert in_thread(sock.recv, 10) == b""


def test_halt_cuts_those_that_wait_for_a_place(serve, tls, shared, connect, in_thread):
    server = serve(lambda conn: conn.recv(1), tls=tls, pool=1)
    socks = [connect(server) for _ in range(2)]
    wait_until(lambda: server.stats().handshaking == 2)
    context = client_context(shared.ca_file)
    clients = [in_thread(lambda sock=sock: context.wrap_socket(sock, server_hostname="localhost")) for sock in socks]
    wait_until(lambda: server.stats().handshaking == 0)
    report = server.halt()
    assert (report.finished, report.ended) == (0, 2)
    for client in clients:
        client.close()


@pytest.mark.slow
def test_max_accepts_over_tls(serve, tls, tls_client, in_thread):
    server = serve(hello, tls=tls, max_accepts=3)
    for _ in range(3):
        assert in_thread(read_all, tls_client(server)) == b"hello\n"
    assert server.wait_stopped(SOON)
    assert server.accepted_connections == 3


def test_max_accepts_waits_for_the_last_handshake(serve, tls, shared, connect, in_thread):
    server = serve(hello, tls=tls, max_accepts=1)
    sock = connect(server)
    wait_until(lambda: server.stopping)
    gevent.sleep(0.05)
    client = in_thread(lambda: client_context(shared.ca_file).wrap_socket(sock, server_hostname="localhost"))
    assert in_thread(read_all, client) == b"hello\n"
    client.close()
    assert server.wait_stopped(SOON)


def test_stats_of_a_plain_server_know_no_handshakes(serve):
    stats = serve(hello).stats()
    assert (stats.handshaking, stats.handshake_failures) == (0, {})


# -- the drop-in for gevent's server ----------------------------------------------------------------------------------


@pytest.fixture
def stream_server(serve_stream, shared):
    """`stream_server(handle, **options)`: a StreamServer with TLS."""
    files = {"certfile": shared.server[0], "keyfile": shared.server[1]}
    return lambda handle, server_class=StreamServer, **options: serve_stream(
        handle, server_class=server_class, **(options or files)
    )


def open_stream(server, connect, in_thread, shared, **options):
    sock = connect(server.address_text)
    context = client_context(shared.ca_file, **options)
    return in_thread(lambda: context.wrap_socket(sock, server_hostname="localhost"))


def ready_context(shared, factory=gevent.ssl.SSLContext):
    context = factory(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*shared.server)
    return context


def test_a_stream_servers_handler_gets_an_encrypted_connection(stream_server, connect, in_thread, shared):
    seen = []

    def handle(sock, address):
        seen.append((type(sock), sock.version(), sock.tls.server_name, sock.client_address == address))
        sock.sendall(sock.recv(100).upper())

    arguments = [
        {"ssl_context": ready_context(shared)},
        {"ssl_context": ready_context(shared, ssl.SSLContext)},
        {"ssl_context": ready_context(shared), "server_side": True},
        {"certfile": shared.server[0], "keyfile": shared.server[1], "ciphers": "ECDHE+AESGCM"},
    ]
    for given in arguments:
        client = open_stream(stream_server(handle, **given), connect, in_thread, shared)
        client.sendall(b"hello")
        assert in_thread(client.recv, 10) == b"HELLO"
        client.suppress_ragged_eofs = False
        assert in_thread(client.recv, 10) == b""  # close_notify
        client.close()
    assert seen == [(Connection, "TLSv1.3", None, True)] * len(arguments)


def test_a_stream_server_asks_for_client_certificates(stream_server, connect, in_thread, shared, quiet):
    seen = []
    server = stream_server(
        lambda sock, address: seen.append(sock.getpeercert()["subjectAltName"]),
        certfile=shared.server[0], keyfile=shared.server[1], cert_reqs=ssl.CERT_REQUIRED, ca_certs=shared.ca_file,
    )  # fmt: skip
    client = open_stream(server, connect, in_thread, shared, client=shared.client)
    assert in_thread(client.recv, 10) == b""
    assert seen == [(("email", "client@example.com"),)]


@pytest.mark.parametrize("option", ["suppress_ragged_eofs", "do_handshake_on_connect"])
def test_arguments_only_gevent_knows_give_its_socket(stream_server, connect, in_thread, shared, option):
    seen = []

    def handle(sock, address):
        seen.append(type(sock))
        sock.do_handshake()
        sock.sendall(b"hello")

    for given in ({"ssl_context": ready_context(shared)}, {"certfile": shared.server[0], "keyfile": shared.server[1]}):
        server = stream_server(handle, **given, **{option: False})
        client = open_stream(server, connect, in_thread, shared)
        assert in_thread(client.recv, 10) == b"hello"
        client.close()
    assert seen == [gevent.ssl.SSLSocket] * 2


def test_a_wrap_socket_of_the_programs_own_is_called(stream_server, connect, in_thread, shared):
    context = ready_context(shared)
    called = []

    def wrap(sock, **options):
        called.append(options)
        return context.wrap_socket(sock, **options)

    server = stream_server(lambda sock, address: sock.sendall(type(sock).__name__.encode()))
    server.wrap_socket = wrap
    server.ssl_args = {"server_side": True}
    assert in_thread(open_stream(server, connect, in_thread, shared).recv, 20) == b"SSLSocket"
    assert called == [{"server_side": True}]


def test_an_sni_callback_of_the_programs_own_gets_gevents_socket(stream_server, connect, in_thread, shared):
    context = ready_context(shared)
    seen = []
    context.sni_callback = lambda sock, name, context: seen.append((type(sock), name))
    server = stream_server(lambda sock, address: sock.sendall(b"hello"), ssl_context=context)
    assert in_thread(open_stream(server, connect, in_thread, shared).recv, 20) == b"hello"
    assert seen == [(gevent.ssl.SSLSocket, "localhost")]


def test_a_stream_server_uses_new_files_at_once(stream_server, connect, in_thread, tmp_path):
    files = Files(tmp_path)
    certfile, keyfile = files.issue("server", "localhost")
    server = stream_server(lambda sock, address: None, certfile=certfile, keyfile=keyfile)
    first = served_certificate(open_stream(server, connect, in_thread, files))
    assert served_certificate(open_stream(server, connect, in_thread, files)) == first
    files.issue("server", "localhost")
    assert served_certificate(open_stream(server, connect, in_thread, files)) != first


def test_failed_handshakes_of_a_stream_server_are_a_debug_line(stream_server, connect, in_thread, caplog, capfd):
    caplog.set_level(logging.DEBUG, "gtcpserver")

    class Impatient(StreamServer):
        handshake_timeout = 0.05

    served = []
    patient, impatient = (
        stream_server(lambda sock, address: served.append(address), server_class=kind)
        for kind in (StreamServer, Impatient)
    )
    plain, resetting, silent = (connect(server.address_text) for server in (patient, patient, impatient))
    plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert in_thread(plain.recv, 100).startswith(b"HTTP/1.1 400 ")
    resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    resetting.close()
    assert in_thread(silent.recv, 10) == b""
    wait_until(lambda: caplog.text.count("TLS handshake with (") == 3)
    for kind in ("http_request", "timeout", "reset"):
        assert f"failed ({kind})" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    assert served == []


def test_unwrap_of_a_stream_servers_connection(stream_server, connect, in_thread, shared):
    def handle(sock, address):
        sock = sock.unwrap()
        sock.sendall(b"plain")

    client = open_stream(stream_server(handle), connect, in_thread, shared)
    plain = in_thread(client.unwrap)
    plain.settimeout(SOON)
    assert in_thread(plain.recv, 10) == b"plain"
    plain.close()


# -- inside a program -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_ends_when_its_tls_server_has_stopped(python, tls, shared):
    program = python(
        """
        import sys, gtcpserver
        server = gtcpserver.Server("127.0.0.1:0", print, tls=gtcpserver.TLSConfig(*sys.argv[1:]), max_accepts=1)
        server.start()
        print(server.port)
        report = server.serve_forever()
        print(report.finished, server.stats().handshake_failures)
        """,
        *shared.server,
    )
    port = int(program.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"no TLS\r\n")
        output, errors = program.communicate(timeout=SOON)
    assert (output, errors) == (b"0 {'not_tls': 1}\n", b"")


@pytest.mark.slow
def test_a_stop_allows_for_the_round_trips_of_tls_before_the_first_request(serve, tls, tls_client, in_thread):
    def handle(conn):
        conn.accepted_at -= 1.2  # more than a plain connection gets
        with conn.idle():
            data = conn.recv(100)
        conn.sendall(data)

    server = serve(handle, tls=tls)
    client = tls_client(server)
    wait_until(lambda: server.stats().idle == 1)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(server.listening_ended.is_set)
    in_thread(client.sendall, b"hello")
    assert in_thread(client.recv, 100) == b"hello"
    assert stopping.get(timeout=SOON).ended == 0
