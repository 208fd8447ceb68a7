"""The commands of a master's control socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gtcpserver.errors import ConfigError
from gtcpserver.monitoring.selection import Selection

from .config import MAX_WORKERS
from .control import Reply, answering
from .messages import MAX_ROWS
from .rebalance import Rebalance
from .slots import Slot, WorkerProcess, WorkerState

if TYPE_CHECKING:
    from .master import Master

COMMANDS = (
    *("status", "connections", "end", "reload", "upgrade", "reopen", "rotate-tickets", "maint", "scale", "rebalance"),
    "stop",
)

#: Seconds that an answer about connections waits for workers; blocked ones are listed as missing.
SELECT_SECONDS = 2.0

#: Seconds that an answer waits for workers' newest counters; a blocked worker's last ones are used.
REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class _Question:
    """A question about connections, to these workers."""

    number: int
    until: float
    asked: list[WorkerProcess]
    reply: Reply


class Commands:
    """Answers requests; those that take time, once they are done."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._waiting: list[tuple[float, Callable[[], Any], Reply]] = []
        self._questions: list[_Question] = []
        self._number = 0

    def answer(self, request: dict[str, Any], reply: Reply) -> None:
        """Handle one request: {"command": ...}; scale requires "workers", maint "on", stop accepts "now"."""
        master, fleet = self._master, self._master.fleet
        command = request.get("command")

        def tell(error: str | None) -> None:
            reply({"error": error} if error else {"ok": True})

        if command == "status":
            self._when_reported(lambda: reply(self.status()), reply)
        elif command in ("connections", "end"):
            self._select(request, command == "end", reply)
        elif command == "stop":
            reply({"ok": True, "end": True})
            if request.get("now") is True:
                master.halt("ctl stop --now")
            else:
                master.begin_stop("ctl stop")
        elif master.stopping:
            reply({"error": "the master stops"})
        elif command == "reload":
            master.begin_reload(
                "ctl reload", lambda error: tell(error) if error else reply({"ok": True, **fleet.moved})
            )
        elif command == "upgrade":
            master.begin_upgrade("ctl upgrade", tell)
        elif command == "reopen":
            tell(master.reopen_log())
        elif command == "rotate-tickets":
            tell(master.rotate_tickets())
        elif command == "maint":
            if not isinstance(on := request.get("on"), bool):
                reply({"error": f"on must be true or false, got {on!r}"})
            else:
                master.set_maintenance(on)
                tell(None)
        elif command == "rebalance":
            self._when_reported(lambda: self._rebalance(reply), reply)
        elif command == "scale":
            count = request.get("workers")
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_WORKERS:
                reply({"error": f"workers must be a whole number from 1 to {MAX_WORKERS}, got {count!r}"})
            else:
                master.scale(count, tell)
        else:
            reply({"error": f"no command {command!r}; there are {', '.join(COMMANDS)}"})

    def _when_reported(self, do: Callable[[], Any], reply: Reply) -> None:
        """Call `do` when the workers have sent their newest counters."""
        for worker in self._master.fleet.workers.values():
            worker.reported = False
        self._master.fleet.tell_all("report")
        self._waiting.append((self._master.system.monotonic() + REPORT_SECONDS, do, reply))

    def _rebalance(self, reply: Reply) -> None:
        fleet = self._master.fleet
        if self._master.stopping:
            reply({"error": "the master stops"})
        elif fleet.rebalance is not None:
            reply({"error": "a rebalance is under way"})
        elif not fleet.pairing.staying():
            reply({"error": "the workers hand nothing over: --handover"})
        else:
            fleet.rebalance = Rebalance(fleet, reply)

    def look_after(self, now: float) -> None:
        """Answer what waited for workers. One answer that fails does not keep the others back."""
        with contextlib.ExitStack() as stack:
            for reply, do in (*self._due_questions(now), *self._due(now)):
                stack.callback(_do, reply, do)

    def _due(self, now: float) -> list[tuple[Reply, Callable[[], Any]]]:
        if not self._waiting:
            return []
        complete = all(worker.reported for worker in self._master.fleet.workers.values())
        due = [(reply, do) for until, do, reply in self._waiting if complete or now >= until]
        self._waiting = [one for one in self._waiting if not (complete or now >= one[0])]
        return due

    def _select(self, request: dict[str, Any], ends: bool, reply: Reply) -> None:
        try:
            selection = Selection.of(request)
        except ConfigError as error:
            reply({"error": str(error)})
            return
        if ends and selection.is_everything:
            reply({"error": "end needs ids, user, client or destination"})
            return
        asked = [one for one in self._master.fleet.workers.values() if one.state is not WorkerState.STARTING]
        self._number += 1
        fields = {name: request.get(name) for name in ("user", "client", "destination", "ids")}
        for worker in asked:
            worker.selected[self._number] = None
            most = max(1, MAX_ROWS // len(asked))
            worker.channel.send("select", number=self._number, end=ends, most=most, **fields)
        until = self._master.system.monotonic() + SELECT_SECONDS
        self._questions.append(_Question(self._number, until, asked, reply))

    def _due_questions(self, now: float) -> list[tuple[Reply, Callable[[], Any]]]:
        due: list[_Question] = []
        for question in self._questions:
            asked = [one for one in question.asked if self._master.fleet.workers.get(one.pid) is one]
            if now >= question.until or all(one.selected[question.number] is not None for one in asked):
                due.append(question)
        self._questions = [question for question in self._questions if question not in due]
        return [(question.reply, partial(self._answer_question, question)) for question in due]

    def _answer_question(self, question: _Question) -> None:
        asked = [one for one in question.asked if self._master.fleet.workers.get(one.pid) is one]
        answers = [(one, one.selected.pop(question.number, None)) for one in question.asked]
        rows = [{**row, "worker": one.slot} for one, found in answers if found for row in found.rows]
        rows.sort(key=lambda row: row["age"], reverse=True)
        question.reply(
            {
                "connections": rows,
                "found": sum(found.number for _, found in answers if found),
                "ended": sum(found.ended for _, found in answers if found),
                "missing": sorted(one.slot for one in asked if (one, None) in answers),
            }
        )

    def status(self, *, in_full: bool = False) -> dict[str, Any]:
        """Return the state of master, workers and counters; `in_full` adds all counters of each worker."""
        master, fleet = self._master, self._master.fleet
        now = master.system.monotonic()
        workers = [
            describe(slot, worker, now) | ({"stats": worker.stats} if in_full else {})
            for _, slot in sorted(fleet.slots.items())
            for worker in slot.workers()
        ]
        return {
            "name": master.program.name,
            "state": master.state.value,
            "ready": master.ready,
            "maintenance": master.in_maintenance,
            "pid": master.system.pid(),
            "uptime": round(now - master.started_at, 3),
            "addresses": master.addresses,
            "target": fleet.target,
            "generation": fleet.generation,
            "reloading": fleet.reloading(),
            "restarts": fleet.restarts,
            "retired": len(fleet.retired()),
            "workers": workers,
            "stats": fleet.stats(),
        }


def _do(reply: Reply, do: Callable[[], Any]) -> None:
    with answering(reply):
        do()


def describe(slot: Slot, worker: WorkerProcess, now: float) -> dict[str, Any]:
    """Return the description of one worker, for people and programs."""
    return {
        "number": slot.number,
        "pid": worker.pid,
        "state": worker.state.value,
        "generation": worker.generation,
        "uptime": round(now - worker.started_at, 3),
        "lag": worker.lag,
        "lagging": worker.lagging,
        "rss": worker.rss,
        "accepted": worker.stats.get("accepted", 0),
        "active": worker.stats.get("active", 0),
        "moved": worker.stats.get("moved", 0),
        "taken_over": worker.stats.get("taken_over", 0),
        "staying": worker.stats.get("staying", {}) if worker.leaving else {},
    }
