"""An answer that an error of this system has cut short is reset: its end in order would make it look whole."""

import errno
import os
import socket

import pytest

from kit.patience import SOON


def end_of(port):
    """How a connection ends after a part of an answer has come: "reset" or "in order"."""
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(b"request")
        assert client.recv(4, socket.MSG_WAITALL) == b"part"
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            return "reset"
        return "in order"


def answering(error):
    def handle(conn):
        conn.recv(100)
        conn.sendall(b"part")
        raise error

    return handle


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.EIO)),
        PermissionError(errno.EPERM, "refused by a filter"),
        MemoryError(),
    ],
    ids=repr,
)
def test_an_error_of_the_system_resets_the_connection(serve, in_thread, error):
    server = serve(answering(error))
    assert in_thread(end_of, server.port) == "reset"


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "no such file")], ids=repr)
def test_an_error_of_the_handler_ends_it_in_order(serve, in_thread, error):
    """What it has written before is delivered, as ever."""
    server = serve(answering(error))
    assert in_thread(end_of, server.port) == "in order"
