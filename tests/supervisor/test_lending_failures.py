"""Where something fails between the opening of a lent file and its use, its descriptor does not stay open."""

import errno
import os

import gevent
import pytest

from gtcpserver.supervisor import lending
from gtcpserver.supervisor.messages import Message


class SilentMaster:
    """A channel on which nothing is answered."""

    def send(self, kind, **fields):
        pass


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key"
    path.write_text("secret")
    return str(path)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_an_answer_that_comes_in_the_turn_in_which_the_wait_has_ended_is_closed(file):
    borrower = lending.Borrower(SilentMaster())
    borrower._names = {file}  # noqa: SLF001  in the midst of it
    waiting = gevent.spawn(borrower, file)
    gevent.sleep(0)
    before = descriptors()
    waiting.kill(block=False)
    number = borrower._number  # noqa: SLF001  that of the question under way
    borrower.hear(Message("lent", {"number": number}), os.open(file, os.O_RDONLY))
    waiting.join(5)
    assert waiting.dead
    assert descriptors() == before


def test_a_master_keeps_no_descriptor_of_a_file_that_it_cannot_look_at(file, monkeypatch):
    loans = lending.Loans(read={file})
    before = descriptors()

    class NoStat:
        def __getattr__(self, name):
            return getattr(os, name)

        def fstat(self, fd):
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(lending, "os", NoStat())
    with pytest.raises(OSError, match="no"):
        loans._open(file)  # noqa: SLF001  in the midst of it
    assert descriptors() == before
