"""What a worker that was taken over can do to another one by their line: nothing that lasts."""

from gtcpserver.handover import messages
from gtcpserver.handover.messages import Packet
from gtcpserver.handover.receiver import Receiver
from gtcpserver.handover.sender import Sender


class Leaving:
    def __init__(self):
        self.state = {}
        self.ends = []

    def fileno(self):
        return 0

    def give_away(self):
        self.ends.append("given")
        return True

    def tell(self):
        self.ends.append("told")

    def stays(self, why):
        self.ends.append(why)


class Coming:
    def __init__(self, ends):
        self.ends = ends

    def begin(self):
        self.ends.append("begun")

    def drop(self):
        self.ends.append("dropped")


def test_an_answer_to_what_was_not_sent_yet_is_ignored():
    sent = []
    has_room = False

    def send(data, fds):
        if has_room:
            sent.append(messages.decode(data))
        return has_room

    sender = Sender(send, lambda: 0.0)
    ready, refused, other = Leaving(), Leaving(), Leaving()
    assert sender.offer([ready, refused, other]) == [0, 1, 2]
    sender.hear(Packet(1, ready=[0], refused=[(1, "full")]))
    assert [ready.ends, refused.ends] == [[], []]
    has_room = True
    assert sender.flush()
    assert [number for number, _ in sent[0].offer] == [0, 1, 2]
    sender.hear(Packet(1, ready=[0], refused=[(1, "busy")]))
    assert (ready.ends, refused.ends, other.ends) == (["given", "told"], ["busy"], [])


def test_a_number_offered_twice_is_refused_the_second_time():
    sent, closed, ends = [], [], []

    def send(data, fds):
        sent.append(messages.decode(data))
        return True

    receiver = Receiver(send, lambda *_: Coming(ends), closed.append)
    receiver.hear(Packet(1, offer=[(7, {})]), [10])
    receiver.hear(Packet(1, offer=[(7, {})]), [11])
    assert closed == [11]
    assert sent[-1].refused == [(7, "state")]
    receiver.end()
    assert ends == ["dropped"]
