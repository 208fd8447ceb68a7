"""The clients: connections that are silent, and some that ask again and again."""

from __future__ import annotations

import resource
import selectors
import socket
import time

#: Seconds for any answer.
PATIENCE = 30.0


class ClientError(Exception):
    """An answer is wrong, or does not come."""


class Client:
    """A connection whose every answer is checked: the number of the request, and the request."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, PATIENCE)
        self.requests = 0
        self.asked_at = 0.0

    def ask(self) -> None:
        self.requests += 1
        self.asked_at = time.monotonic()
        self.sock.sendall(b"request %d\n" % self.requests)

    def check(self) -> float:
        """Read the answer; return the seconds since the request."""
        answer = self.sock.recv(1000)
        if answer != b"%d request %d\n" % (self.requests, self.requests):
            raise ClientError(f"request {self.requests} was answered by {answer!r}")
        return time.monotonic() - self.asked_at


def need_descriptors(count: int) -> None:
    """Raise this process's limit of descriptors.

    Raises:
        ClientError: it cannot have so many more.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 100 > hard:
        raise ClientError(f"{count} connections need {count + 100} descriptors, the limit is {hard}: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connect(address: tuple[str, int], count: int) -> list[Client]:
    """Return connections that have asked once.

    Raises:
        ClientError: more descriptors are needed than the limit allows.
    """
    need_descriptors(count)
    clients = []
    for _ in range(count):
        client = Client(address)
        client.ask()
        clients.append(client)
    for client in clients:
        client.check()
    return clients


def ask_all(clients: list[Client]) -> None:
    """Ask once on each connection, and check the answers: none is lost, and none is another's."""
    for client in clients:
        client.ask()
    for client in clients:
        client.check()


def ask_for(clients: list[Client], seconds: float, pause: float, until: list[bool]) -> list[tuple[float, float]]:
    """Ask on each connection again and again.

    Args:
        seconds: at most for so long.
        pause: seconds between an answer and the next request.
        until: ends it when its first item is True.

    Returns:
        the time of each request, and the seconds until its answer.
    """
    found: list[tuple[float, float]] = []
    due: dict[float, Client] = {}
    give_up = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            selector.register(client.sock, selectors.EVENT_READ, client)
            due[time.monotonic() + pause * number / len(clients)] = client
        waiting = 0
        while waiting or (time.monotonic() < give_up and not until[0]):
            now = time.monotonic()
            stops = now >= give_up or until[0]
            for at in [at for at in due if at <= now or stops]:
                client = due.pop(at)
                if not stops:
                    client.ask()
                    waiting += 1
            for key, _ in selector.select(max(0.0, min(due, default=now + 0.01) - now)):
                client = key.data
                found.append((client.asked_at, client.check()))
                waiting -= 1
                due[time.monotonic() + pause] = client
            if now > give_up + PATIENCE:
                raise ClientError(f"{waiting} requests were not answered")
    return found
