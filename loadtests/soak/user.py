"""The user of a soak test: what must work, and faults of clients, of which the server must only recover."""

from __future__ import annotations

# locust replaces parts of the standard library when it is imported: before anything else.
from locust import task  # isort: skip

import random
import time

import gevent

from ..tcp_user import TcpUser

#: Old workers may cut slow requests for so long after a reload: the server's --stop-timeout, and a little.
STOP_TIMEOUT = 10.0
AFTERMATH = STOP_TIMEOUT + 5.0

LARGE = 200_000


class Reloads:
    """The reloads of a run, which explain some failures.

    Attributes:
        tolerated: failures that were explained.
    """

    def __init__(self) -> None:
        self.tolerated = 0
        self._last = float("-inf")

    def begin(self) -> None:
        self._last = time.monotonic() + STOP_TIMEOUT  # until it is done it may begin any time

    def done(self) -> None:
        self._last = time.monotonic()

    def under_way(self) -> bool:
        """Whether a worker may be on its way out."""
        return time.monotonic() - self._last < AFTERMATH


class SoakUser(TcpUser):
    """Does the next of these at random, and checks the answers."""

    request_type = "SOAK"
    timeout = 20.0
    #: Set by the run.
    reloads: Reloads

    def wait_time(self) -> float:
        return random.uniform(0.0, 0.05)

    def on_start(self) -> None:
        self.key = b"key-%x" % id(self)

    def exchange(self, name: str, size: int, *, connect: bool = False) -> None:
        """SET and GET in one go, so that with several workers one store answers both."""
        asked, expected = self.set_and_get(size)
        reused = self.client.socket is not None and not connect
        with self.client.request(name, connect=connect) as request:
            try:
                self.client.send(asked)
                answer = self.client.receive_exactly(len(expected))
            except ConnectionError:
                # A worker that leaves closes idle connections. One that was closed as we sent has taken nothing in, as
                # HTTP clients assume, too (RFC 9112 section 9.3.1). A new connection must never fail.
                if not (reused and self.reloads.under_way() and not request.received):
                    raise
                self.reloads.tolerated += 1
                self.client.close()
                self.client.send(asked)
                answer = self.client.receive_exactly(len(expected))
            if answer != expected:
                raise AssertionError("the answer is not what was stored")

    def set_and_get(self, size: int) -> tuple[bytes, bytes]:
        value = random.randbytes(size)
        return (
            b"SET %b %d\n%b\nGET %b\n" % (self.key, size, value, self.key),
            b"OK\nVALUE %d\n%b\n" % (size, value),
        )

    # -- what must work ----------------------------------------------------------------------------------------------

    @task(40)
    def small(self) -> None:
        self.exchange("small", random.randrange(1, 200))

    @task(10)
    def new_connection(self) -> None:
        self.exchange("new connection", 100, connect=True)
        self.client.close()

    @task(3)
    def large(self) -> None:
        self.exchange("large", LARGE)

    @task(3)
    def half_close(self) -> None:
        asked, expected = self.set_and_get(1000)
        with self.client.request("half-closed", connect=True):
            self.client.send(asked)
            self.client.half_close()
            answer = self.client.receive_to_end()
            if answer != expected:
                what = "the whole answer" if expected.startswith(answer) else "what was stored"
                raise AssertionError(f"a client that half-closes does not get {what}")

    @task(2)
    def slow(self) -> None:
        """Bytes drip in, and the answer is read in pieces. A reload may cut this short: half a request is none."""
        asked, expected = self.set_and_get(200)
        self.client.close()
        with self.client.request("slow", connect=True) as request:
            answer = b""
            try:
                for begin in range(0, len(asked), 32):
                    self.client.send(asked[begin : begin + 32])
                    request.sleep(0.03)
                while len(answer) < len(expected):
                    answer += self.client.receive(32)
                    request.sleep(0.01)
            except ConnectionError:
                if not self.reloads.under_way():
                    raise
                self.reloads.tolerated += 1
                self.client.close()
                return
            if answer != expected:
                raise AssertionError("a slow client does not get what was stored")

    @task(2)
    def nonsense(self) -> None:
        with self.client.request("nonsense", connect=True):
            self.client.send(random.choice([b"PUT x 1\n", b"SET x -1\n", b"\x00" * 50 + b"\n", b"GET " + b"x" * 300]))
            answer = self.client.receive_to_end()
            if not answer and self.reloads.under_way():
                self.reloads.tolerated += 1  # some of it is half a line, and that is no request
            elif not answer.startswith(b"ERROR "):
                raise AssertionError("nonsense is not answered by ERROR")

    # -- faults of clients, of which the server must only recover ------------------------------------------------------

    @task(3)
    def reset_at_once(self) -> None:
        self.client.close()
        self.client.connect()
        self.client.reset()

    @task(3)
    def reset_in_request(self) -> None:
        asked, _ = self.set_and_get(1000)
        self._send_unreported(asked[: random.randrange(1, len(asked))])
        self.client.reset()

    @task(3)
    def unread(self) -> None:
        """Asks for much, does not read it, and leaves: with a reset, or in order."""
        asked, _ = self.set_and_get(LARGE)
        self._send_unreported(asked + asked[asked.rindex(b"GET ") :] * 20)
        gevent.sleep(random.uniform(0.0, 0.5))
        random.choice([self.client.reset, self.client.close])()

    @task(2)
    def silent(self) -> None:
        self.client.close()
        self.client.connect()
        gevent.sleep(random.uniform(0.0, 1.0))
        self.client.close()

    def _send_unreported(self, data: bytes) -> None:
        """On a new connection; the server may close before it has all."""
        self.client.close()
        self.client.connect()
        self.client.socket.settimeout(self.timeout)
        try:
            self.client.socket.sendall(data)
        except OSError:
            pass
