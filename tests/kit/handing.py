"""Handovers between servers of one process: what joins them, and a new worker that does as a test says."""

from __future__ import annotations

import socket
import struct
from typing import Any

import gevent
from gevent import socket as gevent_socket

from gtcpserver import Server
from gtcpserver.handover import messages
from gtcpserver.handover.mover import Mover
from kit.patience import SOON


def mover_of(server: Server) -> Mover:
    mover = server.mover
    return mover if isinstance(mover, Mover) else Mover(server)


def join(giver: Server, taker: Server) -> None:
    """Make a line between them, as a master does. Nothing moves before `giver.mover.leave()`."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mover_of(taker).receive_on(here.detach())
    mover_of(giver).send_on(there.detach())


def leave(giver: Server, taker: Server, stop: bool = False) -> Any:
    """Join them and let all connections leave; with `stop` begin the giver's stop, as a worker does that retires."""
    join(giver, taker)
    mover_of(giver).leave()
    return gevent.spawn(giver.stop, SOON, patient=True, leave_listening=True) if stop else None


def close_lines(server: Server) -> None:
    """Close the lines of a server that has halted, as the end of its process does."""
    mover = server.mover
    if isinstance(mover, Mover):
        for _, line, *_ in (*mover._senders, *mover._receivers):  # noqa: SLF001 - for this alone
            line.close()
        for receiver, *_ in mover._receivers:  # noqa: SLF001 - the offers that it holds, whose withdrawal is on its way
            receiver.end()
        mover._senders, mover._receivers = [], []  # noqa: SLF001


class Taker:
    """The other end of a line: a new worker that says what the test wants it to."""

    def __init__(self, giver: Server) -> None:
        mine, theirs = gevent_socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock = mine
        self.fds: list[int] = []
        mover_of(giver).send_on(theirs.detach())

    def hear(self) -> messages.Packet:
        with gevent.Timeout(SOON):
            data, ancillary, _, _ = self.sock.recvmsg(
                messages.MAX_BYTES, socket.CMSG_SPACE(4 * messages.MAX_OFFERS * messages.MAX_DESCRIPTORS)
            )
        for _, _, content in ancillary:
            self.fds += struct.unpack(f"={len(content) // 4}i", content)
        return messages.decode(data)

    def offered(self) -> list[int]:
        return [number for number, _ in self.hear().offer]

    def say(self, **lists: Any) -> None:
        self.sock.send(messages.encode(**lists))

    def die(self) -> None:
        for fd in self.fds:
            socket.close(fd)
        self.fds = []
        self.sock.close()
