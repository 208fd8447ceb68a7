"""Load tests with locust, of gtcpserver's own servers and of yours.

    locust -f loadtests/load/locustfile.py --start-servers --web-host 127.0.0.1  # web interface, http://localhost:8089
    locust -f loadtests/load/locustfile.py --start-servers --headless -u 50 -r 50 -t 15s --fail-ratio 0 --html load.html
    locust -f loadtests/load/locustfile.py --echo-server 10.0.0.7:5000 --headless -u 500 -r 100 -t 5m EchoUser

Each kind of user needs a server that speaks its protocol; users whose server has no address do not take part. LineUser,
below, and docs/load-testing.md show how to write your own user.
"""

from __future__ import annotations

import argparse
import atexit
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, User, events, tag, task
from locust.exception import StopTest
from locust.runners import WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # locust loads this file by its path

from loadtests.load import (
    pass_criteria,  # noqa: F401 (adds options)
    shapes,
)
from loadtests.load.servers import SERVERS, start_all
from loadtests.load.tunnels import connect_request, http_url, socks5_request
from loadtests.local_servers import LocalServers, StartError
from loadtests.tcp_user import Address, TcpUser, insecure_context

# -- options -----------------------------------------------------------------------------------------------------------


def address(text: str) -> str:
    try:
        Address.parse(text)
    except ValueError as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from None
    return text


def http_address(text: str) -> str:
    try:
        http_url(address(text))
    except ValueError as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from None
    return text


def size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"must be 1 to {1 << 20} bytes, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return value


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    for option, what in SERVERS.items():
        flag = "--" + option.replace("_", "-")
        parser.add_argument(
            flag,
            type=http_address if option == "http_server" else address,
            metavar="ADDRESS",
            env_var=f"LOCUST_{option.upper()}",
            help=f"Address of a server such as {what}; users without a server do not take part",
        )
    parser.add_argument(
        "--start-servers",
        action="store_true",
        include_in_web_ui=False,
        help="Start a local server for each address that is not given, and stop it when locust ends",
    )
    parser.add_argument(
        "--target",
        type=address,
        metavar="ADDRESS",
        help="Destination of proxy users, an echo server. Default: --echo-server",
    )
    parser.add_argument("--size", type=size, metavar="BYTES", default=128, help="Message size. Default: 128")
    parser.add_argument(
        "--pace",
        type=positive,
        metavar="RATE",
        default=10.0,
        help="Maximum tasks per second of a user. Default: 10; 100000: as fast as possible",
    )
    parser.add_argument(
        "--storm-every",
        type=positive,
        metavar="SECONDS",
        default=5.0,
        help="Seconds between two storms of StormUser. Default: 5",
    )
    parser.add_argument(
        "--shape",
        choices=["none", *shapes.SHAPES],
        default="none",
        include_in_web_ui=False,
        help="Number of users over the --run-time, up to --users",
    )


@events.init.add_listener
def set_up(environment: Any, web_ui: Any = None, **_: Any) -> None:
    options = environment.parsed_options
    environment.available_shape_classes = {name.capitalize(): shape() for name, shape in shapes.SHAPES.items()}
    for shape in environment.available_shape_classes.values():
        shape.runner = environment.runner
    if options.shape != "none":
        environment.shape_class = environment.available_shape_classes[options.shape.capitalize()]
    if isinstance(environment.runner, WorkerRunner):
        return  # it gets the addresses from its master, when users are spawned
    if options.start_servers:
        servers = LocalServers()
        atexit.register(servers.stop)
        try:
            started = start_all(servers)
        except StartError as problem:
            end(1, str(problem))
        for option, where in started.items():
            if not getattr(options, option):
                setattr(options, option, where)
    named = set(options.user_classes or ())
    taking_part, missing = [], {}
    for user_class in environment.user_classes:
        lacks = user_class.lacks(options, environment.host)
        if not lacks:
            taking_part.append(user_class)
        elif user_class.__name__ in named:
            missing[user_class.__name__] = lacks
    if missing:
        end(2, ", ".join(f"{name} needs {lacks}" for name, lacks in missing.items()))
    if not taking_part:
        flags = ", ".join("--" + option.replace("_", "-") for option in SERVERS)
        end(2, f"no server to load: give --start-servers, or the address of one: {flags}")
    environment.user_classes = taking_part
    if not environment.host:
        for user_class in taking_part:
            # For the web interface, which warns of users without an address.
            user_class.host = user_class.url(getattr(options, user_class.server))
    if environment.host and not named:
        end(
            2,
            "--host is one address, and each kind of user needs another server: name the users, or give "
            "--echo-server and the like",
        )


def end(status: int, message: str) -> None:
    print(f"locustfile.py: {message}", file=sys.stderr)
    sys.exit(status)


# -- users -------------------------------------------------------------------------------------------------------------


class Paced(User):
    """What all users here have in common: a pace, and a server given by the options."""

    abstract = True
    server: str

    def __init__(self, environment: Any) -> None:
        options = environment.parsed_options
        self.host = self.url(environment.host or getattr(options, self.server))
        self._next = 0.0
        super().__init__(environment)

    @classmethod
    def url(cls, host: str) -> str:
        return host

    def wait_time(self) -> float:
        # Like locust's constant_throughput, which cannot be changed by an option; begins at a random time, so that
        # users spawned at the same moment do not act in step forever.
        interval = 1.0 / float(self.environment.parsed_options.pace)
        now = time.monotonic()
        self._next = max(now, self._next + interval) if self._next else now + random.random() * interval
        return self._next - now

    @classmethod
    def lacks(cls, options: Any, host: str | None) -> str:
        """Return the missing option that it needs, "" for none."""
        return "" if host or getattr(options, cls.server) else "--" + cls.server.replace("_", "-")


class PacedTcpUser(Paced, TcpUser):
    abstract = True

    def message(self) -> bytes:
        """Return random bytes, so that an answer to another message is noticed."""
        return random.randbytes(int(self.environment.parsed_options.size))

    def exchange(self, name: str, connect: bool = False) -> None:
        """Send a message, and expect it back."""
        message = self.message()
        with self.client.request(name, connect=connect) as request:
            self.client.send(message)
            if self.client.receive_exactly(len(message)) != message:
                request.failure("the answer is not what was sent")


class EchoUser(PacedTcpUser):
    """One kept connection; a message, and its echo."""

    server = "echo_server"
    weight = 4

    @task
    def echo(self) -> None:
        self.exchange("echo")


class EchoNewConnectionUser(PacedTcpUser):
    """A connection for each message; its time is part of the request's."""

    server = "echo_server"

    @task
    def echo(self) -> None:
        self.exchange("echo, new connection", connect=True)
        self.client.close()


class TlsEchoUser(PacedTcpUser):
    """The same, encrypted. Any certificate is accepted."""

    server = "tls_server"
    tls = insecure_context()

    @task(4)
    @tag("keep-alive")
    def echo(self) -> None:
        self.exchange("TLS echo")

    @task
    @tag("new-connection")
    def new_connection(self) -> None:
        self.exchange("TLS echo, new connection", connect=True)
        self.client.close()


class LineUser(PacedTcpUser):
    """The key-value store of examples/line_protocol.py: an example of a custom protocol."""

    server = "line_server"
    request_type = "LINE"
    weight = 2

    def on_connect(self) -> None:
        self.key = b"%x" % id(self)
        self.value: bytes | None = None

    @task
    def set(self) -> None:
        value = self.message()
        with self.client.request("SET") as request:
            self.client.send(b"SET %b %d\n%b\n" % (self.key, len(value), value))
            answer = self.client.receive_until(b"\n")
            if answer == b"OK\n":
                self.value = value
            else:
                request.failure(f"expected OK, got {answer!r}")

    @task(3)
    def get(self) -> None:
        with self.client.request("GET") as request:
            self.client.send(b"GET %b\n" % self.key)
            answer = self.client.receive_until(b"\n")
            word, _, length = answer.strip().partition(b" ")
            if word == b"VALUE":
                value = self.client.receive_exactly(int(length) + 1)[:-1]
                if self.value is not None and value != self.value:
                    request.failure("got another value than was set")
            elif word != b"NONE" or self.value is not None:
                request.failure(f"expected VALUE, got {answer!r}")


class SlowUser(PacedTcpUser):
    """A client on a bad line: its bytes trickle in, and it reads the response in small pieces."""

    server = "line_server"
    request_type = "LINE"

    #: Bytes, and the seconds between them.
    piece, pause = 16, 0.05

    def prepare_socket(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    @task
    def set_and_get(self) -> None:
        value = random.randbytes(self.piece * 8)
        asked = b"SET %x %d\n%b\nGET %x\n" % (id(self), len(value), value, id(self))
        expected = b"OK\nVALUE %d\n%b\n" % (len(value), value)
        with self.client.request("SET and GET, slowly") as request:
            for begin in range(0, len(asked), self.piece):
                self.client.send(asked[begin : begin + self.piece])
                request.sleep(self.pause)
            answer = b""
            while len(answer) < len(expected):
                answer += self.client.receive(self.piece)
            if answer != expected:
                request.failure("got another value than was set")


class StormUser(PacedTcpUser):
    """All users lose their connections at the same moment, as when a router restarts, and reconnect at once."""

    server = "echo_server"

    @task
    def storm(self) -> None:
        self.exchange("before the storm")
        # By wall clock, so that the users of all locust processes act together.
        every = float(self.environment.parsed_options.storm_every)
        gevent.sleep(every - time.time() % every)
        self.client.reset()
        self.exchange("storm: connect and echo", connect=True)


class HttpUser(Paced, FastHttpUser):
    """HTTP on a kept connection, with locust's own client."""

    server = "http_server"
    weight = 2

    @classmethod
    def url(cls, host: str) -> str:
        try:
            return http_url(host)
        except ValueError as mistake:
            raise StopTest(str(mistake)) from None

    @task
    def get(self) -> None:
        self.client.get("/", name="/ keep-alive")


class HttpNewConnectionUser(HttpUser):
    """HTTP with a connection for each request."""

    weight = 1

    @task
    def get(self) -> None:
        self.client.get("/", name="/ new connection", headers={"Connection": "close"})


class TunnelUser(PacedTcpUser):
    """An echo server through a proxy: a new tunnel, then messages in it."""

    abstract = True
    server = "proxy_server"

    #: Messages per tunnel.
    messages = 5

    @classmethod
    def lacks(cls, options: Any, host: str | None) -> str:
        return super().lacks(options, host) or ("" if options.target or options.echo_server else "--target")

    @property
    def target(self) -> Address:
        options = self.environment.parsed_options
        return Address.parse(options.target or options.echo_server)

    @task
    def tunnel(self) -> None:
        with self.client.request(f"{self.request_type} tunnel", connect=True):
            pass  # on_connect makes it
        for _ in range(self.messages):
            self.exchange(f"echo through {self.request_type}")
        self.client.close()


class Socks5User(TunnelUser):
    """SOCKS 5 without authentication, RFC 1928."""

    request_type = "SOCKS5"

    def on_connect(self) -> None:
        client, target = self.client, self.target
        client.send(b"\x05\x01\x00")
        chosen = client.receive_exactly(2)
        assert chosen == b"\x05\x00", f"the proxy chose the method {chosen.hex()}"
        client.send(socks5_request(target.host, target.port))
        head = client.receive_exactly(4)
        assert head[:2] == b"\x05\x00", f"the proxy refuses with {head[1]}"
        client.receive_exactly({1: 4, 4: 16}[head[3]] + 2)  # where it connects from


class HttpTunnelUser(TunnelUser):
    """CONNECT, RFC 9110 section 9.3.6."""

    request_type = "CONNECT"

    def on_connect(self) -> None:
        self.client.send(connect_request(self.target.host, self.target.port))
        head = self.client.receive_until(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0]
        assert status.split(b" ")[1:2] == [b"200"], f"the proxy refuses with {status.decode()!r}"
