"""``python -m injection``: inject every plausible error, and print what became of it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import calls, report
from .phases import PHASES, Bench, Injection, Verdict, opened
from .strace import can_trace


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.results:
        found = [one for path in options.results for one in report.read(path)]
        return _publish(found, options)
    if not can_trace():
        print("python -m injection: strace is missing or may not trace", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # the servers are ended, too
    with tempfile.TemporaryDirectory(prefix="injection") as name, opened(Path(name)) as bench:
        found = _run(bench, options)
    return _publish(found, options)


def _publish(found: list[tuple[Injection, Verdict]], options: argparse.Namespace) -> int:
    table = report.table(found)
    print(table)
    if options.write:
        report.write(options.write, table)
    return 1 if any(verdict.faults for _, verdict in found) else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m injection", description=__doc__)
    parser.add_argument(
        "--subject", action="append", help="echo, TLS, forward, files, proxy, master, worker; default: all"
    )
    parser.add_argument("--phase", action="append", choices=PHASES, help="default: all")
    parser.add_argument("--call", action="append", help="system call; default: all that the phase makes")
    parser.add_argument("--error", action="append", help="errno, such as ENOMEM; default: all that are plausible")
    parser.add_argument("--when", action="append", help=f"of {', '.join(calls.WHEN)}, or as in strace(1); default: all")
    parser.add_argument("--quiet", action="store_true", help="only faults are printed")
    parser.add_argument("--json", type=Path, help="write every verdict to this file")
    parser.add_argument("--results", type=Path, nargs="+", help="inject nothing: the table of what --json has written")
    parser.add_argument("--write", type=Path, help="write the table into this page, between its markers")
    return parser.parse_args(arguments)


def _run(bench: Bench, options: argparse.Namespace) -> list[tuple[Injection, Verdict]]:
    found = []
    for name in options.subject or bench.subjects:
        for phase in options.phase or PHASES:
            counted = bench.calls(bench.subjects[name], phase)
            print(f"-- {name} {phase}: {' '.join(f'{call}={n}' for call, n in sorted(counted.items()))}", flush=True)
            for injection in _injections(name, phase, counted, options):
                found.append((injection, bench.run_twice(injection)))
                _tell(*found[-1], options.quiet)
            if options.json:  # after each phase: what an hour has found is not lost with the run
                options.json.write_text(json.dumps([report.as_json(*one) for one in found], indent=1) + "\n")
        bench.drop()
    return found


def _injections(name: str, phase: str, counted: dict[str, int], options: argparse.Namespace) -> Iterator[Injection]:
    for call in options.call or sorted(counted.keys() & calls.ERRORS.keys()):
        if phase == "start" and call in calls.OF_THE_INTERPRETER and not options.call:
            continue
        for error in options.error or calls.ERRORS[call]:
            for when in options.when or calls.WHEN:
                if calls.happens(call, error, when) and int(when.rstrip("+").partition(".")[0]) <= counted.get(call, 0):
                    yield Injection(name, phase, call, error, when)


def _tell(injection: Injection, verdict: Verdict, quiet: bool) -> None:
    if quiet and not verdict.faults:
        return
    what = "; ".join(verdict.faults) or ", ".join(str(one) for one in verdict.outcomes if one.how.name != "SERVED")
    traceback = " [traceback]" if "Traceback" in verdict.log else ""
    end = f" status {verdict.ended}" if verdict.ended is not None else ""
    print(
        f"{time.strftime('%H:%M:%S')} {verdict.kind:11} {injection} x{verdict.failed}{end} {what}{traceback}",
        flush=True,
    )
    if verdict.faults or traceback:
        print("    " + "\n    ".join(verdict.log.strip().splitlines()[-25:]), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
