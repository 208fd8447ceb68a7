"""Masters and their clients, which are gone at the end of a test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.supervised import Load, Start, masters


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
