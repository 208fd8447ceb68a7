"""The examples that move files and streams, as programs."""

import os
import socket
import urllib.request

import pytest

from kit.patience import SOON
from kit.ports import free_port

pytestmark = pytest.mark.slow

BIG = os.urandom(2_000_000)


def connect(example):
    return socket.create_connection(example.address, SOON)


def test_file_server(start):
    example = start("file_server.py")
    host, port = example.address
    request = urllib.request.Request(f"http://{host}:{port}/README.md", headers={"Range": "bytes=0-11"})
    with urllib.request.urlopen(request, timeout=SOON) as answer:
        assert (answer.status, answer.read()) == (206, b"# gtcpserver\n"[:12])
    example.stop()


def test_port_forwarder(start):
    target = start("echo.py")
    example = start("port_forwarder.py", TARGET="{}:{}".format(*target.address))
    with connect(example) as client:
        client.sendall(b"through")
        assert client.recv(100) == b"through"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert "7 bytes there, 7 back: closed" in example.stop()


def test_port_forwarder_resets_a_client_for_whom_there_is_no_target(start):
    example = start("port_forwarder.py", TARGET=f"127.0.0.1:{free_port()}")
    # The reset may come before connect() has returned.
    with pytest.raises(ConnectionResetError), connect(example) as client:
        client.recv(100)
    assert "refused" in example.stop()


def test_upload_sink(start, tmp_path):
    example = start("upload_sink.py", UPLOADS=str(tmp_path))
    with connect(example) as client, client.makefile("rb") as answers:
        client.sendall(b"PUT big 2000000\n" + BIG + b"PUT empty 0\nPUT big 3\nnew")
        assert [answers.readline() for _ in range(3)] == [
            b"STORED big 2000000\n",
            b"STORED empty 0\n",
            b"STORED big 3\n",
        ]
        assert (tmp_path / "big").read_bytes() == b"new"
        client.sendall(b"PUT big2 2000000\n" + BIG)
        assert answers.readline() == b"STORED big2 2000000\n"
        assert (tmp_path / "big2").read_bytes() == BIG
    example.stop()


@pytest.mark.parametrize(
    "line", [b"PUT ../x 1\n", b"PUT .x 1\n", b"PUT x -1\n", b"PUT x\n", b"GET x 1\n", b"PUT x 1e3\n"]
)
def test_upload_sink_refuses(start, tmp_path, line):
    example = start("upload_sink.py", UPLOADS=str(tmp_path))
    with connect(example) as client:
        client.sendall(line)
        assert client.makefile("rb").read() == b"ERROR expected: PUT name size\n"
    assert os.listdir(tmp_path) == []
    example.stop()


def test_upload_sink_keeps_no_half_of_a_file(start, tmp_path):
    example = start("upload_sink.py", UPLOADS=str(tmp_path))
    with connect(example) as client:
        client.sendall(b"PUT x 100\nonly this")
        client.shutdown(socket.SHUT_WR)
        assert client.makefile("rb").read() == b"ERROR x: 9 of 100 bytes came\n"
    assert os.listdir(tmp_path) == []
    example.stop()
