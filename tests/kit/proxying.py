"""What clients of the proxy send and read, and rules that let them."""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack, contextmanager
from http.client import parse_headers

import argon2
import gevent
import gevent.socket

from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from kit.clients import read
from kit.patience import SOON

ANYBODY = [parse_client_rule("allow any")]

ANYWHERE = [parse_destination_rule("allow loopback"), parse_destination_rule("allow any")]

LOOPBACK = '[rules]\ndestinations = ["allow loopback", "allow any"]\n'


class OnePassword:
    """Ada's is "pw"."""

    def check(self, user, password, client):
        return (user, password) == (b"Ada", b"pw")


QUICK = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(b"pw")

LOOPBACK_SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "0x7f.1",
    "0x7f000001",
    "0X7F.0.0.1",
    "2130706433",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "0x7f.0x0.0x0.0x1",
    "0177.0x0.1",
    "[::ffff:127.0.0.1]",
    "::ffff:7f00:1",
    "::FFFF:127.0.0.1",
    "0:0:0:0:0:ffff:127.0.0.1",
]

METADATA_SPELLINGS = [
    "169.254.169.254",
    "0xa9fea9fe",
    "2852039166",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "::ffff:169.254.169.254",
    "[::ffff:a9fe:a9fe]",
    "0xA9.0xFE.0xA9.0xFE",
]


@contextmanager
def full_listener():
    """A listening socket that completes no connection more."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # of which the kernel completes two
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full


def socks(port, host="127.0.0.1", user=None, password=b"pw"):
    """What a client says that asks for a connection."""
    name = host.encode()
    request = b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack("!H", port)
    if user is None:
        return b"\x05\x01\x00" + request
    return b"\x05\x01\x02\x01" + bytes([len(user)]) + user + bytes([len(password)]) + password + request


def reply(sock, asked):
    """The reply's code: 0 is granted; None: the proxy closed."""
    sock.sendall(asked)
    answer = read(sock, 2 if asked[2] == 0 else 4)
    if len(answer) < 2 or answer[1] == 0xFF or (len(answer) == 4 and answer[3]):
        return None
    said = read(sock, 10)
    return said[1] if len(said) > 1 else None


def http(sock, request):
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data and (more := sock.recv(65536)):
        data += more
    return data


def bind_request(host="127.0.0.1", port=0, version=5):
    if version == 4:
        return b"\x04\x02" + struct.pack("!H", port) + socket.inet_aton(host) + b"me\0"
    return b"\x05\x02\x00\x01" + socket.inet_aton(host) + struct.pack("!H", port)


def named_address(reply):
    """The address in a reply to SOCKS4 (8 bytes) or SOCKS5 (10)."""
    if len(reply) == 8:
        return socket.inet_ntoa(reply[4:]), struct.unpack("!H", reply[2:4])[0]
    return socket.inet_ntoa(reply[4:8]), struct.unpack("!H", reply[8:])[0]


def udp_socket():
    sock = gevent.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(SOON)
    return sock


def associate(client, in_thread, port=0):
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0" + struct.pack("!H", port))
    return named_address(in_thread(read, client, 12)[2:])


def packet(port, data, fragment=0, host="127.0.0.1"):
    return bytes([0, 0, fragment, 1]) + socket.inet_aton(host) + struct.pack("!H", port) + data


def answer_of(file, method="GET"):
    """(status, fields, body) of the next answer."""
    line = file.readline()
    if not line:
        return None
    status = int(line.split()[1])
    fields = parse_headers(file)
    if method == "HEAD" or status in (204, 304) or status < 200:
        return status, fields, b""
    if fields["transfer-encoding"] == "chunked":
        body = b""
        while size := int(file.readline(), 16):
            body += file.read(size)
            file.readline()
        while file.readline().strip():
            pass
        return status, fields, body
    if fields["content-length"] is not None:
        return status, fields, file.read(int(fields["content-length"]))
    return status, fields, file.read()


def in_thread_for(seconds, function):
    return gevent.get_hub().threadpool.spawn(function).get(timeout=seconds)
