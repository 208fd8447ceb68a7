"""What the faults have shown."""

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
    """One thing that went wrong.

    Attributes:
        fault: what was done to the handler when it showed: one of FAULTS, or "many connections".
        kind: "conversation" (an answer is not the one expected), "descriptors" or "greenlets" (they stay), "memory" (it
            grows), "handler error" (it raised), "endless handler" (it does not end when its client has gone, or when
            it is told to), "not served" (a good client gets no answer any more), "stall" (a client that has stopped
            keeps its connection), "blocked" (the event loop stands still), "died" (the process has ended).
        text: what was seen; may have several lines.
    """

    fault: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.text}"


@dataclass(frozen=True, slots=True)
class FaultReport:
    """What ``check_faults`` has found. Printed, it is a text for people: ``assert report.ok, report``.

    Attributes:
        problems: in the order they were found.
        played: the faults that were played; fewer than asked for if the server did not survive one.
        connections: how many the handler has served.
        memory_growth: bytes of memory that the server's process has grown by (resident set), from its first good
            conversation to the end.
        seconds: how long it took.
    """

    problems: tuple[Problem, ...]
    played: tuple[str, ...]
    connections: int
    memory_growth: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Nothing was found."""
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
