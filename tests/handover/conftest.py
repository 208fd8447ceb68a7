"""Fixtures of tests that move tunnels."""

import pytest

from gtcpserver.handover.sender import PAUSING
from gtcpserver.transfer import PIPES
from kit.waiting import wait_until


@pytest.fixture
def no_pipe_is_left():
    taken = PIPES.taken
    yield
    wait_until(lambda: PIPES.taken == taken)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.1)
    monkeypatch.setitem(PAUSING, "full", 0.1)
