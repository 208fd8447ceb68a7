"""The listening sockets of a master: one per slot and TCP address, kept while workers come and go."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gevent import monkey

from gtcpserver.address import Address, check_none_twice
from gtcpserver.listening.config import has_reuse_port
from gtcpserver.listening.draining import forget_member, queue_length
from gtcpserver.listening.listener import ListenConfig, Listener, open_listeners
from gtcpserver.process.descriptors import close_descriptor

from .steering import spread

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")


class Use(Enum):
    """Which processes accept from a socket."""

    SLOT = "slot"  # the workers of one slot
    SHARED = "shared"  # all workers of this master
    EXTERNAL = "external"  # other programs too


@dataclass
class Member:
    """One socket of a group, which belongs to a slot."""

    slot: int
    listener: Listener

    @property
    def socket(self) -> socket.socket:
        return self.listener.socket


@dataclass
class Group:
    """A TCP address, as a SO_REUSEPORT group.

    Attributes:
        asked: the address asked for, by which the next master finds its sockets.
        members: the members in the order in which the kernel counts them.
    """

    asked: str
    members: list[Member]
    #: What the kernel was last told.
    steered: tuple[tuple[int, ...], tuple[tuple[int, int], ...]] = ((), ())


@dataclass
class Shared:
    """A single socket that all workers accept from.

    Attributes:
        asked: the address asked for.
        listener: the socket.
        external: whether it has other owners too (systemd, which passed us "fd:3"): never muted, and its queue is left
            to the process that serves it next.
    """

    asked: str
    listener: Listener
    external: bool


@dataclass(frozen=True)
class Inherited:
    """A socket as the last master described it."""

    asked: str
    fd: int
    slot: int | None
    external: bool
    address: str
    identity: tuple[int, int] | None


@dataclass
class ListeningSockets:
    """All listening sockets of a master.

    A TCP address has a group with one member per slot. Unix sockets, sockets passed to us, and TCP addresses for which
    the ListenConfig or the system rules out SO_REUSEPORT, have a single socket that all slots share.
    """

    config: ListenConfig
    groups: list[Group] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

    # -- open and inherit --------------------------------------------------------------------------------------------

    def open(self, addresses: Sequence[Any], slots: Sequence[int], inherited: Sequence[Inherited] = ()) -> None:
        """Open the addresses, and take over the sockets that the last master left us.

        Raises:
            ConfigError, OSError: as for `open_listeners`, or an address is given twice; nothing stays open.
        """
        check_none_twice(addresses)
        try:
            for address in addresses:
                asked = describe(address)
                ours = [one for one in inherited if one.asked == asked]
                if ours:
                    self._take_over(asked, ours)
                else:
                    self._open(address, asked, slots)
            for one in inherited:
                if not any(one.asked == describe(address) for address in addresses):
                    close_descriptor(one.fd)
        except BaseException:
            self.close(keep_paths=bool(inherited))
            raise

    def _open(self, address: Any, asked: str, slots: Sequence[int]) -> None:
        is_tcp = isinstance(address, Address) and address.kind == "tcp"
        if is_tcp and self.config.reuse_port and not has_reuse_port() and len(slots) > 1:
            log.warning("this system has no SO_REUSEPORT: all workers accept from one socket for %s", asked)
        if not is_tcp or not self.config.reuse_port or not has_reuse_port():
            for listener in open_listeners(address, self.config):
                self.shared.append(Shared(asked, listener, external=not listener.owned))
            return
        listeners = open_listeners(address, self.config, len(slots))
        for first in range(0, len(listeners), len(slots)):
            members = listeners[first : first + len(slots)]
            self.groups.append(Group(asked, [Member(slot, one) for slot, one in zip(slots, members, strict=True)]))

    def _take_over(self, asked: str, inherited: Sequence[Inherited]) -> None:
        groups: dict[Any, Group] = {}
        for one in inherited:
            os.set_inheritable(one.fd, False)
            sock = _socket_class(fileno=one.fd)
            sock.setblocking(False)
            listener = Listener(sock, address=one.address, owned=not one.external, path_identity=one.identity)
            if one.slot is None:
                self.shared.append(Shared(asked, listener, one.external))
            else:
                # A host name has a group for each of its addresses.
                name = sock.getsockname()
                if name not in groups:
                    groups[name] = Group(asked, [])
                    self.groups.append(groups[name])
                groups[name].members.append(Member(one.slot, listener))

    # -- for a worker, and for the next master ---------------------------------------------------------------------

    def of_slot(self, slot: int) -> list[tuple[socket.socket, Use]]:
        """Return the sockets that a worker of this slot serves, each with its use."""
        found = [(member.socket, Use.SLOT) for group in self.groups for member in group.members if member.slot == slot]
        for one in self.shared:
            found.append((one.listener.socket, Use.EXTERNAL if one.external else Use.SHARED))
        return found

    def handover(self) -> list[Inherited]:
        """Return descriptions of all sockets for the next master."""
        members = [
            Inherited(group.asked, member.socket.fileno(), member.slot, False, member.listener.address, None)
            for group in self.groups
            for member in group.members
        ]
        return members + [
            Inherited(
                one.asked,
                one.listener.fileno(),
                None,
                one.external,
                one.listener.address,
                one.listener.path_identity,
            )
            for one in self.shared
            if not one.listener.closed
        ]

    def close_all_but(self, slot: int) -> None:
        """Close the members of other slots. Called in a worker.

        A socket that is open in a process that does not accept from it would be a queue that nobody serves.
        """
        for group in self.groups:
            for member in group.members:
                if member.slot != slot:
                    member.socket.close()

    def close_copies(self) -> None:
        """Close all of them. Called in a process that serves none, and must not keep a queue open."""
        self.close_all_but(-1)
        for one in self.shared:
            one.listener.socket.close()

    @property
    def addresses(self) -> list[str]:
        """The addresses, with real ports."""
        found = [member.listener.address for group in self.groups for member in group.members[:1]]
        return list(dict.fromkeys(found + [one.listener.address for one in self.shared]))

    # -- slots that come and go --------------------------------------------------------------------------------------

    def add_slot(self, slot: int) -> None:
        """Open one more member of each group.

        Raises:
            OSError: a socket cannot be opened; no member of the slot stays open.
        """
        if not self.groups:
            return
        joining = dataclasses.replace(self.config, shared=True)
        try:
            for group in self.groups:
                (listener,) = open_listeners(group.members[0].listener.address, joining)
                group.members.append(Member(slot, listener))
                group.steered = ((), ())
        except BaseException:
            self.remove_slot(slot)
            raise

    def remove_slot(self, slot: int) -> int:
        """Close the sockets of a slot whose workers have drained them and are gone.

        Returns:
            the number of connections that were still queued, and are reset.
        """
        lost = 0
        for group in self.groups:
            position = next((i for i, member in enumerate(group.members) if member.slot == slot), None)
            if position is None:
                continue
            last = len(group.members) - 1
            # The kernel moves the last member into the free position. The BPF program must be right before and after
            # that: let it name no member that moves.
            stay = [i for i in group.steered[0] if i not in (position, last)]
            if stay:
                spread(group.members, stay, None)
            member = group.members[position]
            lost += queue_length(member.socket)
            member.listener.close()
            forget_member(group.members, position)
            group.steered = ((), ())
        return lost

    def steer(self, slots: Collection[int], cpus: Mapping[int, int]) -> None:
        """Send new TCP connections to these slots.

        Args:
            slots: slots that get connections; if none of them is open, all do.
            cpus: slot for each receiving CPU; empty: by hash.
        """
        for group in self.groups:
            positions = {member.slot: index for index, member in enumerate(group.members)}
            stay = tuple(index for slot, index in positions.items() if slot in slots)
            pinned = tuple((cpu, positions[slot]) for cpu, slot in cpus.items() if slot in positions)
            if len(stay) in (0, len(positions)) and not pinned:
                stay = tuple(range(len(positions)))
            wanted = (stay, pinned)
            if wanted != group.steered:
                group.steered = wanted
                if not spread(group.members, stay, dict(pinned)):
                    log.warning("cannot steer new connections of %s: the kernel refuses", group.asked)

    # -- the end -----------------------------------------------------------------------------------------------------

    def mute_shared(self) -> None:
        """Remove the paths of unix sockets before the last drain, so that no new client connects."""
        for one in self.shared:
            if one.listener.family == socket.AF_UNIX:  # mute() leaves a path of others alone
                one.listener.mute()

    def close_slot(self, slot: int) -> int:
        """Close the sockets of a slot at the end of everything; leave the groups as they are.

        Returns:
            the number of connections that were still queued, and are reset.
        """
        lost = 0
        for group in self.groups:
            for member in group.members:
                if member.slot == slot and not member.listener.closed:
                    lost += queue_length(member.socket)
                    member.listener.close()
        return lost

    def close_shared(self, keep_paths: bool = False) -> None:
        for one in self.shared:
            one.listener.close(keep_path=keep_paths)

    def close(self, keep_paths: bool = False) -> None:
        for group in self.groups:
            for member in group.members:
                with contextlib.suppress(OSError):
                    member.listener.close()
        self.close_shared(keep_paths)


def describe(address: Any) -> str:
    """Return an address as text that is the same in the next master."""
    if hasattr(address, "getsockname"):
        return f"socket {address.getsockname()}"
    return str(address)
