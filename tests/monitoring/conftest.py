"""A server with a status page, and a browser."""

from __future__ import annotations

import signal

import pytest

from kit.browser import Browser
from kit.status_page import Service


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


@pytest.fixture
def service(tmp_path):
    made = []

    def start(*arguments):
        made.append(Service(tmp_path, *arguments))
        return made[-1]

    yield start
    for one in made:
        one.process.send_signal(signal.SIGCONT)
        one.end()
