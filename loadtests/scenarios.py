"""The loads: the eight tests of the Go original, and ours."""

from __future__ import annotations

from dataclasses import dataclass

from .servers import OURS, SERVERS

GEVENT, GEVENT_POOL, UVLOOP = "gevent StreamServer", "gevent StreamServer, Pool", "uvloop Protocol"

EVERYBODY = tuple(SERVERS)
#: One connection a handler: a limit of them is no difference.
NOT_POOL = tuple(name for name in SERVERS if "Pool" not in name)


@dataclass(frozen=True)
class Scenario:
    """A load, and with whom we compare ourselves in it.

    Attributes:
        title: with "{clients}" where their number stands.
        test: the number of the Go original's test; "": it has none like this.
        options: for the servers.
        servers: that take part.
        against: those that a ratio is computed with.
        tls: encrypted.
        answers_differ: by more than their bytes (a random vector): their lengths are compared.
    """

    title: str
    test: str = ""
    options: tuple[str, ...] = ()
    servers: tuple[str, ...] = NOT_POOL
    against: tuple[str, ...] = (GEVENT, UVLOOP)
    tls: bool = False
    answers_differ: bool = False

    def named(self, clients: int) -> str:
        return self.title.format(clients=f"{clients:,}")


NEW = ("--no-keepalive",)

SCENARIOS = {
    "keepalive": Scenario("Keep-alive, 1 kB, {clients} connections", "2"),
    "keepalive-timeout": Scenario(
        "Keep-alive, 1 kB, {clients} connections, 30 s idle time-out", options=("--timeout", "30")
    ),
    "new-connection": Scenario(
        "New connections, 1 kB, {clients} clients",
        "1",
        NEW,
        servers=EVERYBODY,
        against=(GEVENT_POOL, UVLOOP),
    ),
    "tls-keepalive": Scenario("TLS 1.3, keep-alive, 1 kB, {clients} connections", "2.1", tls=True),
    "tls-new-connection": Scenario("TLS 1.3, new connections, 1 kB, {clients} clients", "1.1", NEW, tls=True),
    "aes-new-connection": Scenario(
        "AES-128-CBC, new connections, 1 kB, {clients} clients",
        "3",
        (*NEW, "--aes128"),
        answers_differ=True,
    ),
    "aes-keepalive": Scenario(
        "AES-128-CBC, keep-alive, 1 kB, {clients} connections", "4", ("--aes128",), answers_differ=True
    ),
    "sleep": Scenario(
        "1 ms of sleep, keep-alive, 128 bytes, {clients} connections", "5", ("--size", "128", "--sleep", "1")
    ),
    "16k": Scenario("New connections, 16 kB, {clients} clients", "6", (*NEW, "--size", "16384")),
}

#: The original's, in its order.
ORIGINAL = [name for name, scenario in sorted(SCENARIOS.items(), key=lambda item: item[1].test) if scenario.test]

#: Those without wrk: memory of idle connections, the first byte beside them, a crowd at the start.
OTHERS = ("idle", "first-byte", "crowd")
OTHER_SERVERS = (OURS, "gtcpserver, idle()", "gtcpserver StreamServer", GEVENT, GEVENT_POOL, UVLOOP)
