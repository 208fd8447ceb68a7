"""The loads: the eight tests of the Go original, and ours; and which of them are published."""

from __future__ import annotations

from dataclasses import dataclass

from .results import OURS
from .servers import PURE, SERVERS

GEVENT, GEVENT_POOL, UVLOOP = "gevent StreamServer", "gevent StreamServer, Pool", "uvloop Protocol"

EVERYBODY = tuple(SERVERS)


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
    """

    title: str
    test: str = ""
    options: tuple[str, ...] = ()
    servers: tuple[str, ...] = EVERYBODY
    against: tuple[str, ...] = (GEVENT, UVLOOP)
    tls: bool = False

    def named(self, clients: int) -> str:
        test = f" (test {self.test} of the Go original)" if self.test else ""
        return self.title.format(clients=f"{clients:,}") + test


NEW = ("--no-keepalive",)

SCENARIOS = {
    "keepalive": Scenario("Keep-alive, 1 kB, {clients} connections", "2"),
    "keepalive-timeout": Scenario(
        "Keep-alive, 1 kB, {clients} connections, 30 s idle timeout", options=("--timeout", "30")
    ),
    "new-connection": Scenario(
        "New connections, 1 kB, {clients} clients",
        "1",
        NEW,
        against=(GEVENT_POOL, UVLOOP),
    ),
    "tls-keepalive": Scenario("TLS 1.3, keep-alive, 1 kB, {clients} connections", "2.1", tls=True),
    "tls-new-connection": Scenario("TLS 1.3, new connections, 1 kB, {clients} clients", "1.1", NEW, tls=True),
    "aes-new-connection": Scenario(
        "AES-128-CBC, new connections, 1 kB, {clients} clients",
        "3",
        (*NEW, "--aes128"),
    ),
    "aes-keepalive": Scenario("AES-128-CBC, keep-alive, 1 kB, {clients} connections", "4", ("--aes128",)),
    "sleep": Scenario(
        "1 ms of sleep, keep-alive, 128 bytes, {clients} connections", "5", ("--size", "128", "--sleep", "1")
    ),
    "16k": Scenario("New connections, 16 kB, {clients} clients", "6", (*NEW, "--size", "16384")),
}

#: The original's, in its order.
ORIGINAL = [name for name, scenario in sorted(SCENARIOS.items(), key=lambda item: item[1].test) if scenario.test]

#: Without wrk: memory of idle connections, the first byte beside them, a crowd at the start.
OTHERS = ("idle", "first-byte", "crowd")
OTHER_SERVERS = (OURS, PURE, "gtcpserver, idle()", "gtcpserver StreamServer", GEVENT, GEVENT_POOL, UVLOOP)

MAIN = (OURS, PURE, GEVENT, GEVENT_POOL, UVLOOP, "Go net")

#: Clients -> what `bench --publish` measures with so many, and whom: (scenario, servers). It must be done in 25
#: minutes: all of the original's tests with its number of clients, but those with TLS, where the handshakes alone
#: would take most of a run; with fewer clients all again, and the main peers.
PUBLISHED: dict[int, list[tuple[str, tuple[str, ...]]]] = {
    100: [
        *((name, EVERYBODY) for name in ORIGINAL if SCENARIOS[name].tls),
        *((name, MAIN) for name in SCENARIOS if not SCENARIOS[name].tls),
    ],
    1000: [(name, EVERYBODY) for name in ORIGINAL if not SCENARIOS[name].tls],
}
