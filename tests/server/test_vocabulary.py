"""One word for each end of a connection, and one table of the states of a server."""

import dataclasses
import re
import socket
from typing import get_args

import pytest

from gtcpserver import Server, ServerStats
from gtcpserver.server.outcome import COUNTER, Result
from gtcpserver.server.state import STATE_CHANGES, ServerState, State
from kit.paths import ROOT


def test_each_way_to_end_is_in_the_table_of_the_access_log():
    page = (ROOT / "docs" / "logging.md").read_text()
    table = page[page.index("| result |") :].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", " ".join(first))) == set(get_args(Result))


def test_counters_of_ends_are_counters_of_a_server():
    assert COUNTER.keys() <= set(get_args(Result))
    assert set(COUNTER.values()) <= {field.name for field in dataclasses.fields(ServerStats)}


def test_a_server_goes_through_its_states_one_way():
    order = list(State)
    assert all(order.index(after) > order.index(before) for before, after in STATE_CHANGES)
    state = ServerState()
    with pytest.raises(AssertionError):
        state.become(State.STOPPING)
    state.become(State.SERVING)
    with pytest.raises(AssertionError):
        state.become(State.NEW)


def test_a_server_that_could_not_start_can_be_started_later():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(taken.getsockname(), id)
        with pytest.raises(OSError, match="in use"):
            server.start()
        assert server.state is State.NEW
    server.start()
    server.halt()
