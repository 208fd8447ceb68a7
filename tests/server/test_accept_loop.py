"""The accept loop: what it has accepted is served or closed."""

import os

import pytest

import gtcpserver
from kit.handlers import echo


@pytest.mark.skipif(not gtcpserver.compiled, reason="in pure Python the socket object does this")
def test_a_descriptor_that_cannot_be_made_non_blocking_is_closed(serve, connect, in_thread, monkeypatch, tmp_path):
    server = serve(echo, f"unix:{tmp_path / 's'}")
    real, calls = os.set_blocking, []

    def fail_once(fd, blocking):
        calls.append(fd)
        if len(calls) == 1:
            raise PermissionError(1, "as a filter of seccomp(2) answers")
        real(fd, blocking)

    monkeypatch.setattr(os, "set_blocking", fail_once)
    assert in_thread(connect(server).recv, 1) == b""
    client = connect(server)
    client.sendall(b"x")
    assert in_thread(client.recv, 1) == b"x"
    assert len(calls) == 2
