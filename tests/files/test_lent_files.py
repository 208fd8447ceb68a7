"""A descriptor that was lent, or made for a library, is closed whatever comes of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtcpserver.files import lent

NOBODYS = "/a file that only root may read"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may open nothing by its name."""
    real = open

    def refuse(file: object, *arguments: object, **named: object) -> object:
        if isinstance(file, str):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return real(file, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(lent, "open", refuse, raising=False)


@pytest.fixture
def lender() -> Iterator[list[int]]:
    """What it lends is a folder, which cannot be read; collects the descriptors."""
    given: list[int] = []

    def lend(path: str) -> int:
        given.append(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
        return given[-1]

    lent.borrow_from(lend)
    yield given
    lent.borrow_from(None)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_was_lent_and_cannot_be_read_is_closed(refused: None, lender: list[int]) -> None:
    with pytest.raises(IsADirectoryError):
        lent.read_file(NOBODYS)
    assert [is_open(fd) for fd in lender] == [False]


def test_what_was_lent_and_read_is_closed(refused: None, lender: list[int], tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret")

    def lend(path: str) -> int:
        lender.append(os.open(tmp_path / "key", os.O_RDONLY))
        return lender[-1]

    lent.borrow_from(lend)
    assert lent.read_file(NOBODYS) == b"secret"
    assert [is_open(fd) for fd in lender] == [False]


def test_a_file_in_memory_that_cannot_be_opened_is_closed(lender: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = os.memfd_create

    def note(*arguments: object) -> int:
        made.append(make(*arguments))  # type: ignore[arg-type]
        return made[-1]

    def fail(*arguments: object, **named: object) -> object:
        raise MemoryError

    monkeypatch.setattr(os, "memfd_create", note)
    monkeypatch.setattr(lent, "open", fail, raising=False)
    with pytest.raises(MemoryError), lent.openable(NOBODYS, b"secret"):
        pass
    assert [is_open(fd) for fd in made] == [False]


def test_a_file_in_memory_is_there_while_a_library_opens_it(lender: list[int]) -> None:
    with lent.openable(NOBODYS, b"secret") as path:
        assert Path(path).read_bytes() == b"secret"
    assert not os.path.exists(path)
