"""TLS 1.3 key updates (RFC 8446 section 4.6.3): a peer may ask for new keys at any time."""

import _ssl
import ctypes
import fcntl
import socket
import ssl
import struct
import termios

import gevent
import pytest

from gtcpserver.testing import certificates
from kit.waiting import wait_until

UPDATE_REQUESTED = 1  # SSL_KEY_UPDATE_REQUESTED, openssl/ssl.h

try:
    key_update = ctypes.CDLL(_ssl.__file__).SSL_key_update
    key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
except (AttributeError, OSError):
    key_update = None

pytestmark = pytest.mark.skipif(
    key_update is None or not ssl.HAS_TLSv1_3, reason="this Python's OpenSSL cannot be asked for a key update"
)


class Client:
    """A client that updates its keys when it is told to. Python's ssl module cannot; OpenSSL's function is called."""

    def __init__(self, sock, context, in_thread):
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._in_thread = in_thread
        self._call(self._tls.do_handshake)
        assert self._tls.version() == "TLSv1.3"

    def update_keys(self):
        # struct PySSLSocket of CPython: the object's head, the socket, then the SSL*.
        inner = self._tls._sslobj  # noqa: SLF001  ssl has no key updates
        pointer = struct.unpack_from("P", ctypes.string_at(id(inner), 32), 24)[0]
        assert key_update(pointer, UPDATE_REQUESTED) == 1

    def send(self, data):
        self._call(self._tls.write, data)

    def receive(self, size):
        return self._call(self._tls.read, size)

    def _call(self, function, *arguments):
        while True:
            try:
                return function(*arguments)
            except ssl.SSLWantReadError:
                pass
            finally:
                if data := self._outgoing.read():
                    self._in_thread(self.sock.sendall, data)
            received = self._in_thread(self.sock.recv, 65536)
            if not received:
                return b""
            self._incoming.write(received)


@pytest.fixture
def tls_client(serve, connect, in_thread, tmp_path):
    with certificates() as made:

        def open_client(handler):
            # A unix socket takes a record whole or not at all, so that a handler can tell when the next finds no room.
            server = serve(handler, f"unix:{tmp_path}/socket", tls=made.server)
            return Client(connect(server), made.client, in_thread)

        yield open_client


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def test_a_conversation_goes_on_with_new_keys(tls_client):
    client = tls_client(echo)
    for number in range(20):
        client.update_keys()
        client.send(b"message %d" % number)
        assert client.receive(100) == b"message %d" % number


def test_a_key_update_that_cannot_be_answered_yet_is_no_end(tls_client):
    # OpenSSL 3 answers with its next write; whatever it does, nothing of the conversation may be lost.
    heard = []

    def handler(conn):
        size = conn.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        while struct.unpack("i", fcntl.ioctl(conn.fileno(), termios.TIOCOUTQ, bytes(4)))[0] < size:
            conn.sendall(bytes(1000))
        heard.append("full")
        heard.append(conn.recv(100))

    client = tls_client(handler)
    wait_until(lambda: heard)
    client.update_keys()
    client.send(b"still there")
    gevent.sleep(0.05)
    while client.receive(1 << 20):
        pass
    assert heard == ["full", b"still there"]
