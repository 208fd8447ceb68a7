"""Put results into the documentation: tables between the marks of its pages, and the plots.

All of them go to docs/performance.md, the most important figures to README.md or docs/tour.md.

    python -m loadtests.bench.publish RESULTS.json...

Each is what a benchmark has written: loadtests.bench itself, or transfers, proxies, workers, adapters, monitoring or
options in it. All of them do this by themselves with --publish.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..local_servers import ROOT
from . import sizing
from .measure import BenchError
from .plots import plot
from .results import OURS, Figures, Ratio, Result, facts, load_figures, load_result, significant
from .scenarios import GEVENT, GEVENT_POOL, UVLOOP
from .servers import PURE

PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
TOUR = ROOT / "docs" / "tour.md"
PLOTS = ROOT / "docs" / "plots"

MORE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="plots/bench-more-dark.svg">
  <img alt="The other figures of each server" src="plots/bench-more-light.svg">
</picture>"""

#: Rows of the table in README.md: what it says -> the load, and which of gevent's servers.
FIRST = {
    "keep-alive, 1 kB, 100 connections": ("keepalive/100", GEVENT),
    "the same, with a 30 s idle timeout": ("keepalive-timeout/100", GEVENT),
    "a new connection for each request (gevent with a Pool)": ("new-connection/100", GEVENT_POOL),
    "TLS 1.3, keep-alive": ("tls-keepalive/100", GEVENT),
    "TLS 1.3, a new connection for each request": ("tls-new-connection/100", GEVENT),
}


def publish_all(paths: Iterable[Path]) -> None:
    """Put these results into the pages.

    Raises:
        BenchError: a file cannot be read, or is not what a benchmark writes.
    """
    for path in paths:
        try:
            output = json.loads(path.read_text())
            program = output["program"]
            page = put(PAGE.read_text(), program, of_page(output))
            summary = README if program == "bench" else TOUR
            summed_up = put(summary.read_text(), program, in_short(output)) if program in IN_SHORT else ""
            if program == "bench":
                PLOTS.mkdir(exist_ok=True)
                plot(output, PLOTS / "bench")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} cannot be published: {error!r}") from error
        PAGE.write_text(page)
        print(f"published in {PAGE}", flush=True)
        if summed_up:
            summary.write_text(summed_up)
            print(f"published in {summary}", flush=True)
        if program == "bench" and PAGE == sizing.PERFORMANCE:
            try:
                sizing.put_into_page()
            except (OSError, ValueError) as error:
                raise BenchError(f"{sizing.PAGE} cannot be renewed: {error}") from error
            print(f"published in {sizing.PAGE}", flush=True)


def put(page: str, mark: str, text: str) -> str:
    """The page with this text between the marks. Raises ValueError if it has none."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page has no marks for {mark}")
    return re.sub(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + text.strip() + "\n" + end, page, flags=re.S
    )


def loaded(output: dict[str, Any]) -> dict[str, Result | Figures]:
    """All that a benchmark has found, by name."""
    found: dict[str, Result | Figures] = {name: load_result(item) for name, item in output["scenarios"].items()}
    return found | {name: load_figures(item) for name, item in output["figures"].items()}


def of_page(output: dict[str, Any]) -> str:
    """The machine, and all tables."""
    picture = [MORE] if output["program"] == "bench" else []
    return "\n\n".join([facts(output), *(found.table() for found in loaded(output).values()), *picture])


def in_short(output: dict[str, Any]) -> str:
    found = loaded(output)
    lines = IN_SHORT[output["program"]](found)
    machine = output["machine"]
    what = f"{machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}, gevent {machine['gevent']}"
    if output["program"] == "bench":
        what += f", uvloop {machine['uvloop']}"
    rounds = output["settings"]["rounds"]
    when = f"load average before it {machine['load average']}, {machine['date'][:10]}; medians of {rounds} rounds"
    return "\n".join([*lines, "", f"({what}; {when}.)"])


def _bench(found: dict[str, Result | Figures]) -> list[str]:
    lines = [
        "| CPU µs a request (user + system) | gtcpserver | in pure Python | gevent StreamServer | uvloop Protocol "
        "| of gevent | of uvloop |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, (name, gevent) in FIRST.items():
        result = found[name]
        assert isinstance(result, Result)
        servers = (OURS, PURE, gevent, UVLOOP)
        figures = [significant(result.median(one, "cpu")) if one in result.runs else "" for one in servers]
        ratios = [str(result.ratio(OURS, peer)) for peer in (gevent, UVLOOP)]
        lines.append(f"| {title} | {' | '.join(figures + ratios)} |")
    idle = found["idle"]
    assert isinstance(idle, Figures)
    servers = (OURS, PURE, GEVENT, UVLOOP)
    figures = [significant(idle.median(one)[0]) if one in idle.runs else "" for one in servers]
    ratios = [str(idle.ratio(OURS, peer)) for peer in (GEVENT, UVLOOP)]
    title = idle.title[0].lower() + idle.title[1:]
    return [*lines, f"| {title}, {idle.columns[0]} | {' | '.join(figures + ratios)} |"]


def _transfers(found: dict[str, Result | Figures]) -> list[str]:
    lines = ["| | gtcpserver | peer | of the peer |", "| --- | ---: | ---: | ---: |"]
    for figures in found.values():
        if isinstance(figures, Figures):
            for peer in figures.peers:
                medians = [significant(figures.median(name)[0]) for name in (OURS, peer)]
                what = f"{figures.title}, {figures.columns[0]}: {peer}"
                lines.append(f"| {what} | {' | '.join(medians)} | {figures.ratio(OURS, peer)} |")
    return lines


def _proxies(found: dict[str, Result | Figures]) -> list[str]:
    tables = [figures for figures in found.values() if isinstance(figures, Figures)]
    titles = [f"{figures.title}, {figures.columns[0]}" for figures in tables]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(tables)]
    for name in dict.fromkeys(name for figures in tables for name in figures.runs):
        cells = [significant(figures.median(name)[0]) if name in figures.runs else "" for figures in tables]
        lines.append(f"| {f'**{name}**' if name == OURS else name} | {' | '.join(cells)} |")
    return lines


def several_against_one(figures: Figures) -> str:
    """What N workers are to one: a sentence on the figures of loadtests.bench.workers."""
    one, several = figures.runs
    pairs = list(zip(figures.runs[several], figures.runs[one], strict=True))
    rate, cpu = (Ratio.of(n[column] / one[column] for n, one in pairs) for column in (0, 1))
    return f"{several.partition(', ')[2]} serve {rate} times the requests of one, at {cpu} of its CPU a request."


def _workers(found: dict[str, Result | Figures]) -> list[str]:
    figures = found["workers"]
    assert isinstance(figures, Figures)
    client = figures.median(list(figures.runs)[-1])[2]
    work = f"a handler that computes for 0.15 ms, so that the load generator had {client:.0%} of the CPUs"
    return [f"{several_against_one(figures)} ({work[0].upper()}{work[1:]}: `python -m loadtests.bench.workers`.)"]


#: Program -> what of it is in README.md, or in docs/tour.md.
IN_SHORT = {"bench": _bench, "transfers": _transfers, "proxies": _proxies, "workers": _workers}


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python -m loadtests.bench.publish RESULTS.json...", file=sys.stderr)
        return 2
    try:
        publish_all(map(Path, arguments))
    except BenchError as problem:
        print(f"python -m loadtests.bench.publish: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
