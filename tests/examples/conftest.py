"""Examples that run, and clients of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kit.examples import EXAMPLES, WITH_CONSTANTS, Client, Example, Start


@pytest.fixture
def start() -> Iterator[Start]:
    """``start("echo.py")`` runs it on a free port; keywords replace constants of it. It is stopped after the test."""
    examples: list[Example] = []

    def run(name: str, address: str = "127.0.0.1:0", env: dict[str, str] | None = None, **constants: object) -> Example:
        command = [sys.executable, str(EXAMPLES / name), address]
        if constants:
            given = [f"{constant}={value!r}" for constant, value in constants.items()]
            command = [sys.executable, "-c", WITH_CONSTANTS, str(EXAMPLES / name), *given, "--", address]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        example = Example(process, None)
        examples.append(example)
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"listening on (?:127\.0\.0\.1:(\d+)|unix:(.+)) \(pid ", said)
        assert found is not None, said + process.stderr.read()
        example.address = ("127.0.0.1", int(found[1])) if found[1] else found[2]
        return example

    yield run
    try:
        for example in examples:
            if example.process.returncode is None:
                example.stop()
    finally:
        for example in examples:
            example.process.kill()
            example.process.communicate()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """``connect(example)`` gives a Client, which is closed after the test."""
    clients: list[Client] = []

    def to(example: Example, **options: Any) -> Client:
        clients.append(Client(example.address, **options))
        return clients[-1]

    yield to
    for client in clients:
        client.close()
