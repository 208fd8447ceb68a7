"""The monitor of a master: a child process that serves metrics, health checks and the status page (`monitoring`).

The monitor is a separate process because it speaks HTTP with strangers, which takes an event loop, libraries and
memory, and may block: a master has none of these, and forks. A worker cannot serve them either, since workers come and
go, and a blocked one must be reported. So the master only answers questions in lines of JSON, one at a time, over a
pair of sockets, from the counters that workers send anyway. Each second it sends its health and, for the history of the
status page, all counters: with 8 workers 2 ms of CPU.

The master keeps the listening sockets, so that the next monitor, or that of another master after an upgrade, finds the
scrapes that wait in their queue. Whatever happens to a monitor, the service goes on.
"""

from __future__ import annotations

import contextlib
import logging
import select
import signal
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gtcpserver.listening.listener import ListenConfig
from gtcpserver.monitoring.connection_table import fullest
from gtcpserver.monitoring.monitor import check_metrics_address, url_of
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.strict_json import to_json

from .channel import GONE, RETRY_SECONDS
from .monitor_job import MonitorJob
from .slots import WorkerProcess, WorkerState, back_off, describe_status
from .sockets import Inherited

if TYPE_CHECKING:
    from .master import Master

log = logging.getLogger("gtcpserver")

#: Seconds between two lines about the master's health. A change is sent at once.
HEALTH_SECONDS = 1.0

#: Seconds of silence after which a monitor must be blocked or stopped: it is killed, and another one started.
SILENCE_SECONDS = 10.0

#: The same for a monitor that starts: it imports a few libraries.
START_SECONDS = 60.0

#: Seconds for workers to send their connections; blocked ones are listed as missing.
TABLE_SECONDS = 1.0

#: Seconds for a monitor to finish its answers (it takes one itself) before it is killed.
LEAVE_SECONDS = 2.0

#: A monitor that ends within this many seconds is not started again at once.
SHORT_LIFE = 10.0

#: Most seconds that the end of the master waits for a killed monitor.
KILL_SECONDS = 2.0

#: Most bytes of answers that wait to be read by the monitor; above it, questions are not answered. The monitor speaks
#: HTTP with strangers: one that was taken over could ask and never read, until the master has no memory left.
MAX_ANSWERS = 1 << 20

#: Most bytes of a line from the monitor.
MAX_REQUEST = 4096


class MonitorProcess:
    """The master's side of the monitor.

    Args:
        master: the master to report on.
        address: where to serve metrics.
        inherited: listening sockets of the last master.
        history: the last master's memory of what monitors have seen.

    Attributes:
        history: the descriptor of this memory; None: each monitor begins with an empty history.

    Raises:
        ConfigError, OSError: the address cannot be used.
    """

    def __init__(
        self, master: Master, address: str | int, inherited: Sequence[Inherited], history: int | None = None
    ) -> None:
        self._master = master
        self._system = system = master.system
        self._address = check_metrics_address(address)
        # No SO_REUSEPORT: one process has the address, and a second master, started by mistake, gets an error.
        self._sockets = system.listening_sockets(ListenConfig(reuse_port=False))
        try:
            self._sockets.open([self._address], [0], inherited)
        except OSError as error:
            raise OSError(error.errno, f"metrics: {error.strerror or error}") from None
        self.history = self._open_history(history)
        self._pid = 0
        self._line: socket.socket | None = None
        self._inbox = b""
        self._outbox = bytearray()
        self._said: Any = None
        self._say_at = 0.0
        self._started_at = 0.0
        self._heard_at = 0.0
        self._looked_at = 0.0
        self._not_before = 0.0
        self._failures = 0
        self._kill_at: float | None = None
        self._told_to_leave = self._for_good = False
        self._asked: dict[int, WorkerProcess] = {}
        self._table_until: float | None = None
        #: Whether it was forked and may still hold the service's listening sockets too: until it serves, or has ended.
        self.starting = False
        log.info("metrics and status page on %s", ", ".join(map(url_of, self._sockets.addresses)))

    def _open_history(self, fd: int | None) -> int | None:
        try:
            return self._system.history_memory(fd)
        except OSError as error:
            log.warning("the status page will forget what was before a new log file or an upgrade: %s", error)
            return None

    def handover(self) -> list[Inherited]:
        """Return the sockets that the next master inherits."""
        return self._sockets.handover()

    # -- life ----------------------------------------------------------------------------------------------------

    def look_after(self, now: float) -> None:
        """Do the work that is due. Call a few times a second, and after every event."""
        if self._pid and self._kill_at is not None and now >= self._kill_at:
            self._signal(signal.SIGKILL)
        if now - self._looked_at > 2 * HEALTH_SECONDS:
            self._heard_at = now  # this process itself stood still
        self._looked_at = now
        if self._line is None:
            if not (self._pid or self._for_good) and now >= self._not_before and self._master.owns_metrics:
                self._start()
            return
        # If another master goes on, the service is not draining: the last answers repeat the health before that.
        health = self._said if self._for_good else self._health()
        if health != self._said or now >= self._say_at:
            # A monitor that does not read gets changes only, which limits the number of lines.
            if health != self._said or not self._outbox:
                self._send({"health": health})
            self._said, self._say_at = health, now + HEALTH_SECONDS
        self._look_after_table(now)
        if self._kill_at is None and now - self._heard_at > (START_SECONDS if self.starting else SILENCE_SECONDS):
            log.error("the monitor (pid %d) has said nothing for %.0f s: killing it", self._pid, now - self._heard_at)
            self._kill_at = now

    def _health(self) -> dict[str, Any]:
        master = self._master
        if master.ready:
            return {"ready": True, "word": "ready"}
        word = "draining" if master.stopping else "maintenance" if master.in_maintenance else master.state.value
        return {"ready": False, "word": "no worker is ready" if word == "serving" else word}

    def _start(self) -> None:
        now = self._system.monotonic()
        try:
            ours, theirs = self._system.make_line()
        except OSError as error:
            self._put_off(now, f"cannot start the monitor: {error.strerror}")
            return
        master = self._master

        def close() -> None:
            ours.close()
            master.close_in_monitor()

        sockets = [one.listener.socket for one in self._sockets.shared]
        log_style, pid = master.program.log_style, self._system.pid()
        try:
            self._pid = self._system.start_monitor(
                MonitorJob(
                    self._address,
                    sockets,
                    theirs,
                    master.config,
                    log_style,
                    pid,
                    program=master.program.name,
                    history=self.history,
                ),
                close,
            )
        except OSError as error:
            ours.close()
            self._put_off(now, f"cannot start the monitor: {error.strerror}")
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        self._line = ours
        self._inbox = b""
        self._outbox = bytearray()
        self._said = None
        self._told_to_leave = False
        self._started_at = self._heard_at = now
        self.starting = True

    def _put_off(self, now: float, what: str) -> None:
        delay = back_off(self._failures)
        self._failures += 1
        self._not_before = now + delay
        log.error("%s; trying again in %.1f s. The service goes on.", what, delay)

    def pids(self) -> list[int]:
        return [self._pid] if self._pid else []

    def ended(self, pid: int, status: int) -> None:
        """Handle the end of a child process."""
        if pid != self._pid:
            return
        now = self._system.monotonic()
        self._pid = 0
        self._kill_at = None
        self.starting = False  # not at the end of its line, after which the kernel closes the other descriptors
        self._hang_up()
        if self._told_to_leave:
            return
        what = f"the monitor (pid {pid}) {describe_status(status)}"
        if now - self._started_at < SHORT_LIFE:
            self._put_off(now, what)
        else:
            self._failures = 0
            log.error("%s; starting another", what)

    def renew(self) -> None:
        """Replace the monitor process: the log file has changed."""
        if self._pid and not self._told_to_leave:
            self._told_to_leave = True
            self._kill_at = self._system.monotonic() + LEAVE_SECONDS
            self._send({"leave": True})

    def leave(self) -> None:
        """Tell the monitor to finish its answers and end for good. The next master serves what is queued."""
        if not self._for_good:
            self._for_good = True
            self.renew()

    def gone(self) -> bool:
        """Return whether the monitor has ended."""
        return not self._pid

    def close(self, *, keep_paths: bool) -> None:
        """End the monitor at once if it still runs, and close everything."""
        if self._pid:
            self._signal(signal.SIGKILL)
            give_up = self._system.monotonic() + KILL_SECONDS
            try:
                while self._system.wait(self._pid)[0] == 0 and self._system.monotonic() < give_up:
                    self._system.sleep(RETRY_SECONDS)
            except ChildProcessError:
                pass  # already reaped elsewhere
            self._pid = 0
        self._hang_up()
        self._close_history()
        self._sockets.close(keep_paths=keep_paths)

    def _close_history(self) -> None:
        if self.history is not None:
            fd, self.history = self.history, None
            close_descriptor(fd)

    def close_in_child(self, *, sockets: bool) -> None:
        """Close the line and, if asked, all that is the next monitor's. Called in a forked process."""
        self._hang_up()
        if sockets:
            self._close_history()
            for one in self._sockets.shared:
                one.listener.socket.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._system.kill(self._pid, number)

    # -- the line ----------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the descriptor to poll; -1 if there is none."""
        return -1 if self._line is None else self._line.fileno()

    def events(self) -> int:
        return select.POLLIN | (select.POLLOUT if self._outbox else 0)

    def handle(self, events: int) -> None:
        """Handle events of the line."""
        if self._line is None:
            return
        if events & select.POLLOUT:
            self._flush()
        if self._line is not None and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._receive(self._line)

    def _receive(self, line: socket.socket) -> None:
        try:
            data = line.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in GONE:
                raise  # it says nothing of the monitor
            data = b""
        self._inbox += data
        if not data or len(self._inbox) > MAX_REQUEST:
            self._hang_up()
            return
        self._heard_at = self._system.monotonic()
        *lines, self._inbox = self._inbox.split(b"\n")
        for one in dict.fromkeys(lines):
            self._answer(one)

    def _answer(self, request: bytes) -> None:
        if request == b"started":
            self.starting = False
        elif len(self._outbox) > MAX_ANSWERS:
            return
        elif request == b"status":
            self._send({"status": self._master.status_for_monitor()})
        elif request == b"connections":
            self._ask_for_table()

    def _send(self, fields: dict[str, Any]) -> None:
        self._outbox += to_json(fields).encode() + b"\n"
        with contextlib.suppress(OSError):  # the rest is sent when the socket is ready
            self._flush()

    def _flush(self) -> None:
        if self._line is None:
            return
        try:
            while self._outbox:
                del self._outbox[: self._line.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in GONE:
                raise  # it says nothing of the monitor
            self._hang_up()

    def _hang_up(self) -> None:
        self._table_until = None
        self._outbox = bytearray()
        if self._line is not None:
            self._line.close()
            self._line = None
            # A monitor ends when it notices; one that does not is killed.
            if self._pid and self._kill_at is None:
                self._kill_at = self._system.monotonic() + LEAVE_SECONDS

    # -- the table of connections ------------------------------------------------------------------------------------

    def _ask_for_table(self) -> None:
        workers = [one for one in self._master.fleet.workers.values() if one.state is not WorkerState.STARTING]
        self._asked = {worker.pid: worker for worker in workers}
        self._table_until = self._system.monotonic() + TABLE_SECONDS
        for worker in workers:
            worker.table = None
            worker.channel.send("connections", of=len(workers))

    def _look_after_table(self, now: float) -> None:
        if self._table_until is None:
            return
        running = self._master.fleet.workers
        asked = [worker for pid, worker in self._asked.items() if pid in running]
        if now < self._table_until and any(worker.table is None for worker in asked):
            return
        self._table_until = None
        self._asked = {}
        self._send({"connections": table_of(asked, running.values())})


def table_of(asked: Sequence[WorkerProcess], running: Iterable[WorkerProcess]) -> dict[str, Any]:
    """Return the connections that workers have told of, oldest first; "missing" names the slots that have not."""
    rows = [{**row, "worker": worker.slot} for worker in asked for row in worker.table or []]
    rows.sort(key=lambda row: row.get("age", 0), reverse=True)
    places: Counter[str] = Counter()
    for worker in asked:
        places.update(worker.places if worker.table is not None else {})
    return {
        "connections": rows,
        "places": fullest(places),
        "total": sum(worker.stats.get("active", 0) for worker in running),
        "missing": sorted(worker.slot for worker in asked if worker.table is None),
    }
