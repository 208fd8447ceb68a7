"""A small coverage-guided fuzzer.

It mutates inputs of a corpus, keeps those that take a new way through the library (pairs of lines, and how often, as
AFL counts them), and judges what each input costs: lines of Python, seconds of CPU, bytes of memory, each by the
input's length. sys.settrace does the counting: slow (some thousand inputs a second), but every CPython has it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from random import Random
from time import process_time, thread_time
from typing import Any

import gtcpserver

PACKAGE = os.path.dirname(gtcpserver.__file__) + os.sep

HERE = Path(__file__).parent
SEEDS = HERE / "corpus"

#: Kept between runs of `make fuzz`: inputs that found new ways, and inputs that found faults.
WORK = HERE.parent.parent / ".fuzz"

#: CPU seconds after which an input is stopped, even inside a regular expression.
HANG_SECONDS = 10.0

#: One input in this many is made long by repeating a piece of it, to find what does not grow in proportion.
INFLATE_EVERY = 32

SHRINK_TRIES = 600


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        function: takes any bytes; an exception is a fault.
        tokens: words of the language that it reads.
        longest: bytes of an input.
        lines, seconds, memory: what an input may cost, as (constant, per byte): lines of the library, CPU seconds,
            bytes at the peak. They include what the function itself does to check the result.
    """

    name: str
    function: Callable[[bytes], None]
    tokens: tuple[bytes, ...] = ()
    longest: int = 64 * 1024
    lines: tuple[int, float] = (20_000, 100)
    seconds: tuple[float, float] = (0.1, 10e-6)
    memory: tuple[int, float] = (4_000_000, 400)

    def seeds(self) -> list[bytes]:
        """The inputs that are kept in the repository."""
        return [path.read_bytes() for path in seed_paths(self.name)]


def seed_paths(name: str) -> list[Path]:
    return sorted(path for path in (SEEDS / name).glob("*") if path.is_file())


class Fault(AssertionError):
    """An input that a target fails with.

    Attributes:
        data: the input.
        key: what two inputs with the same fault have in common.
    """

    def __init__(self, target: Target, data: bytes, what: str, key: object) -> None:
        shown = repr(data) if len(data) <= 400 else f"{data[:200]!r}... ({len(data)} bytes)"
        super().__init__(f"{target.name}: {what}\ninput: {shown}")
        self.data = data
        self.key = key


class _TooMuch(BaseException):
    """Stops a target that takes too many lines or too long. No Exception, so that nothing in it swallows this."""


# -- what an input does ------------------------------------------------------------------------------------------------


class Tracer:
    """Runs a function and notes its way through the files below a folder.

    Attributes:
        lines: executed in the last run.
    """

    def __init__(self, folder: str = PACKAGE) -> None:
        self._folder = folder
        # By id, since the hash of a code object is made of all that is in it; with the code, so that no id comes again.
        self._of_code: dict[int, tuple[Any, Any]] = {}
        self._counts: dict[int, int] = {}
        self._place = 0
        self._most: float = inf
        self.lines = 0

    def run(self, function: Callable[[bytes], None], data: bytes, most: float = inf) -> set[int]:
        """Call it; returns the ways it took, a number each. Raises _TooMuch after so many lines."""
        self._counts = {}
        self._place = self.lines = 0
        self._most = most
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function(data)
        finally:
            sys.settrace(before)
        return {edge << 3 | min(count.bit_length(), 7) for edge, count in self._counts.items()}

    def _enter(self, frame: Any, event: str, argument: object) -> Any:
        code = frame.f_code
        known = self._of_code.get(id(code))
        if known is None:
            inside = code.co_filename.startswith(self._folder)
            known = self._of_code[id(code)] = (code, self._make(len(self._of_code)) if inside else None)
        return known[1]

    def _make(self, number: int) -> Any:
        base = number << 14

        def trace(frame: Any, event: str, argument: object) -> Any:
            if event == "line":
                here = base + frame.f_lineno
                edge = self._place << 28 ^ here
                self._place = here
                counts = self._counts
                counts[edge] = counts.get(edge, 0) + 1
                self.lines += 1
                if self.lines > self._most:
                    raise _TooMuch(f"more than {self._most:.0f} lines")
            return trace

        return trace


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise _TooMuch after so much CPU; regular expressions look for signals, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TooMuch(f"more than {seconds} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check(target: Target, data: bytes, tracer: Tracer, *, memory: bool = False) -> set[int]:
    """Run a target with one input.

    Args:
        memory: measure the peak of memory, too, by another run.

    Returns:
        The ways that it took.

    Raises:
        Fault: it failed, or costs too much.
    """
    began = thread_time()
    try:
        with _bounded(HANG_SECONDS):
            ways = tracer.run(target.function, data, target.lines[0] + target.lines[1] * len(data))
        allowed = target.seconds[0] + target.seconds[1] * len(data)
        if thread_time() - began > allowed:
            _check_seconds(target, data, allowed)
        if memory:
            _check_memory(target, data)
    except Fault:
        raise
    except _TooMuch as stopped:
        raise Fault(target, data, f"{stopped} for {len(data)} bytes", "cost") from None
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = trace and (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        where = place and f" ({os.path.relpath(place[0], HERE.parent)}:{place[1]})"
        raise Fault(target, data, f"{type(error).__name__}: {error}{where}", (type(error), place)) from error
    return ways


def _check_seconds(target: Target, data: bytes, allowed: float) -> None:
    """Without the tracer, and the least of three: what other programs take does not count."""
    least = inf
    for _ in range(3):
        began = thread_time()
        with _bounded(HANG_SECONDS):
            target.function(data)
        least = min(least, thread_time() - began)
        if least <= allowed:
            return
    raise Fault(target, data, f"{least:.2f} s of CPU for {len(data)} bytes", "cost")


def _check_memory(target: Target, data: bytes) -> None:
    allowed = target.memory[0] + target.memory[1] * len(data)
    tracemalloc.start()
    try:
        target.function(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > allowed:
        raise Fault(target, data, f"{peak:,} bytes of memory for {len(data)} bytes", "memory")


# -- inputs ------------------------------------------------------------------------------------------------------------

_BYTES = b"\x00\x01\x7f\x80\xff\r\n\t \",:;/.-_%@[]{}()=?#*'\\09aA"
_NUMBERS = (b"0", b"1", b"-1", b"127", b"255", b"256", b"65535", b"65536", b"99999", b"2147483648", b"1e9", b"0x10")


def mutate(random: Random, data: bytes, other: bytes, tokens: tuple[bytes, ...]) -> bytes:
    """A few changes at random places; ``other`` is an input that pieces may come from."""
    made = bytearray(data)
    for _ in range(1 << random.randrange(5)):
        size = len(made)
        at = random.randrange(size + 1)
        end = min(size, at + 1 + int(random.expovariate(0.15)))
        kind = random.randrange(12)
        if kind <= 1 and tokens:
            made[at:at] = random.choice(tokens)
        elif kind == 2 and tokens:
            made[at:end] = random.choice(tokens)
        elif kind == 3:
            del made[at:end]
        elif kind == 4:
            made[at:at] = made[at:end] * random.choice((1, 1, 2, 8))
        elif kind == 5 and other:
            start = random.randrange(len(other))
            made[at:end] = other[start : start + 1 + int(random.expovariate(0.05))]
        elif kind == 6 and other:  # the beginning of one, and the end of another
            made[at:] = other[random.randrange(len(other)) :]
        elif kind == 7:
            made[at:end] = random.choice(_NUMBERS)
        elif kind == 8:
            made[at:at] = bytes((random.choice(_BYTES),))
        elif at < size:
            if kind == 9:
                made[at] ^= 1 << random.randrange(8)
            elif kind == 10:
                made[at] = random.choice(_BYTES)
            else:
                made[at] = random.randrange(256)
    return bytes(made)


def inflate(random: Random, data: bytes, longest: int, tokens: tuple[bytes, ...] = ()) -> bytes:
    """The same with one piece of it, or one token, many times."""
    at = random.randrange(len(data) + 1)
    piece = data[at : at + random.choice((1, 1, 2, 3, 8, 30))]
    if tokens and not random.randrange(3):
        piece = random.choice(tokens)
    if not piece:
        return data
    room = random.choice((4096, 16_384, longest)) - len(data)
    return data[:at] + piece * max(1, room // len(piece)) + data[at:]


class Fuzzer:
    """Looks for inputs that a target fails with.

    Args:
        random: the source of all choices.
        more: inputs to begin with, besides the target's seeds.

    Attributes:
        corpus: inputs that took new ways.
        inputs: tried so far.
        ways: found so far.
    """

    def __init__(self, target: Target, random: Random, more: Iterable[bytes] = (), folder: str = PACKAGE) -> None:
        self.target = target
        self.corpus: list[bytes] = []
        self.inputs = 0
        self._random = random
        self._tracer = Tracer(folder)
        self._ways: set[int] = set()
        self._todo = [*target.seeds(), *more, b""]

    @property
    def ways(self) -> int:
        return len(self._ways)

    def run(self, seconds: float) -> None:
        """Go on for so many seconds of CPU. Raises Fault, its input as short as it could be made."""
        until = process_time() + seconds
        while process_time() < until:
            data = self._todo.pop() if self._todo else self._next()
            try:
                self._try(data)
            except Fault as fault:
                raise self._shrink(fault) from fault.__cause__

    def _try(self, data: bytes) -> None:
        self.inputs += 1
        new = check(self.target, data, self._tracer) - self._ways
        if new:
            self._ways |= new
            self.corpus.append(data)
            check(self.target, data, self._tracer, memory=True)

    def _next(self) -> bytes:
        random, corpus = self._random, self.corpus
        # Rather short ones, and rather new ones.
        chosen = min(
            random.choice(corpus), random.choice(corpus), corpus[-1 - random.randrange(len(corpus)) // 4], key=len
        )
        data = mutate(random, chosen, random.choice(corpus), self.target.tokens)
        if not self.inputs % INFLATE_EVERY:
            data = inflate(random, data, self.target.longest, self.target.tokens)
        return data[: self.target.longest]

    def _shrink(self, fault: Fault) -> Fault:
        """The same fault by fewer bytes."""
        tries = SHRINK_TRIES if fault.key not in ("cost", "memory") else 40
        size = max(1, len(fault.data) // 2)
        at = 0
        while tries > 0:
            tries -= 1
            shorter = fault.data[:at] + fault.data[at + size :]
            smaller = self._same_fault(shorter, fault) if len(shorter) < len(fault.data) else None
            if smaller is not None:
                fault = smaller
                continue
            at += size
            if at >= len(fault.data):
                if size == 1:
                    break
                at, size = 0, max(1, size // 2)
        return fault

    def _same_fault(self, data: bytes, fault: Fault) -> Fault | None:
        try:
            check(self.target, data, self._tracer, memory=fault.key == "memory")
        except Fault as found:
            return found if found.key == fault.key else None
        return None


def name_of(data: bytes) -> str:
    """A file name for an input."""
    return hashlib.sha256(data).hexdigest()[:16]
