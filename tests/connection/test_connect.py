"""connect: a Connection to somebody else's server."""

import errno
import gc
import os
import socket

import gevent
import pytest
from gevent import socket as gevent_socket

from gtcpserver import Connection
from gtcpserver.connection.connect import connect
from gtcpserver.errors import ConfigError
from kit.ports import free_port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", None])
def test_a_connection_is_made(listening, form):
    port = listening.getsockname()[1]
    with connect(form.format(port) if form else ("127.0.0.1", port), timeout=5) as connection:
        accepted, _ = listening.accept()
        assert type(connection) is Connection
        assert connection.gettimeout() is None
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        accepted.sendall(b"hello\n")
        assert connection.recv_until(b"\n") == b"hello\n"
        accepted.close()


@pytest.mark.parametrize("path", ["{}/sock", "@gtcpserver-test-{}"])
def test_unix_sockets(tmp_path, path):
    path = path.format(tmp_path)[-100:] if path.startswith("@") else path.format(tmp_path)
    with gevent_socket.socket(socket.AF_UNIX) as listening:
        name = "@" + path.lstrip("@") if path.startswith("@") else path
        listening.bind("\0" + name[1:] if name.startswith("@") else name)
        listening.listen()
        with connect(f"unix:{name}") as connection:
            accepted, _ = listening.accept()
            accepted.sendall(b"x")
            assert connection.recv(1) == b"x"
            accepted.close()


def test_a_derived_class_and_a_source_address(listening):
    class Upstream(Connection):
        pass

    address = f"127.0.0.1:{listening.getsockname()[1]}"
    with connect(address, source_address=("127.0.0.5", 0), connection_class=Upstream) as connection:
        assert type(connection) is Upstream
        accepted, peer = listening.accept()
        assert peer[0] == "127.0.0.5"
        accepted.close()


def test_nobody_listens(listening):
    port = listening.getsockname()[1]
    listening.close()
    with pytest.raises(ConnectionRefusedError):
        connect(f"127.0.0.1:{port}", timeout=5)


def test_every_address_of_a_name_is_tried(listening, monkeypatch):
    port = listening.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.9", "127.0.0.1")]
    monkeypatch.setattr(gevent_socket, "getaddrinfo", lambda *args, **kwargs: found)
    with connect(f"two.example:{port}", timeout=5) as connection:
        assert connection.getpeername() == ("127.0.0.1", port)


def test_the_timeout_bounds_all_of_it(listening, monkeypatch):
    def look_up(*args, **kwargs):
        gevent.sleep(1000)

    monkeypatch.setattr(gevent_socket, "getaddrinfo", look_up)
    with pytest.raises(TimeoutError, match=r"slow\.example:80 within 0\.05"):
        connect("slow.example:80", timeout=0.05)


@pytest.mark.parametrize("address", ["*:80", ":80", "fd:3", "127.0.0.1:0", 0, "nonsense"])
def test_what_cannot_be_connected_to(address):
    with pytest.raises(ConfigError):
        connect(address)


class Refused(Connection._gevent_sock_class):  # noqa: SLF001  gevent's hook for other sockets
    def setblocking(self, flag):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")  # ioctl(2)


@pytest.mark.slow
@pytest.mark.parametrize("refused", [True, False], ids=["no socket", "nobody listens"])
def test_an_address_that_cannot_be_tried_leaves_no_descriptor_and_no_cycle(monkeypatch, refused):
    if refused:
        monkeypatch.setattr(Connection, "_gevent_sock_class", Refused)
    kinds = (Refused, Connection)
    gc.collect()
    before = os.listdir("/proc/self/fd"), sum(isinstance(one, kinds) for one in gc.get_objects())
    gc.disable()
    try:
        with pytest.raises(OSError, match="Cannot allocate memory" if refused else "refused") as kept:
            connect(f"127.0.0.1:{free_port()}")
        descriptors = os.listdir("/proc/self/fd")  # while the error is kept
        del kept
        assert (descriptors, sum(isinstance(one, kinds) for one in gc.get_objects())) == before
    finally:
        gc.enable()
