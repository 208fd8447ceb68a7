"""The memory that a master shares with its workers: columns of processes, and the next master."""

import os
import signal

import pytest

from gtcpserver import GtcpServerError
from gtcpserver.shared import memory as module
from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import LEAST_COLUMNS, MAGIC, SharedMemory, make_memory


@pytest.fixture
def memory():
    made = SharedMemory.make(1)
    yield made
    made.close()


class Process:
    """A child that claims a column and says which, and ends when it is told to."""

    def __init__(self, memory):
        ours, theirs = os.pipe()
        stop, self._stop = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self._stop)
                column = memory.claim()
                if column is not None:
                    Column(memory, column).set_number("connections", 5)
                    Column(memory, column).add("accepted", 5)
                os.write(theirs, str(column).encode())
                os.read(stop, 1)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(stop)
        said = os.read(ours, 100)
        os.close(ours)
        self.column = None if said == b"None" else int(said)

    def end(self, number=0):
        if number:
            os.kill(self.pid, number)
        else:
            os.write(self._stop, b"x")  # not by its end: later children have it too
        os.close(self._stop)
        os.waitpid(self.pid, 0)


def test_each_process_has_a_column_of_its_own_until_it_ends(memory):
    mine = memory.claim()
    reader = Column(memory, mine)
    processes = [Process(memory) for _ in range(3)]
    assert [mine, *(one.column for one in processes)] == [0, 1, 2, 3]
    assert reader.number_elsewhere("connections") == 15
    assert memory.clear_dead() == 1  # its own: a process does not see its own lock
    processes[1].end(signal.SIGKILL)
    processes[0].end()
    assert reader.number_elsewhere("connections") == 15
    assert memory.clear_dead() == 2
    assert reader.number_elsewhere("connections") == 5
    assert reader.number("accepted") == 15  # what has happened stays
    assert memory.clear_dead() == 0
    again = Process(memory)
    assert again.column in (0, 1)  # 0: this process has given it back
    for one in (processes[2], again):
        one.end()
    assert memory.clear_dead() == 2


def test_a_column_that_nobody_cleared_is_empty_for_its_next_process(memory):
    reader = Column(memory, 1)
    for _ in range(3):
        one = Process(memory)
        assert one.column == 0
        assert reader.number_elsewhere("connections") == 5
        one.end(signal.SIGKILL)


def test_more_processes_than_columns(memory):
    processes = [Process(memory) for _ in range(LEAST_COLUMNS + 1)]
    try:
        assert [one.column for one in processes] == [*range(LEAST_COLUMNS), None]
    finally:
        for one in processes:
            one.end()


def test_the_next_master_takes_it_over(memory):
    assert memory.claim() == 0
    Column(memory, 0).set_number("connections", 7)
    next_one = make_memory(100, os.dup(memory.fd))
    try:
        assert (next_one.columns, next_one.sets) == (memory.columns, memory.sets)
        assert Column(next_one, 1).number("connections") == 7
        key = b"the same client"
        assert Column(next_one, 1).find(key) == Column(memory, 1).find(key)
        assert not os.get_inheritable(next_one.fd)
    finally:
        next_one.close()


@pytest.mark.parametrize(("word", "value"), [(0, MAGIC + 1), (1, 0), (1, 32), (1, -16), (1, 2**40), (2, 2**62), (2, 3)])
def test_a_memory_of_another_version_or_damaged_is_not_taken_over(memory, caplog, word, value):
    memory.words[word] = value
    fd = os.dup(memory.fd)
    with pytest.raises(GtcpServerError, match="another layout"):
        SharedMemory.adopt(fd)
    fresh = make_memory(1, fd)
    try:
        assert fresh.words[0] == MAGIC
        assert "begin to count anew" in caplog.text
        if fresh.fd != fd:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    finally:
        fresh.close()


def test_nothing_that_is_no_memory_is_taken_over(memory, tmp_path):
    (tmp_path / "empty").touch()
    fd = os.open(tmp_path / "empty", os.O_RDWR)
    with pytest.raises((OSError, ValueError)):
        SharedMemory.adopt(fd)
    make_memory(1, fd).close()


def test_no_process_can_take_the_memory_from_the_others(memory):
    """A mapping whose file is cut short kills those who read it (SIGBUS, mmap(2))."""
    for size in (0, 10**9):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_nothing_stays_open_when_it_cannot_be_made(monkeypatch):
    before = os.listdir("/proc/self/fd")

    def fails(*_arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module.mmap, "mmap", fails)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        SharedMemory.make(1)
    assert os.listdir("/proc/self/fd") == before


def test_a_time_in_the_future_does_not_keep_secrets(memory):
    old = memory.ticket_secrets()[0]
    memory.words[memory.tickets_at // 8 + 1] = 2**62
    assert memory.rotate_tickets(3600.0)
    assert memory.ticket_secrets()[1] == old
    assert not memory.rotate_tickets(3600.0)
    memory.words[memory.tickets_at // 8 + 1] = 2**62
    assert memory.rotate_tickets()
