"""start_tls beside files of makefile, which may have read ahead what a man in the middle has put behind STARTTLS."""

import gc

import pytest

from gtcpserver import StartTLSError
from kit.tls import MemoryClient, client_context, read_exactly
from kit.waiting import wait_until

INJECTED = b"STARTTLS\r\nMAIL FROM:<mallory@example.com>\r\n"


MODES = [("rb", {}), ("r", {}), ("rwb", {}), ("rw", {"encoding": "ascii"}), ("rb", {"buffering": 100})]


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_commands_injected_behind_starttls_are_not_read_as_encrypted(serve, tls, connect, mode, options):
    read = []

    def handle(conn):
        lines = conn.makefile(mode, **options)
        for line in lines:
            read.append((line, conn.tls is not None))
            if "STARTTLS" in str(line):
                conn.sendall(b"220\r\n")
                conn.start_tls(tls, timeout=5)

    server = serve(handle)
    client = connect(server)
    client.sendall(INJECTED)
    wait_until(lambda: server.stats().handler_errors == 1)
    assert [encrypted for _, encrypted in read] == [False]


def test_the_error_says_what_to_do(serve, tls, connect):
    caught = []

    def handle(conn):
        lines = conn.makefile("rb")
        lines.readline()
        with pytest.raises(StartTLSError) as error:
            conn.start_tls(tls)
        caught.append(error.value)

    connect(serve(handle)).sendall(b"STARTTLS\r\n")
    wait_until(lambda: caught)
    assert str(caught[0]) == (
        "a file of makefile() is open for reading, and may hold unencrypted bytes: close it before, and make another "
        "afterwards"
    )


def test_one_taken_off_its_text_file_still_counts(serve, tls, connect):
    caught = []

    def handle(conn):
        text = conn.makefile("r", encoding="ascii", newline="\n")
        text.readline()
        lines = text.detach()
        with pytest.raises(StartTLSError):
            conn.start_tls(tls)
        lines.detach()  # which drops what it has read ahead
        caught.append(conn._is_read_by_file())  # noqa: SLF001  what counts as read by a file

    connect(serve(handle)).sendall(INJECTED)
    wait_until(lambda: caught)
    assert caught == [False]


def test_the_right_way(serve, tls, connect, shared, in_thread):
    """A file in the clear, closed; TLS; another file."""
    read = []

    def handle(conn):
        with conn.makefile("rb") as lines:
            read.append(lines.readline())
        conn.sendall(b"220\r\n")
        conn.start_tls(tls)
        with conn.makefile("rwb") as lines:
            read.append(lines.readline())
            lines.write(b"250\r\n")

    client = connect(serve(handle))
    client.sendall(b"STARTTLS\r\n")
    assert in_thread(read_exactly, client, 5) == b"220\r\n"
    encrypted = MemoryClient(client, client_context(shared.ca_file))
    in_thread(encrypted.handshake)
    encrypted.tls.write(b"hello\r\n")
    client.sendall(encrypted.outgoing.read())
    wait_until(lambda: len(read) == 2)
    assert read == [b"STARTTLS\r\n", b"hello\r\n"]


@pytest.mark.parametrize(("mode", "options"), [("wb", {}), ("w", {}), ("rb", {"buffering": 0})])
def test_files_that_read_nothing_ahead_may_stay_open(serve, tls, connect, shared, in_thread, mode, options):
    """What was injected is in the kernel then, and no TLS handshake."""
    done = []

    def handle(conn):
        file = conn.makefile(mode, **options)
        conn.sendall(b"220\r\n")
        conn.start_tls(tls)
        done.append(file.closed)

    client = connect(serve(handle))
    assert in_thread(read_exactly, client, 5) == b"220\r\n"
    in_thread(MemoryClient(client, client_context(shared.ca_file)).handshake)
    wait_until(lambda: done)
    assert done == [False]


@pytest.mark.slow
def test_files_that_are_gone_are_forgotten(serve, tls, connect):
    counts = []

    def handle(conn):
        for _ in range(100):
            conn.makefile("rb")
        gc.collect()
        conn.makefile("rb")
        counts.append((len(conn._readers), conn._is_read_by_file()))  # noqa: SLF001  what counts as read by a file

    connect(serve(handle))
    wait_until(lambda: counts)
    assert counts[0][0] <= 2
    assert counts[0][1] is False
