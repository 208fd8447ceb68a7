"""Pass criteria for locust: ``--fail-ratio``, ``--max-p99`` and ``--min-requests`` decide about the exit status.

Import this module in a locustfile; it needs locust alone. Without one of the options, locust decides: 1 after any
failure.
"""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import gevent
from locust import events
from locust.runners import WorkerRunner

log = logging.getLogger("pass_criteria")


def ratio(text: str) -> float:
    """ "0.01" or "1%"."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must be a share such as 0.01 or "1%", got {text!r}')
    return value


def milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be milliseconds, more than 0, got {text!r}")
    return value


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of requests, 0 or more, got {text!r}")
    return int(text)


@events.init.add_listener
def look_at_the_clock(environment: Any, **_: Any) -> None:
    """The event loop's idea of the time is as old as its last turn, before all the imports: without this, locust's
    ``--run-time`` begins back then, and a short run may end before its first request."""
    gevent.get_hub().loop.update_now()


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument(
        "--fail-ratio",
        type=ratio,
        metavar="SHARE",
        env_var="LOCUST_FAIL_RATIO",
        include_in_web_ui=False,
        help='Exit status 1 when more requests fail, as a share of all: 0.01 or "1%%"',
    )
    parser.add_argument(
        "--max-p99",
        type=milliseconds,
        metavar="MS",
        env_var="LOCUST_MAX_P99",
        include_in_web_ui=False,
        help="Exit status 1 when the 99th percentile of the response time of a name is longer, in milliseconds",
    )
    parser.add_argument(
        "--min-requests",
        type=count,
        metavar="N",
        env_var="LOCUST_MIN_REQUESTS",
        include_in_web_ui=False,
        help="Exit status 1 after fewer requests. Default: 1, where one of these options is given",
    )


def judge(stats: Any, fail_ratio: float | None, max_p99: float | None, min_requests: int | None) -> list[str]:
    """What of the criteria is not met, a line each.

    Args:
        stats: locust's RequestStats. It rounds response times: to whole milliseconds, from 100 ms to two digits.
        fail_ratio: 0 to 1; None: no failure, but in what is judged here.
        max_p99: milliseconds.
        min_requests: None: 1.
    """
    total = stats.total
    faults = []
    if total.num_requests < max(1, min_requests or 0):
        faults.append(f"{total.num_requests} requests, expected at least {max(1, min_requests or 0)}")
    if total.fail_ratio > (fail_ratio or 0):
        faults.append(
            f"{total.num_failures} of {total.num_requests} requests failed, {total.fail_ratio:.2%}; "
            f"allowed: {fail_ratio or 0:.2%}"
        )
    if max_p99 is not None:
        for entry in stats.entries.values():
            p99 = entry.get_response_time_percentile(0.99)
            if p99 > max_p99:
                faults.append(f"99 % of {entry.method} {entry.name} within {p99} ms, allowed: {max_p99:g} ms")
    return faults


@events.quitting.add_listener
def set_exit_status(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    given = (options.fail_ratio, options.max_p99, options.min_requests)
    if isinstance(environment.runner, WorkerRunner) or given == (None, None, None):
        return
    faults = judge(environment.stats, *given)
    if environment.runner.exceptions:
        faults.append(f"{len(environment.runner.exceptions)} kinds of exceptions in the tasks themselves")
    for fault in faults:
        log.error("not passed: %s", fault)
    if not faults:
        total = environment.stats.total
        log.info("passed: %d requests, %.2f %% failed", total.num_requests, total.fail_ratio * 100)
    environment.process_exit_code = 1 if faults else 0
