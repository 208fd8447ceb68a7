"""Clients of the agent check that come faster than they leave."""

import socket
from time import monotonic
from types import SimpleNamespace

import pytest

from gtcpserver.supervisor.agent import MOST_CLIENTS, AgentCheck
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
