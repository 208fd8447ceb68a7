"""What is done while a call fails (start, serve, reload, stop), and what is judged then.

The promise: a good client is served, or the process has ended with a line and a status. No client waits forever or
takes a part for the whole; no descriptor is kept; nothing spins; the log is not flooded.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gtcpserver.supervisor import ControlError, ask

from . import clients, strace
from .clients import How, Origin, Outcome
from .programs import (
    LOG_LINE,
    SOON,
    STOP_TIMEOUT,
    Server,
    Subject,
    Zygote,
    cpu_seconds,
    descriptors,
    make_subjects,
    wait_until,
)

PHASES = ("start", "serve", "reload", "stop")

#: Seconds for which a call that fails always does so: long enough for a loop to show that it spins.
ALWAYS = 0.6

#: The part of them in which calls are counted, and failing calls a second that are no spin.
WINDOW = 0.3
MOST_CALLS = 300

#: Log lines for one injection that are no flood: a few for each client.
MOST_LINES = 25

#: What the command line says at an end that it has expected.
LAST_LINE = re.compile(r"^gtcpserver: .*\n?\Z", re.MULTILINE)

#: Seconds of which a server that nobody talks to may take at most half as CPU time.
IDLE = 0.2

#: Seconds until a closed connection is gone: the linger takes two.
CLOSING = 4.0

#: Seconds between two beats of a worker.
BEAT = 1.05

#: How often a server may be started, or a phase gone through, until it does what it should with nothing injected: the
#: machine may be busy, and an hour of results is at stake.
ATTEMPTS = 3

#: Descriptors that may grow: pipes of relays are kept for the next one, 16 at most (gtcpserver/transfer/pipes.py).
MAY_GROW = {"pipe": 32}


@dataclass(frozen=True)
class Injection:
    subject: str
    phase: str
    call: str
    error: str
    when: str

    def __str__(self) -> str:
        return f"{self.subject} {self.phase} {self.call}:error={self.error}:when={self.when}"

    @property
    def always(self) -> bool:
        return self.when.endswith("+")

    @property
    def impossible_end(self) -> bool:
        """An error that says that a connection is gone, while strace keeps it: its peer still waits, or sees an orderly
        end, where the kernel would have told it."""
        return self.error in ("ECONNRESET", "EPIPE", "ETIMEDOUT", "ENOTCONN")


@dataclass
class Verdict:
    """What became of one injection.

    Attributes:
        failed: how many calls failed.
        faults: what broke the promise.
        outcomes: of the clients during it.
        ended: the exit status, if the process has ended by itself.
        log: what it logged meanwhile.
    """

    failed: int = 0
    faults: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    ended: int | None = None
    log: str = ""

    @property
    def kind(self) -> str:
        if self.faults:
            return "fault"
        if not self.failed:
            return "not reached"
        if self.ended is not None:
            return "ended"
        return "served" if all(one.how is How.SERVED for one in self.outcomes) else "failed"

    def judge_clients(self, origin: Origin) -> None:
        bad = [str(one) for one in self.outcomes if one.how in (How.CUT, How.HANGS)]
        self.faults += [f"client {one}" for one in dict.fromkeys(bad)]
        self.faults += [f"client upload: {one}" for one in dict.fromkeys(origin.cut)]

    def judge_log(self) -> None:
        lines = len(LOG_LINE.findall(self.log))
        if lines > MOST_LINES:
            self.faults.append(f"flood: {lines} log lines")

    def judge_end(self, status: int | None) -> None:
        self.ended = status
        if not status:
            self.faults.append("ended with status 0")
        # Those that are logged are indented, and those of a worker that cannot start have a line below them.
        elif re.search("^Traceback", self.log, re.MULTILINE) and not LAST_LINE.search(self.log):
            self.faults.append(f"ended with status {status} and a traceback")
        elif not re.search(r"gtcpserver(\[\d+\])?: |ERROR|CRITICAL", self.log):
            self.faults.append(f"ended with status {status} without a line")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Bench]:
    """A bench that ends its servers.

    Args:
        folder: for the servers' files.
    """
    origin, zygote = Origin(), Zygote()
    bench = Bench(folder, zygote, origin, make_subjects(folder, origin))
    try:
        yield bench
    finally:
        bench.close()
        zygote.close()
        origin.close()


class Bench:
    """Runs injections, one after the other. A server that is as good as before serves for the next one, too."""

    def __init__(self, folder: Path, zygote: Zygote, origin: Origin, subjects: dict[str, Subject]) -> None:
        self._folder, self._zygote, self._origin, self.subjects = folder, zygote, origin, subjects
        self._kept: tuple[Subject, Server] | None = None
        self._number = 0
        self._threads = ThreadPoolExecutor(32)
        self._counted: dict[str, int] = {}

    def run(self, injection: Injection) -> Verdict:
        """Make a call fail in one phase of a server's life, and judge."""
        rules = (strace.rule(injection.call, injection.error, injection.when),)
        verdict = self._phase(injection.phase)(self.subjects[injection.subject], rules, injection.always)
        if injection.call == "close":
            # strace does not do the call: what was not closed stays open, and its client hears nothing.
            artefacts = ("keeps", "client", "does not serve")
            verdict.faults = [one for one in verdict.faults if not one.startswith(artefacts)]
            self.drop()
        if injection.impossible_end and injection.call != "splice":  # one of the two ends is told, and tells the other
            # At a start: a worker says it is ready, and the master is not there.
            artefacts = ("keeps", "client", "neither")
            verdict.faults = [one for one in verdict.faults if not one.startswith(artefacts)]
            self.drop()
        if (injection.call, injection.error) == ("splice", "EPIPE"):
            # A side that takes no more may still answer, which the relay waits for; this one is still there, and waits.
            verdict.faults = [
                one for one in verdict.faults if How.HANGS.value not in one and not one.startswith("keeps")
            ]
            self.drop()
        if verdict.faults or verdict.ended is not None:
            self.drop()
        return verdict

    def run_twice(self, injection: Injection) -> Verdict:
        """A fault counts if it comes again, with a new server."""
        verdict = self.run(injection)
        if verdict.faults:
            again = self.run(injection)
            if again.failed:
                return again
        return verdict

    def calls(self, subject: Subject, phase: str) -> dict[str, int]:
        """Which system calls a phase makes, and how often."""
        for _ in range(ATTEMPTS):
            verdict = self._phase(phase)(subject, (), False)
            if not verdict.faults:
                return self._counted
            self.drop()
        raise AssertionError(f"{subject.name} {phase}, nothing injected: {verdict.faults}\n{verdict.log}")

    def drop(self) -> None:
        """End the server that was kept."""
        if self._kept is not None:
            self._kept[1].kill()
            self._kept = None

    def close(self) -> None:
        self.drop()
        self._threads.shutdown(cancel_futures=True)

    # -- phases ------------------------------------------------------------------------------------------------------

    def _phase(self, name: str) -> Callable[[Subject, tuple[str, ...], bool], Verdict]:
        self._origin.cut.clear()
        return {"start": self._start, "serve": self._serve, "reload": self._reload, "stop": self._stop}[name]

    def _start(self, subject: Subject, rules: tuple[str, ...], always: bool) -> Verdict:
        verdict = Verdict()
        server = self._new(subject)
        try:
            with self._injecting(server.pid, rules) as trace:
                server.go()
                cannot_log = any(one.startswith("write") for one in rules)
                up = server.is_connectable if cannot_log else server.listens
                wait_until(lambda: up() or server.status() is not None, SOON / 2)
                verdict.failed = trace.failed()
            wait_until(lambda: up() or server.status() is not None, SOON / 2)
            verdict.log = server.log()
            if server.status() is not None:
                verdict.judge_end(server.status())
            elif not up():
                verdict.faults.append("neither serves nor ends")
            else:
                self._judge_running(subject, server, {}, verdict)
        finally:
            server.kill()
        return verdict

    def _serve(self, subject: Subject, rules: tuple[str, ...], always: bool) -> Verdict:
        verdict = Verdict()
        server = self._running(subject)
        target = self._target(subject, server)
        before, logged = descriptors(target), len(server.log())
        victim = server.worker() if subject.workers == "master" else 0
        with self._injecting(target, rules, follow=subject.workers != "master") as trace:
            talks = self._converse(subject, server)
            if subject.workers == "master":
                self._wait(talks)
                self._trouble(server, victim)
            elif subject.workers == "worker":
                time.sleep(BEAT)
            self._while_it_fails(trace, talks, always, verdict)
            verdict.failed = trace.failed()
        verdict.outcomes = [one.result() for one in talks]
        ended = self._settle(subject, server, target)
        verdict.log = server.log()[logged:]
        if ended is not None:
            verdict.judge_end(ended)
        if server.status() is None:
            self._judge_running(subject, server, before if ended is None else {}, verdict)
            verdict.log = server.log()[logged:]
        return verdict

    def _trouble(self, server: Server, victim: int) -> None:
        """What gives a master something to do: a question, and a worker that dies."""
        with contextlib.suppress(OSError, ValueError, EOFError, ControlError):
            ask(str(server.control), {"command": "status"}, 2.0)
        ready = server.log().count("is ready")
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: server.log().count("is ready") > ready or server.status() is not None, 2.0)

    def _reload(self, subject: Subject, rules: tuple[str, ...], always: bool) -> Verdict:
        verdict = Verdict()
        server = self._running(subject)
        target = self._target(subject, server)
        before, logged = descriptors(target), len(server.log())
        with self._injecting(target, rules, follow=subject.workers != "master") as trace:
            os.kill(server.pid, signal.SIGHUP)
            talks = self._converse(subject, server)
            wait_until(
                lambda: re.search(subject.reloads, server.log()[logged:]) or server.status() is not None,
                3.0 if rules else SOON,
            )
            self._while_it_fails(trace, talks, always, verdict)
            verdict.failed = trace.failed()
        verdict.outcomes = [one.result() for one in talks]
        ended = self._settle(subject, server, target if subject.workers != "worker" else server.pid)
        verdict.log = server.log()[logged:]
        if ended is not None:
            verdict.judge_end(ended)
            return verdict
        again = len(server.log())

        def reloaded() -> bool:
            if time.monotonic() > asked[0] + 1.0:  # one that is under way takes no other
                asked[0] = time.monotonic()
                os.kill(server.pid, signal.SIGHUP)
            return re.search(subject.reloads, server.log()[again:]) is not None

        asked = [0.0]
        if not wait_until(reloaded):
            verdict.faults.append("does not reload any more")
        self._judge_running(subject, server, before if subject.workers != "worker" else {}, verdict)
        return verdict

    def _stop(self, subject: Subject, rules: tuple[str, ...], always: bool) -> Verdict:
        verdict = Verdict()
        server = self._started(subject)
        try:
            target = self._target(subject, server)
            logged = len(server.log())
            with contextlib.suppress(OSError), clients.connect(server.port) as idle:
                with self._injecting(target, rules, follow=subject.workers != "master") as trace:
                    talks = self._converse(subject, server)
                    time.sleep(0.05)
                    os.kill(server.pid, signal.SIGTERM)
                    talks += self._converse(subject, server)
                    wait_until(lambda: server.status() is not None, STOP_TIMEOUT + 6.0)
                    verdict.failed = trace.failed()
                if server.status() is None:
                    wait_until(lambda: server.status() is not None, 3.0)
                    late = "only when the calls no longer failed" if server.status() is not None else "not at all"
                    verdict.faults.append(f"does not stop in time: {late}")
                idle.close()
            verdict.log = server.log()[logged:]
            if server.status():
                verdict.judge_end(server.status())
            elif server.status() == 0 and not _session_ends(server.pid):
                verdict.faults.append("leaves processes behind")
        finally:
            server.kill()
        verdict.outcomes = [one.result() for one in talks]
        verdict.judge_clients(self._origin)
        if subject.answers_pieces:
            verdict.faults = [one for one in verdict.faults if How.CUT.value not in one]
        verdict.judge_log()
        return verdict

    # -- servers -----------------------------------------------------------------------------------------------------

    def _new(self, subject: Subject) -> Server:
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        return Server(self._zygote, list(subject.arguments), folder)

    def _started(self, subject: Subject) -> Server:
        """One that serves, and has done what it does only once."""
        for _ in range(ATTEMPTS):
            server = self._new(subject)
            server.go()
            bad = self._does_not_serve(subject, server)
            if not bad:
                return server
            server.kill()
        raise AssertionError(f"{subject.name}, nothing injected: {bad}\n{server.log()}")

    def _does_not_serve(self, subject: Subject, server: Server) -> str:
        """Empty if a server that was just started serves all clients, twice."""
        if not wait_until(lambda: server.listens() or server.status() is not None) or not server.listens():
            return "does not listen"
        return self._serves(subject, server) or self._serves(subject, server)

    def _running(self, subject: Subject) -> Server:
        if self._kept is None or self._kept[0] is not subject or self._kept[1].status() is not None:
            self.drop()
            self._kept = (subject, self._started(subject))
        return self._kept[1]

    def _target(self, subject: Subject, server: Server) -> int:
        return server.worker() if subject.workers == "worker" else server.pid

    @contextlib.contextmanager
    def _injecting(self, pid: int, rules: tuple[str, ...], follow: bool = True) -> Iterator[strace.Trace]:
        path = self._folder / "trace"
        path.unlink(missing_ok=True)
        with strace.injecting(pid, path, *rules, follow=follow) as trace:
            yield trace
        self._counted = {} if rules else trace.counts()

    # -- clients -----------------------------------------------------------------------------------------------------

    def _converse(self, subject: Subject, server: Server) -> list[Future[Outcome]]:
        def start(name: str, talk: Callable[[int], None]) -> Future[Outcome]:
            return self._threads.submit(clients.run, name, lambda: talk(server.port))

        return [start(name, talk) for name, talk in subject.conversations.items()]

    def _wait(self, talks: list[Future[Outcome]], seconds: float = clients.PATIENCE) -> None:
        wait_until(lambda: all(one.done() for one in talks), seconds)

    def _serves(self, subject: Subject, server: Server) -> str:
        """Empty if every kind of client is served within a few seconds, else what is met."""
        give_up = time.monotonic() + clients.PATIENCE
        while True:
            outcomes = [one.result() for one in self._converse(subject, server)]
            bad = [one for one in outcomes if one.how is not How.SERVED]
            if not bad or time.monotonic() > give_up or server.status() is not None:
                return str(bad[0]) if bad else ""
            time.sleep(0.05)

    # -- judgement ---------------------------------------------------------------------------------------------------

    def _while_it_fails(
        self, trace: strace.Trace, talks: list[Future[Outcome]], always: bool, verdict: Verdict
    ) -> None:
        self._wait(talks, ALWAYS if always else clients.PATIENCE)
        if always:
            before = trace.failed()
            time.sleep(WINDOW)
            calls = trace.failed() - before
            if calls > MOST_CALLS * WINDOW:
                verdict.faults.append(f"spins: {calls / WINDOW:.0f} failing calls a second")

    def _settle(self, subject: Subject, server: Server, target: int) -> int | None:
        """The exit status of the process in which calls failed, if it has ended."""
        if server.status() is not None:
            return server.status()
        if target != server.pid and not os.path.exists(f"/proc/{target}"):
            return -1
        return None

    def _judge_running(self, subject: Subject, server: Server, before: dict[str, int], verdict: Verdict) -> None:
        bad = self._serves(subject, server)
        if server.status() is not None:
            verdict.log = server.log()
            verdict.judge_end(server.status())
        elif bad:
            verdict.faults.append(f"does not serve afterwards: {bad}")
        else:
            self._judge_rest(subject, server, before, verdict)
        verdict.judge_clients(self._origin)
        verdict.judge_log()

    def _judge_rest(self, subject: Subject, server: Server, before: dict[str, int], verdict: Verdict) -> None:
        if subject.workers:
            wanted = int(subject.arguments[subject.arguments.index("--workers") + 1])
            if not wait_until(lambda: len(server.ready_workers()) == wanted, SOON):
                verdict.faults.append(f"not {wanted} workers serve")
                return
        target = self._target(subject, server)
        if before:
            wait_until(lambda: not _grown(before, descriptors(target)), CLOSING)
            for kind, number in _grown(before, descriptors(target)).items():
                verdict.faults.append(f"keeps {number} {kind}")
        begun = cpu_seconds(target)
        time.sleep(IDLE)
        if cpu_seconds(target) - begun > IDLE / 2:
            begun = cpu_seconds(target)
            time.sleep(1.0)
            if cpu_seconds(target) - begun > 0.5:
                verdict.faults.append(f"spins: {cpu_seconds(target) - begun:.1f} s of CPU time in an idle second")


def _grown(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {
        kind: count - before.get(kind, 0)
        for kind, count in now.items()
        if count > before.get(kind, 0) + MAY_GROW.get(kind, 0)
    }


def _session_ends(pid: int) -> bool:
    def ended() -> bool:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        return False

    return wait_until(ended, 2.0)
