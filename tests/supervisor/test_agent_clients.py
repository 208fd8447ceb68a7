"""Clients of the agent check that come faster than they leave."""

import socket
from time import monotonic
from types import SimpleNamespace

import pytest

from gtcpserver.supervisor.agent import MOST_CLIENTS, MOST_READS, AgentCheck
from gtcpserver.supervisor.sockets import ListeningSockets
from kit.patience import SOON


@pytest.fixture
def agent():
    system = SimpleNamespace(listening_sockets=ListeningSockets, monotonic=monotonic)
    made = AgentCheck(SimpleNamespace(system=system, owns_metrics=True, stopping=False, in_maintenance=True), 0, [])
    yield made
    made.close(keep_paths=False)


def turn(agent):
    """A turn of the master, in which everything has events."""
    for _, handle in list(agent.watched(monotonic())):
        handle(0)


def test_a_client_that_made_room_in_the_same_turn_fails_nothing(agent):
    port = agent.handover()[0].address.rpartition(":")[2]
    clients = []
    for _ in range(2 * MOST_CLIENTS):
        client = socket.create_connection(("127.0.0.1", int(port)), SOON)
        clients.append(client)
        turn(agent)
        assert client.recv(100) == b"maint\n"
    for client in clients:
        client.close()


def test_a_client_that_goes_on_sending_is_closed_after_a_few_reads(agent):
    port = agent.handover()[0].address.rpartition(":")[2]
    with socket.create_connection(("127.0.0.1", int(port)), SOON) as client:
        turn(agent)
        assert client.recv(100) == b"maint\n"
        reads = 0
        for _ in range(10 * MOST_READS):
            try:
                client.send(b"x")
            except OSError:
                break
            before = len(list(agent.watched(monotonic())))
            turn(agent)
            reads += before > 1
        assert reads == MOST_READS
        assert len(list(agent.watched(monotonic()))) == 1
