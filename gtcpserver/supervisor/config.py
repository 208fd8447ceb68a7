"""SupervisorConfig: the number of workers, their replacement, and the processes' outward properties."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from typing import Any

from gtcpserver.address import MAX_UNIX_PATH, Address, parse_address
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import ConfigError
from gtcpserver.monitoring.monitor import check_metrics_address
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT

from .cpus import count_cpus

#: More is a mistake: each worker is a process, and the steering program of a group has two instructions per member, of
#: which the kernel accepts 4096.
MAX_WORKERS = 1024

#: (uid_t)-1, which has a special meaning for setuid(2) and chown(2).
NOBODY = 2**32 - 1

#: Default probation in seconds. Programs that load but cannot work mostly die at once, or at one of their first
#: requests. An operator waits for this time twice. Precedents: minReadySeconds of a Kubernetes Deployment, 0;
#: --update-monitor of Docker, 5 s.
DEFAULT_PROBATION = 1.0

#: Half the time that an upgrade gives a new master (`upgrade.UPGRADE_SECONDS`).
LONGEST_PROBATION = 60.0

#: The usual figure of gunicorn and uwsgi users, in seconds; a loop should never be blocked for one second.
DEFAULT_WORKER_TIMEOUT = 30.0


#: Seconds. With the keys of the time before, a ticket is read for up to a day, as long as nginx users rotate theirs by
#: hand; no ticket is valid for longer than 2 hours.
DEFAULT_ROTATE_TICKETS = 12 * 3600.0


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """The options of a master and its workers.

    Attributes:
        workers: number of worker processes at the start; "auto" is one for each CPU this process may use, by its
            affinity and the quotas of its control groups.
        preload: import the program once, in the master, so that workers share its memory. A reload then starts workers
            with the same code; only an upgrade (USR2) reads it again.
        worker_timeout: seconds that a worker's event loop may be blocked before its stacks are logged and the worker is
            replaced. None: no limit.
        graceful_timeout: seconds for connections to finish at a stop. None: no limit.
        retire_timeout: the same after another worker has taken over, at a reload, an upgrade, recycling or fewer
            workers. None: no limit, as nothing waits for them.
        max_retired: maximum number of replaced workers that may stay for their connections. Beyond it, the oldest are
            told to finish: their connections get graceful_timeout, and the next reload waits for it. None: no limit.
        probation: seconds that a new worker must live, once it is ready, before the worker it replaces leaves (at a
            reload, an upgrade or recycling). 0: none.
        reload_one_by_one: at a reload, replace workers one after the other, so that memory is needed for one more
            worker only. If one fails, those before it have the new code already.
        drain_delay: seconds between "not ready" and the end of accepting at a stop, for load balancers to notice.
        recycle_after: replace a worker that has accepted this number of connections. None: never.
        recycle_jitter: upper bound of a random number of further connections, so that workers do not all come due at
            once. None: a tenth of recycle_after.
        recycle_memory: MiB of resident memory above which a worker is replaced. None: never.
        relieve_lagging: whether a worker whose event loop stays late gives half of its idle connections to the others
            every few seconds until it has caught up; for servers with ``handover``.
        pin_cpus: run worker i on CPU i, and give it the connections that this CPU receives.
        pid_file: path of the file for the master's process id.
        user: the workers' user, by name or number; the master keeps its own, for ports below 1024 and log files.
        group: the workers' group; None: the user's own.
        rotate_tickets: seconds between new keys for TLS session tickets, which all workers share. Tickets of the keys
            before stay valid, older ones do not. None: never.
        umask: the processes' file mode creation mask, such as 0o027.
        control: path of the control socket (mode 600); see `gtcpserver ctl`.
        log_file: path of the file for standard error; reopened at USR1.
        metrics: address of metrics, health checks and the status page, which have their own process; a port without
            a host is on 127.0.0.1. None: not served.
        agent_check: address on which haproxy's agent checks are answered (`agent`); likewise.

    Raises:
        ConfigError: a value is invalid; the message names it.

    Example::

        from gtcpserver.supervisor import SupervisorConfig

        config = SupervisorConfig(workers=4, graceful_timeout=20, control="app.control")
        print(config.worker_count())  # 4
    """

    workers: int | str = "auto"
    preload: bool = False
    worker_timeout: float | None = DEFAULT_WORKER_TIMEOUT
    graceful_timeout: float | None = DEFAULT_STOP_TIMEOUT
    retire_timeout: float | None = None
    max_retired: int | None = None
    probation: float = DEFAULT_PROBATION
    reload_one_by_one: bool = False
    drain_delay: float = 0.0
    recycle_after: int | None = None
    recycle_jitter: int | None = None
    recycle_memory: float | None = None
    relieve_lagging: bool = False
    pin_cpus: bool = False
    pid_file: str | None = None
    user: str | int | None = None
    group: str | int | None = None
    umask: int | None = None
    rotate_tickets: float | None = DEFAULT_ROTATE_TICKETS
    control: str | None = None
    log_file: str | None = None
    metrics: str | int | None = None
    agent_check: str | int | None = None

    def __post_init__(self) -> None:
        if self.workers != "auto":
            if isinstance(self.workers, str):
                raise ConfigError(f'workers must be a whole number from 1 or "auto", got {self.workers!r}')
            check_whole_number("workers", self.workers, least=1)
            if self.workers > MAX_WORKERS:
                raise ConfigError(f"workers must be at most {MAX_WORKERS}, got {self.workers}")
        # At least a second: beats, which reveal a blocked loop, come every quarter of a second.
        check_number("worker_timeout", self.worker_timeout, least=1, none="for no limit")
        check_number("graceful_timeout", self.graceful_timeout, least=0, none="to wait forever")
        check_number("retire_timeout", self.retire_timeout, least=0, none="to wait forever")
        check_whole_number("max_retired", self.max_retired, least=0, none="for any number")
        check_number("probation", self.probation, least=0)
        if self.probation > LONGEST_PROBATION:
            raise ConfigError(f"probation must be at most {LONGEST_PROBATION:g} seconds, got {self.probation:g}")
        check_number("drain_delay", self.drain_delay, least=0)
        check_whole_number("recycle_after", self.recycle_after, least=1, none="for never")
        check_whole_number("recycle_jitter", self.recycle_jitter, least=0, none="for a tenth of recycle_after")
        check_number("rotate_tickets", self.rotate_tickets, above=0, none="for never")
        check_number("recycle_memory", self.recycle_memory, above=0, none="for never")
        if self.umask is not None and not 0 <= self.umask <= 0o777:
            raise ConfigError(f"umask must be 0 to 0o777, got {self.umask:#o}")
        for name in ("pid_file", "control", "log_file"):
            path = getattr(self, name)
            if path is not None and (not path or "\0" in path):
                raise ConfigError(f"{name} must be a path, got {path!r}")
        if self.control is not None:
            size = len(os.fsencode(self.control if self.control.startswith("@") else os.path.abspath(self.control)))
            if size > MAX_UNIX_PATH:
                raise ConfigError(
                    f"control must be a path of at most {MAX_UNIX_PATH} bytes (unix(7)), got {size} of {self.control!r}"
                )
        if self.metrics is not None:
            check_metrics_address(self.metrics)
        if self.agent_check is not None:
            check_agent_address(self.agent_check)
        if self.user is not None or self.group is not None:
            uid, gid, _ = self.identity()
            if os.geteuid() != 0 and (uid != os.geteuid() or gid != os.getegid()):
                name = "user" if uid != os.geteuid() else "group"
                raise ConfigError(f"{name} must be the one this process has, unless it runs as root")

    def worker_count(self) -> int:
        """Return the number of workers to start with."""
        return count_cpus() if isinstance(self.workers, str) else self.workers

    def identity(self) -> tuple[int, int, str | None]:
        """Return uid, gid and (if known) name of the workers' user. Raises ConfigError for an unknown user."""
        uid, gid, name = os.geteuid(), os.getegid(), None
        if self.user is not None:
            try:
                entry = pwd.getpwnam(str(self.user)) if _is_name(self.user) else pwd.getpwuid(int(self.user))
            except (KeyError, OverflowError, ValueError):  # ValueError: a NUL in it, or more digits than int() reads
                uid = _number("user", self.user)  # without an entry, as in containers
            else:
                uid, gid, name = entry.pw_uid, entry.pw_gid, entry.pw_name
        if self.group is not None:
            try:
                gid = grp.getgrnam(str(self.group)).gr_gid if _is_name(self.group) else _number("group", self.group)
            except (KeyError, ValueError):
                raise ConfigError(f"group must be one of this host's, got {self.group!r}") from None
        return uid, gid, name


def check_agent_address(address: Any) -> Address:
    """Parse the address of the agent check. Raises ConfigError."""
    try:
        return parse_address(address)
    except ConfigError as error:
        raise ConfigError(f"agent_check must be an address: {error}") from None


def _number(name: str, who: str | int) -> int:
    """Return the number of a user or group without a name. Raises ConfigError."""
    if not _is_name(who) and (isinstance(who, int) or len(who) <= 10) and 0 <= int(who) < NOBODY:
        return int(who)
    raise ConfigError(f"{name} must be one of this host's, got {who!r}")


def _is_name(who: str | int) -> bool:
    return isinstance(who, str) and not (who.isascii() and who.isdigit())
