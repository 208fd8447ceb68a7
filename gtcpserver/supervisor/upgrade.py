"""Upgrade: a master hands its sockets to a new one, started from the code on disk.

    old master                                  new master (its child)
    fork, exec the same command line     --->   takes over the descriptors the environment names
    "more", for what came to be later    --->   takes over what it knows
                                                starts its workers: both generations accept
    "ready" (or "failed", or EOF)        <---
    workers leave their sockets, exit
    "pair", for each of its workers      --->   gives the line to one of its own (`pairing`)

Until "ready" the old master serves on, and a new one that fails changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gtcpserver.errors import GtcpServerError
from gtcpserver.process.descriptors import close_descriptor

from .channel import Channel, adopt
from .messages import HANDOVER_KINDS, Message
from .reload import Done
from .slots import KILL_AGAIN_SECONDS, describe_status
from .sockets import Inherited
from .system import System

log = logging.getLogger("gtcpserver")

#: The environment variable with the `Handover`, as JSON.
VARIABLE = "GTCPSERVER_HANDOVER"

#: What the environment has: every version knows these, and no other. What came to be later is passed on by messages
#: ("more"), each with its name and perhaps a descriptor: a version that does not know them drops them, and the kernel
#: closes the descriptors. So an upgrade may also lead back to an older version.
FIRST_FIELDS = ("pid", "channel", "slots", "sockets", "control", "listen_fds", "metrics")

#: The others, as the log calls them when they are lost.
MORE_FIELDS = {
    "memory": "the counts of limits and the keys of TLS tickets",
    "agent": "the sockets of the agent check",
    "in_maintenance": "maintenance (ctl maint on)",
    "history": "what the status page shows of the past",
}

#: Seconds for the workers of a new master to become ready.
UPGRADE_SECONDS = 120.0

#: Seconds for the old master's socket to take a message.
TELL_SECONDS = 2.0

#: Seconds for a failed new master to end before it is killed: the default graceful timeout, and some more.
FAILED_SECONDS = 40.0


class UpgradeStage(Enum):
    """The stages of an upgrade, in the old master."""

    NONE = "none"
    UNDER_WAY = "under way"  # a new master starts, and this one serves
    LEFT = "left"  # the new master has taken over


#: Every change of stage, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
UPGRADE_CHANGES = {
    (UpgradeStage.NONE, UpgradeStage.UNDER_WAY): "USR2, or `ctl upgrade`",
    (UpgradeStage.UNDER_WAY, UpgradeStage.LEFT): "the new master says `ready`",
    (UpgradeStage.UNDER_WAY, UpgradeStage.NONE): (
        "it fails: the new master says `failed`, ends, or takes more than 120 s; or this one stops"
    ),
}


@dataclass(frozen=True)
class Handover:
    """What an old master passes to the new one, in the environment, and in messages.

    Attributes:
        pid: process id of the old master.
        channel: descriptor on which the new master says that it is ready.
        slots: numbers of the slots.
        sockets: the listening sockets.
        control: descriptor of the control socket, with its path and identity (device, inode); None if there is none.
        listen_fds: number of descriptors that came from systemd.
        metrics: the listening sockets of the monitor.
        memory: descriptor of the counts that all workers share (`shared.memory`); None if there are none.
        agent: the listening sockets of the agent check.
        in_maintenance: whether `ctl maint on` holds.
        taken: which of MORE_FIELDS have come, in the new master.
        history: descriptor of the memory of what monitors have seen (`monitoring.history`); None if there is none.
    """

    pid: int
    channel: int
    slots: list[int]
    sockets: list[Inherited]
    control: tuple[int, str, tuple[int, int] | None] | None
    listen_fds: int
    metrics: list[Inherited]
    memory: int | None = None
    agent: list[Inherited] = field(default_factory=list)
    in_maintenance: bool = False
    taken: tuple[str, ...] = ()
    history: int | None = None

    def fds(self) -> list[int]:
        """Return all descriptors except the channel."""
        memories = [fd for fd in (self.memory, self.history) if fd is not None]
        return [*self.first_fds(), *(one.fd for one in self.agent), *memories]

    def first_fds(self) -> list[int]:
        """Return the descriptors that the environment names, except the channel."""
        control = [self.control[0]] if self.control is not None else []
        return [one.fd for one in (*self.sockets, *self.metrics)] + control

    def first(self) -> str:
        """Return the text for the environment."""
        fields = dataclasses.asdict(self)
        return json.dumps({name: fields[name] for name in FIRST_FIELDS})

    def more(self) -> list[tuple[str, Any, int | None]]:
        """Return what is passed on by messages: name, value and descriptor of each."""
        found: list[tuple[str, Any, int | None]] = []
        if self.memory is not None:
            found.append(("memory", None, self.memory))
        found += [("agent", dataclasses.asdict(one), one.fd) for one in self.agent]
        if self.in_maintenance:
            found.append(("in_maintenance", True, None))
        if self.history is not None:
            found.append(("history", None, self.history))
        return found

    def with_more(self, name: str, value: Any, fd: int | None) -> Handover:
        """Return it with something that has come by a message; unchanged if that is nothing that this version knows."""
        if name == "memory" and fd is not None:
            new = dataclasses.replace(self, memory=fd)
        elif name == "agent" and fd is not None:
            new = dataclasses.replace(self, agent=[*self.agent, *_inherited([{**value, "fd": fd}])])
        elif name == "history" and fd is not None:
            new = dataclasses.replace(self, history=fd)
        elif name == "in_maintenance":
            new = dataclasses.replace(self, in_maintenance=value is True)
        else:
            return self
        return dataclasses.replace(new, taken=(*new.taken, name))


def take_handover() -> Handover | None:
    """Remove what the last master left in the environment, and return it; None at a first start.

    Raises:
        GtcpServerError: it cannot be read: the versions of the masters are too far apart.
    """
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return None
    try:
        fields = json.loads(text)
        sockets = _inherited(fields.pop("sockets"))
        metrics, agent = (_inherited(fields.pop(name, [])) for name in ("metrics", "agent"))
        control = fields.pop("control")
        if control is not None:
            control = (control[0], control[1], _pair(control[2]))
        handover = Handover(sockets=sockets, metrics=metrics, agent=agent, control=control, **fields)
        return _receive_more(handover)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise GtcpServerError(f"cannot take over from the running master: {error}") from None


def _receive_more(handover: Handover) -> Handover:
    """Read what the old master has sent before it started this one."""
    channel = adopt(handover.channel, HANDOVER_KINDS, takes_fds=True)
    while messages := channel.receive():
        for message, fd in messages:
            before = handover
            if message.kind == "more":
                handover = handover.with_more(message.text("name"), message.fields.get("value"), fd)
            if handover is before and fd is not None:
                close_descriptor(fd)
    channel.detach()
    return handover


def _inherited(described: list[dict[str, Any]]) -> list[Inherited]:
    return [Inherited(**{**one, "identity": _pair(one["identity"])}) for one in described]


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


class Upgrade:
    """The old master's side: starts new masters, waits until they are ready, and ends those that failed.

    Args:
        system: access to the operating system.
        leave_to: called with the process id of a new master that is ready and takes over.

    Attributes:
        channel: the channel to the new master; None if none is being started.
        successor_channel: the same once the new master has taken over, if its workers take connections.
        stage: the stage of the upgrade.
    """

    def __init__(self, system: System, leave_to: Callable[[int], None]) -> None:
        self.channel: Channel | None = None
        self.successor_channel: Channel | None = None
        self.stage = UpgradeStage.NONE
        self._system = system
        self._leave_to = leave_to
        self._pid = 0
        self._successor = 0  # process id of the new master that took over
        self._give_up_at = 0.0
        self._done: Done | None = None
        self._passed: list[str] = []  # names of what was passed on by messages
        self._failed: dict[int, float] = {}  # process id -> when it is killed

    @property
    def under_way(self) -> bool:
        return self.stage is UpgradeStage.UNDER_WAY

    def pids(self) -> list[int]:
        """Return the process ids of new masters that are still our children."""
        return [*self._failed, *([self._pid] if self.under_way else []), *filter(None, [self._successor])]

    def gone(self) -> bool:
        """Return whether all failed new masters have ended."""
        return not self._failed

    def begin(self, handover: Handover, folder: str, done: Done) -> None:
        """Start a new master with our own command line, in this folder."""
        try:
            ours, theirs = self._system.make_pair(HANDOVER_KINDS, HANDOVER_KINDS)
        except OSError as error:
            log.error("no upgrade: %s", error)
            done(str(error))
            return
        handover = dataclasses.replace(handover, channel=theirs.fileno())
        fds = [*handover.first_fds(), handover.channel]
        self._passed = [name for name, _, _ in handover.more()]

        def environment() -> dict[str, str]:
            os.chdir(folder)
            found = {**os.environ, VARIABLE: handover.first()}
            if handover.listen_fds:
                found |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(handover.listen_fds)}
            return found

        try:
            for name, value, fd in handover.more():
                if not ours.send_if_clear("more", fd, name=name, value=value):
                    raise OSError(errno.ENOBUFS, f"cannot pass on {MORE_FIELDS[name]}")
            self._pid = self._system.start_master(environment, fds)
        except OSError as error:
            ours.close()
            log.error("no upgrade: %s", error)
            done(str(error))
            return
        finally:
            theirs.close()
        self.channel = ours
        self.stage = UpgradeStage.UNDER_WAY
        self._done = done
        self._give_up_at = self._system.monotonic() + UPGRADE_SECONDS
        log.info("a new master was started (pid %d)", self._pid)

    def hear(self) -> None:
        """Handle messages from the new master, or its end."""
        if self.channel is None:
            return
        for message, _ in self.channel.receive():  # raises OSError: nothing can be read now
            if message.kind == "ready":
                self._succeed(message)
            else:
                self.fail(message.text("error"))
            return
        if self.channel.ended:
            self.fail("it ended, or closed its descriptors")

    def ended(self, pid: int, status: int) -> None:
        """Handle the end of a child process that is no worker."""
        if self.under_way and pid == self._pid:
            with contextlib.suppress(OSError):
                self.hear()  # its last words
            self.fail(f"the new master {describe_status(status)}", gone=True)
        if pid == self._successor:
            log.log(
                logging.ERROR if status else logging.INFO, "the new master (pid %d) %s", pid, describe_status(status)
            )
            self._successor = 0
        self._failed.pop(pid, None)

    def look_after(self, now: float) -> None:
        """Do the work that is due. Call a few times a second."""
        if self.under_way and now > self._give_up_at:
            self.fail("it was not ready in time")
        for pid, kill_at in list(self._failed.items()):
            if now >= kill_at:
                self._failed[pid] = now + KILL_AGAIN_SECONDS
                try:
                    self._system.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    del self._failed[pid]  # already reaped elsewhere

    def _succeed(self, message: Message) -> None:
        if message.fields.get("moves") is True:
            self.successor_channel, self.channel = self.channel, None
        self.close()
        self.stage = UpgradeStage.LEFT
        log.info("the new master (pid %d) is ready; this one's workers finish their connections", self._pid)
        taken = message.fields.get("taken")  # an older version does not say
        kept = taken if isinstance(taken, list) else []
        lost = [name for name in MORE_FIELDS if name in self._passed and name not in kept]
        if lost:
            what = "; ".join(MORE_FIELDS[name] for name in lost)
            log.warning("the new master (pid %d) is of another version, and begins anew: %s", self._pid, what)
        self._successor = self._pid
        self._leave_to(self._pid)
        self._tell(None)

    def fail(self, why: str, gone: bool = False) -> None:
        """Give up the new master, if there is one.

        Args:
            why: the reason, for the log.
            gone: whether its process has ended.
        """
        if not self.under_way:
            return
        log.error("the upgrade failed, the old master serves on: %s", why)
        self._give_up(why, gone)

    def stop(self, seconds: float = FAILED_SECONDS) -> None:
        """End a new master too, since this one stops: it is killed after `seconds`. Wait until it is `gone`."""
        if self.under_way:
            log.info("the upgrade is given up: this master stops")
            self._give_up("the old master stops")
        kill_at = self._system.monotonic() + seconds
        self._failed = {pid: min(before, kill_at) for pid, before in self._failed.items()}

    def _give_up(self, why: str, gone: bool = False) -> None:
        self.close()
        self.stage = UpgradeStage.NONE
        if not gone:
            # It stops its workers gracefully: they may have accepted connections.
            self._failed[self._pid] = self._system.monotonic() + FAILED_SECONDS
            try:
                self._system.kill(self._pid, signal.SIGTERM)
            except ProcessLookupError:
                del self._failed[self._pid]  # already reaped elsewhere
            except OSError:
                pass
        self._tell(why)

    def _tell(self, error: str | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)

    def pass_on(self, fd: int, slot: int, giver: int) -> bool:
        """Give the new master the end of a line for one of its workers; return False if not given.

        Args:
            fd: the descriptor; the caller still owns it.
            slot: number of the slot whose worker should have it.
            giver: process id of the worker that has the other end.
        """
        channel = self.successor_channel
        return channel is not None and channel.send_if_clear("pair", fd, slot=slot, giver=giver)

    def close(self) -> None:
        """Close the channel to a new master that is being started."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close_in_child(self) -> None:
        """Close the copies of the channels."""
        self.close()
        if self.successor_channel is not None:
            self.successor_channel.close()


def say_ready(handover: Handover, moves: bool = False) -> tuple[bool, Channel | None]:
    """Tell the old master that this one takes over. Called in the new master.

    Args:
        moves: whether this one's workers take connections of the old one's.

    Returns:
        Whether the old master was told; and with `moves`, the channel on which it sends "pair".
    """
    channel: Channel = adopt(handover.channel, HANDOVER_KINDS, takes_fds=True)
    channel.send("ready", moves=moves, taken=handover.taken)
    told = channel.finish(TELL_SECONDS)
    if told and moves:
        return told, channel
    channel.close()
    return told, None


def say_failed(handover: Handover, error: str) -> None:
    """Tell the old master that this one failed, if possible. Called in the new master."""
    with contextlib.suppress(OSError):
        channel = adopt(handover.channel, HANDOVER_KINDS)
        channel.send("failed", error=error)
        channel.finish(TELL_SECONDS)
        channel.close()
