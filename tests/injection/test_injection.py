"""Servers whose system calls fail keep the promise of docs/reliability.md: a part of what `make inject` runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from injection import report
from injection.calls import ERRORS, WHEN, happens
from injection.clients import How, Outcome
from injection.phases import PHASES, Bench, Injection, Verdict, opened
from injection.strace import needs_strace

ACCEPT = ("accept4 EMFILE 1+", "accept4 ECONNABORTED 1", "epoll_ctl ENOMEM 1")
STREAM = ("recvfrom EINTR 1..5", "recvfrom ENOMEM 2", "sendto EAGAIN 2", "sendto ENOBUFS 1")
CONNECT = ("socket EMFILE 1", "connect EADDRNOTAVAIL 1", "splice ENOSYS 1+", "splice EIO 2", "pipe2 EMFILE 1+")

#: For each server and phase: system call, error, when.
CHOSEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("echo", "start"): (
        "epoll_ctl ENOSPC 1",
        "socket ENFILE 1",
        "listen EADDRINUSE 1",
        "getsockname ENOBUFS 1",
        "write ENOSPC 1+",
    ),
    ("echo", "serve"): (*ACCEPT, *STREAM),
    ("echo", "stop"): ("accept4 EMFILE 1", "getsockname ENOBUFS 1", "setsockopt ENOMEM 1"),
    ("TLS", "start"): ("bind EACCES 1",),
    ("TLS", "serve"): (*ACCEPT, "read ENOMEM 2", "write EAGAIN 2", "write EIO 10", "fcntl ENOMEM 1..5"),
    ("TLS", "reload"): ("openat EMFILE 1+", "read EIO 1"),
    ("TLS", "stop"): ("accept4 ENOMEM 1..5", "write EPIPE 1"),
    ("forward", "serve"): (*ACCEPT, *CONNECT, "getsockopt ENOBUFS 1"),
    ("forward", "stop"): ("splice ENOMEM 1", "socket EMFILE 1"),
    ("files", "serve"): (*ACCEPT, "openat2 ENOSYS 1+", "openat2 EMFILE 1", "sendfile EPERM 1+", "preadv2 EIO 2"),
    ("files", "reload"): ("accept4 ENFILE 1", "sendfile EINVAL 1"),
    ("files", "stop"): ("sendfile EIO 1", "newfstatat ENOMEM 1"),
    ("proxy", "serve"): (*ACCEPT, *CONNECT, "sendto ENOBUFS 1"),
    ("proxy", "stop"): ("splice EINVAL 1", "connect ENETUNREACH 1"),
    ("master", "start"): ("socketpair EMFILE 1", "epoll_create1 EMFILE 1+"),
    ("master", "serve"): (
        "poll ENOMEM 1..5",
        "recvfrom ENOBUFS 1",
        "sendto ENOBUFS 1",
        "clone EAGAIN 1",
        "getsockname ENOBUFS 1..5",
    ),
    ("master", "reload"): (
        "clone EAGAIN 1",
        "socketpair EMFILE 1",
        "sendto ENOBUFS 1..5",
        "recvfrom ECONNRESET 1",
        "sendmsg EPIPE 1",
    ),
    ("master", "stop"): ("write EAGAIN 1", "kill EPERM 1", "poll EINTR 1", "wait4 EINTR 1"),
    ("worker", "serve"): ("openat EMFILE 1+", "sendto ENOBUFS 1..5", "recvmsg ENOMEM 1"),
    ("worker", "reload"): ("recvmsg ENOMEM 1", "sendto EAGAIN 1"),
    ("worker", "stop"): ("accept4 EMFILE 1+", "sendto ENOMEM 1"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with opened(tmp_path_factory.mktemp("injection")) as bench:
        yield bench


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(("subject", "phase"), CHOSEN, ids=["-".join(which) for which in CHOSEN])
def test_a_call_that_fails_breaks_no_promise(bench: Bench, subject: str, phase: str) -> None:
    reached = 0
    for words in CHOSEN[subject, phase]:
        injection = Injection(subject, phase, *words.split())
        verdict = bench.run_twice(injection)
        assert verdict.faults == [], f"{injection}\n{verdict.log}"
        reached += verdict.failed
    assert reached, "no call has failed"


def test_what_is_chosen_is_in_the_table_of_plausible_errors() -> None:
    for (_, phase), chosen in CHOSEN.items():
        assert phase in PHASES
        for words in chosen:
            call, error, when = words.split()
            assert error in ERRORS[call]
            assert when in WHEN
            assert happens(call, error, when)


def judged(*outcomes: How, failed: int = 1, **more: object) -> Verdict:
    verdict = Verdict(failed=failed, outcomes=[Outcome("a", how) for how in outcomes])
    for name, value in more.items():
        setattr(verdict, name, value)
    return verdict


class NoOrigin:
    cut: tuple[str, ...] = ()


@pytest.mark.parametrize(("how", "faults"), [(How.CUT, 1), (How.HANGS, 1), (How.FAILED, 0), (How.SERVED, 0)])
def test_a_client_may_fail_but_neither_hang_nor_take_a_part_for_the_whole(how: How, faults: int) -> None:
    verdict = judged(How.SERVED, how)
    verdict.judge_clients(NoOrigin())  # type: ignore[arg-type]
    assert len(verdict.faults) == faults


def test_a_flood_and_an_end_without_a_word_are_faults() -> None:
    verdict = judged(log="2026-01-01T00:00:00.000Z ERROR gtcpserver: again\n" * 26)
    verdict.judge_log()
    verdict.judge_end(1)
    assert verdict.faults == ["flood: 26 log lines"]
    crashed = judged(log="Traceback (most recent call last):\n  ...\nLoopExit: ERROR\n")
    crashed.judge_end(1)
    assert crashed.faults == ["ended with status 1 and a traceback"]
    silent = judged()
    silent.judge_end(1)
    assert silent.faults == ["ended with status 1 without a line"]


@pytest.mark.slow
def test_the_table_counts_what_became_of_the_injections(tmp_path: Path) -> None:
    injection = Injection("echo", "serve", "accept4", "EMFILE", "1")
    found = [
        (injection, judged(How.SERVED)),
        (injection, judged(How.SERVED, How.FAILED)),
        (injection, judged(How.FAILED, ended=1)),
        (injection, judged(How.CUT, faults=["cut"])),
        (injection, judged(How.SERVED, failed=0)),
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps([report.as_json(*one) for one in found]))
    assert report.read(results) == found
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- injection -->\nold\n<!-- end of injection -->\nb\n")
    report.write(page, report.table(found))
    assert "| echo | serve | 1 | 4 | 1 | 1 | 1 | 1 |" in page.read_text()
    assert "old" not in page.read_text()
