"""Which workers take the connections of one that leaves."""

from collections import Counter
from types import SimpleNamespace

from gtcpserver.supervisor.pairing import MOST_LINES, Pairing
from gtcpserver.supervisor.slots import WorkerState


class Fleet:
    """Workers that leave, and as many that stay; notes the slots of each pair that is made."""

    stopping = False

    def __init__(self, count):
        self.pairs = []
        new = [self._worker(slot, 1000 + slot, WorkerState.READY) for slot in range(count)]
        old = [self._worker(slot, slot, WorkerState.RETIRING) for slot in range(count)]
        self.workers = {one.pid: one for one in (*old, *new)}
        self._slots = [SimpleNamespace(current=one) for one in new]
        self.system = SimpleNamespace(make_pair=lambda *_: (End(), End()))

    def active(self):
        return self._slots

    def _worker(self, slot, pid, state):
        def send_if_clear(kind, fd, gives, giver=None):
            assert gives or giver in self.workers
            self.pairs.append((slot, gives))
            return True

        channel = SimpleNamespace(send_if_clear=send_if_clear)
        return SimpleNamespace(
            slot=slot, pid=pid, state=state, handover=True, ended=False, paired=set(), channel=channel
        )


class End:
    def fileno(self):
        return 0

    def close(self):
        pass


def test_the_connections_of_many_workers_are_spread_over_all():
    fleet = Fleet(4 * MOST_LINES)
    Pairing(fleet).look()
    takers = Counter(slot for slot, gives in fleet.pairs if not gives)
    givers = Counter(slot for slot, gives in fleet.pairs if gives)
    assert set(givers.values()) == {MOST_LINES}
    assert (len(takers), set(takers.values())) == (4 * MOST_LINES, {MOST_LINES})
