"""What the peers share: options, and the work done for a request."""

from __future__ import annotations

import argparse
import os
import ssl
import time
from collections.abc import Callable
from typing import Any

END_OF_HEAD = b"\r\n\r\n"


def options(description: str, **extra: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--keepalive", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--sleep", type=float, default=0.0, metavar="MS")
    parser.add_argument("--aes128", action="store_true")
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def host_and_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host, int(port)


def announce(address: Any) -> None:
    print(f"listening on {address[0]}:{address[1]}", flush=True)


def tls_context(given: argparse.Namespace, module: Any = ssl) -> Any:
    if given.tls_cert is None:
        return None
    context = module.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given.tls_cert, given.tls_key)
    return context


def answer_maker(given: argparse.Namespace) -> Callable[[bool], bytes]:
    """What is answered; ``keep``: the connection stays open after it."""
    body = b"a" * given.size
    if not given.aes128:
        return {keep: response(body, keep) for keep in (False, True)}.__getitem__
    return lambda keep: response(encrypt(body), keep)


def encrypt(content: bytes) -> bytes:
    """AES-128 in CBC mode with PKCS #7 padding (RFC 5652 section 6.3), as examples/http_server.py does it."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    vector = os.urandom(16)
    encryptor = Cipher(algorithms.AES128(b"0123456789ABCDEF"), modes.CBC(vector)).encryptor()
    padding = 16 - len(content) % 16
    return vector + encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()


def blocking_handler(given: argparse.Namespace, wait: Callable[[float], Any] = time.sleep) -> Callable[[Any], None]:
    """The handler of the blocking peers: statement for statement what examples/http_server.py does."""
    answer, keepalive, timeout, sleep = answer_maker(given), given.keepalive, given.timeout, given.sleep / 1000

    def handle(sock: Any) -> None:
        if timeout is not None:
            sock.settimeout(timeout)
        rest = b""
        try:
            while True:
                if not rest:
                    rest = sock.recv(8192)
                    if not rest:
                        return
                while (end := rest.find(END_OF_HEAD)) < 0:
                    more = sock.recv(8192)
                    if not more:
                        return
                    rest += more
                end += 4
                if end == len(rest):
                    head, rest = rest, b""
                else:
                    head, rest = rest[:end], rest[end:]
                if not head.startswith(b"GET /"):
                    return
                keep = keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
                head = b""
                if sleep:
                    wait(sleep)
                sock.sendall(answer(keep))
                if not keep:
                    return
        except OSError:
            # wrk leaves by a reset; a traceback for each of its connections would be measured too.
            return

    return handle


def response(body: bytes, keep: bool) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        b"keep-alive" if keep else b"close",
        len(body),
        body,
    )
