"""The report of check_faults."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent
from typing import Literal

from gtcpserver.plural import counted

Kind = Literal[
    "conversation",
    "descriptors",
    "greenlets",
    "memory",
    "handler error",
    "endless handler",
    "not served",
    "stall",
    "blocked",
    "died",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem found.

    Attributes:
        fault: the fault played when it appeared: one of FAULTS, or "many connections".
        kind: "conversation" (an answer is not the one expected), "descriptors" or "greenlets" (they stay), "memory" (it
            grows), "handler error" (it raised), "endless handler" (it does not end after its client left, or when it is
            told to), "not served" (a good client no longer gets an answer), "stall" (a stalled client keeps its
            connection), "blocked" (the event loop does not run), "died" (the process ended).
        text: description; may have several lines.

    Example::

        for problem in report.problems:
            print(f"{problem.fault}: {problem.kind}: {problem.text}")  # reset: memory: it grows
    """

    fault: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.text}"


@dataclass(frozen=True, slots=True)
class FaultReport:
    """The findings of ``check_faults``. str() gives a readable text: ``assert report.ok, report``.

    Attributes:
        problems: the problems, in the order found.
        played: the faults that were played; fewer than asked for if the server did not survive one.
        connections: number of connections the handler served.
        memory_growth: growth of the server process in bytes (resident set), from its first good conversation to the
            end.
        seconds: duration of the check.

    Example::

        assert report.ok, report
        print(report.connections, "connections,", len(report.played), "faults")  # 12 connections, 2 faults
    """

    problems: tuple[Problem, ...]
    played: tuple[str, ...]
    connections: int
    memory_growth: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        found = counted(len(self.problems), "problem")
        lines = [
            f"{found if self.problems else 'nothing found'}: {counted(len(self.played), 'fault')}, "
            f"{counted(self.connections, 'connection')},"
            f" {self.seconds:.1f} s, memory grew by {self.memory_growth / 1024:.0f} KiB"
        ]
        for problem in self.problems:
            first, *more = str(problem).rstrip().splitlines()
            lines.append(f"- {first}")
            if more:
                lines.append(indent("\n".join(more), "    "))
        return "\n".join(lines)
