"""Masters and their clients, which are gone at the end of a test."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.patience import SOON
from kit.supervised import Load, Master, Start, masters, masters_of


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*arguments, app=None)`: a master of kit.supervised.APP, or of another program."""
    with masters(tmp_path) as start:
        yield start


@pytest.fixture
def load() -> Iterator[Callable[..., Load]]:
    """`load(port)`: client processes of a master."""
    loads: list[Load] = []

    def begin(*arguments: Any, **options: Any) -> Load:
        loads.append(Load(*arguments, **options))
        return loads[-1]

    yield begin
    for one in loads:
        one.kill()


@pytest.fixture
def destination() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as sock:
        sock.settimeout(SOON)
        yield sock


@pytest.fixture
def forward(tmp_path: Path, destination: socket.socket) -> Iterator[Callable[..., Master]]:
    """`forward(*options)`: a forwarder to the destination."""
    target = f"127.0.0.1:{destination.getsockname()[1]}"
    with masters_of(tmp_path / "forward") as start:
        yield lambda *options: start("forward", "127.0.0.1:0", target, *options)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Callable[..., Master]]:
    """`proxy(*options)`: a proxy to anywhere."""
    with masters_of(tmp_path / "proxy") as start:
        yield lambda *options: start(
            *("proxy", "--mixed", "127.0.0.1:0", "--allow-destination", "loopback", "--allow-destination", "any"),
            *options,
        )
