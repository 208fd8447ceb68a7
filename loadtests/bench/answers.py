"""Whether servers give the same answer, before they are compared in anything else."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .go_peers import PROGRAMS
from .measure import BenchError, Listening
from .servers import serving

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

#: An answer of a server that is compared, bytes; the scenarios' longest has 16 kB.
LONGEST_ANSWER = 1 << 20

#: Seconds for an answer, and for the end behind it.
PATIENCE = 5.0

#: Of the tests with AES-128-CBC: the Go original's key.
KEY = b"0123456789ABCDEF"


#: Go takes this one of TLS 1.3's wherever the processor has AES, whatever is configured (crypto/tls,
#: Config.CipherSuites); the others agree on AES-256-GCM. docs/performance.md says so.
GO_CIPHER = ("TLS_AES_128_GCM_SHA256", "TLSv1.3", 128)


@dataclass(frozen=True)
class Answer:
    """What all servers must have in common. Other header fields may differ (the Go original sends its name and a date).

    Attributes:
        status: of HTTP, as 200.
        body: decrypted, where it was encrypted.
        kept: the connection stayed open behind it.
        tls: version and cipher that were agreed on.
    """

    status: int
    body: bytes
    kept: bool
    tls: tuple[str, str, int] | None = None

    def __str__(self) -> str:
        body = f"{len(self.body)} bytes, {self.body[:40]!r}"
        agreed = f", {self.tls}" if self.tls else ""
        return f"{self.status}, {body}, {'keep-alive' if self.kept else 'closed'}{agreed}"


def check_answers(names: Sequence[str], options: Sequence[str], tls: bool = False) -> None:
    """Whoever answers less, closes, or encrypts more weakly, is not comparable.

    Args:
        options: of the scenario, for the servers.

    Raises:
        BenchError: the servers do not all answer the same, or one of them not at all.
    """
    answers: dict[str, Answer] = {}
    for name in names:
        try:
            with serving(name, options) as server:
                answer = answer_of(server, tls, "--aes128" in options)
                if name in PROGRAMS and answer.tls == GO_CIPHER and answers:
                    answer = replace(answer, tls=next(iter(answers.values())).tls)
                answers[name] = answer
        except (BenchError, OSError) as problem:
            raise BenchError(f"{name} does not answer as it must: {problem}") from None
    if len(set(answers.values())) > 1:
        listed = "".join(f"\n{name}: {answer}" for name, answer in answers.items())
        raise BenchError(f"the servers do not answer the same:{listed}")


def answer_of(server: Listening, tls: bool = False, aes128: bool = False) -> Answer:
    """Ask once, and see whether the connection is kept.

    Raises:
        BenchError: it is no answer, has no Content-Length, or does not end.
    """
    sock = socket.create_connection((server.host, server.port), timeout=PATIENCE)
    agreed = None
    with sock:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            sock = context.wrap_socket(sock)
            agreed = sock.cipher()
        with sock:
            head, body = _exchange(sock)
            # A second request tells more than the header: an answer comes, or the end.
            try:
                kept = bool(_exchange(sock))
            except (_Ended, ConnectionError, ssl.SSLError):
                kept = False
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    if found is None:
        raise BenchError(f"this is no answer in HTTP/1.1: {head[:100]!r}")
    return Answer(int(found[1]), decrypt(body) if aes128 else body, kept, agreed)


class _Ended(BenchError):
    pass


def _exchange(sock: socket.socket) -> tuple[bytes, bytes]:
    sock.sendall(REQUEST)
    answer = b""
    give_up = time.monotonic() + PATIENCE
    while True:
        if len(answer) > LONGEST_ANSWER or time.monotonic() > give_up:
            raise BenchError(f"the answer does not end, it begins {answer[:100]!r}")
        head, found, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^Content-Length:\s*(\d+)", head)
        if found and length and len(body) >= int(length[1]):
            if len(body) > int(length[1]):
                raise BenchError(f"{len(body)} bytes followed a head that says {int(length[1])}: {head!r}")
            return head, body
        more = sock.recv(65536)
        if not more:
            raise _Ended(f"the server closed after {answer[:100]!r}")
        answer += more


def decrypt(content: bytes) -> bytes:
    """A vector of 16 bytes, then AES-128 in CBC mode with PKCS #7 padding (RFC 5652 section 6.3).

    Raises:
        BenchError: it is not encrypted with KEY.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    try:
        decryptor = Cipher(algorithms.AES128(KEY), modes.CBC(content[:16])).decryptor()
        padded = decryptor.update(content[16:]) + decryptor.finalize()
    except ValueError as problem:
        raise BenchError(f"the answer is not encrypted with AES-128-CBC: {problem}") from None
    padding = padded[-1] if padded else 0
    if not 1 <= padding <= 16 or padded[-padding:] != bytes([padding]) * padding:
        raise BenchError(f"the answer is not encrypted with the key {KEY!r}: no padding at the end of {padded[:40]!r}")
    return padded[:-padding]
