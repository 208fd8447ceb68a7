"""A minimal HTTP/1.1 server for benchmarks: the test server of the Go original, with its options.

    python examples/http_server.py --listen 127.0.0.1:8000 --size 1024

It sends the same body to every request, and reads no request bodies. For real HTTP use a real HTTP server
(``gevent.pywsgi`` runs on the same sockets); this shows what a protocol handler with plain blocking calls costs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import gevent

from gtcpserver import Connection, GtcpServerError, Server, TLSConfig, run

#: A longer request head is refused (node.js allows 16 KiB, Apache 8 KiB a line).
LONGEST_HEAD = 64 * 1024

END_OF_HEAD = b"\r\n\r\n"


def http_handler(
    answer: Callable[[bool], bytes], keepalive: bool, use_idle: bool = True
) -> Callable[[Connection], None]:
    """Return a handler that sends ``answer(keep)`` for each request; ``keep``: the connection stays open after it."""

    def handle(conn: Connection) -> None:
        idle = conn.idle() if use_idle and keepalive else None
        rest = b""
        while True:
            if not rest:
                if idle is None:
                    rest = conn.recv(8192)
                else:
                    # Between two requests: a stop may close the connection here, and it takes no place in the pool.
                    with idle:
                        rest = conn.recv(8192)
                if not rest:
                    return
            while (end := rest.find(END_OF_HEAD)) < 0:
                if len(rest) > LONGEST_HEAD:
                    conn.sendall(error("431 Request Header Fields Too Large"))
                    return
                more = conn.recv(8192)
                if not more:
                    return
                rest += more
            end += 4
            if end == len(rest):
                head, rest = rest, b""
            else:
                head, rest = rest[:end], rest[end:]
            if not head.startswith(b"GET /"):
                conn.sendall(error("400 Bad Request" if b" HTTP/1." not in head else "405 Method Not Allowed"))
                return
            keep = keepalive and (b"onnection: close" not in head) and (b" HTTP/1.0\r\n" not in head)
            head = b""  # an idle connection holds no memory: saves 0.1 KiB each
            conn.sendall(answer(keep))
            if not keep:
                return

    return handle


def response(body: bytes, keep: bool) -> bytes:
    connection = b"keep-alive" if keep else b"close"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        connection,
        len(body),
        body,
    )


def error(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


def answer_maker(size: int, sleep: float, aes128: bool, sha: bool) -> Callable[[bool], bytes]:
    """Return a function that does the work of each request."""
    body = b"a" * size
    ready = {keep: response(body, keep) for keep in (False, True)}
    if not (sleep or aes128 or sha):
        return ready.__getitem__

    def make(keep: bool) -> bytes:
        if sleep:
            gevent.sleep(sleep)
        if not (aes128 or sha):
            return ready[keep]
        content = body
        if sha:
            content = hashlib.sha256(content).hexdigest().encode() + content
        if aes128:
            content = encrypt(content)
        return response(content, keep)

    return make


def encrypt(content: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    vector = os.urandom(16)
    encryptor = Cipher(algorithms.AES128(b"0123456789ABCDEF"), modes.CBC(vector)).encryptor()
    padding = 16 - len(content) % 16  # PKCS #7, RFC 5652 section 6.3
    return vector + encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, so that the error is not lost below a screen of usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> int:
    parser = Parser(description="An HTTP server for benchmarks.")
    parser.add_argument("--listen", default="127.0.0.1:8000", metavar="ADDRESS")
    parser.add_argument("--keepalive", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--idle", action=argparse.BooleanOptionalAction, default=True, help="mark the wait between two requests"
    )
    parser.add_argument("--size", type=int, default=1024, metavar="BYTES", help="size of the body")
    parser.add_argument("--sleep", type=float, default=0.0, metavar="MS", help="sleep before each response")
    parser.add_argument("--aes128", action="store_true", help="encrypt each response's body with AES-128-CBC")
    parser.add_argument("--sha", action="store_true", help="add the SHA-256 of the body to each response")
    parser.add_argument("--tls", action="store_true", help="with a self-signed certificate, unless one is given")
    parser.add_argument("--tls-cert", metavar="FILE")
    parser.add_argument("--tls-key", metavar="FILE")
    parser.add_argument("--accept-loops", type=int, default=1, metavar="N")
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="idle timeout")
    options = parser.parse_args()
    if options.size < 0:
        parser.error(f"--size must be 0 or more bytes, got {options.size}")
    if not 0 <= options.sleep < float("inf"):
        parser.error(f"--sleep must be 0 or more milliseconds, got {options.sleep}")
    if options.aes128:
        try:
            encrypt(b"")
        except ImportError:
            parser.error("--aes128 needs the cryptography package: pip install cryptography")
    if options.tls_key and not options.tls_cert:
        parser.error("--tls-key needs --tls-cert")
    tls = None
    try:
        if options.tls or options.tls_cert:
            certfile, keyfile = options.tls_cert, options.tls_key
            if certfile is None:
                from gtcpserver.tls import self_signed

                certfile, keyfile = self_signed()
            tls = TLSConfig(certfile, keyfile)
        make = answer_maker(options.size, options.sleep / 1000, options.aes128, options.sha)
        handler = http_handler(make, options.keepalive, options.idle)
        if options.workers is not None:
            # run() logs where it listens, once all workers are ready.
            run(handler, options.listen, workers=options.workers, timeout=options.timeout, tls=tls)
            return 0
        server = Server(options.listen, handler, accept_loops=options.accept_loops, timeout=options.timeout, tls=tls)
        server.start()
    except GtcpServerError as mistake:
        parser.error(str(mistake))
    except OSError as problem:
        print(f"http_server.py: {problem}", file=sys.stderr)
        return 1
    print(f"listening on {server.address}", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
