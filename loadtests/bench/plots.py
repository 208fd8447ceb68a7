"""Plots of results, as SVG and PNG, for light and dark pages.

python -m loadtests.bench.plots results.json OUTPUT
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import BenchError
from .results import Figures, Result, load_figures, load_result, significant

LIGHT = {"ink": "#1f2328", "faint": "#d0d7de", "ours": "#0969da", "others": "#afb8c1", "page": "#ffffff"}
KINDS = ("svg", "png")
DARK = {"ink": "#e6edf3", "faint": "#30363d", "ours": "#4493f8", "others": "#6e7681", "page": "#0d1117"}


@dataclass(frozen=True)
class Bars:
    """One plot: a series of figures, one a round, of each server."""

    title: str
    unit: str
    series: dict[str, list[float]]

    @classmethod
    def of(cls, found: Result | Figures) -> Bars:
        if isinstance(found, Result):
            series = {name: found.figures(name, "cpu") for name in found.runs}
            return cls(found.title, "server CPU µs a request (less is better)", series)
        better = "more" if found.more_is_better else "less"
        unit = f"{found.columns[0]} ({better} is better)"
        return cls(found.title, unit, {name: found.first(name) for name in found.runs})


def plot(output: dict[str, Any], base: Path) -> list[Path]:
    """Draw what a benchmark has found: the tests of the Go original, each with the most clients, and all else.

    Returns:
        the files: BASE-light.svg, BASE-dark.svg and the same as PNG; and those of BASE-more.

    Raises:
        BenchError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchError("plots need matplotlib: pip install '.[bench]'") from None
    matplotlib.use("Agg")
    found = {name: load_result(item) for name, item in output["scenarios"].items()}
    of_tests: dict[str, str] = {}
    for name, result in found.items():
        if number := re.search(r"\(test ([\d.]+) of", result.title):
            of_tests[number[1]] = name  # those with more clients are the later ones
    tests = [Bars.of(found[of_tests[number]]) for number in sorted(of_tests)]
    rest = [Bars.of(result) for name, result in found.items() if name not in of_tests.values()]
    rest += [Bars.of(load_figures(item)) for item in output["figures"].values()]
    files = []
    for bars, suffix in ((tests, ""), (rest, "-more")):
        drawn = [each for each in bars if each.series]
        for style, colors in (("light", LIGHT), ("dark", DARK)) if drawn else ():
            files += _draw(drawn, colors, [base.with_name(f"{base.name}{suffix}-{style}.{kind}") for kind in KINDS])
    return files


def _draw(bars: list[Bars], colors: dict[str, str], paths: list[Path]) -> list[Path]:
    from matplotlib import pyplot

    columns = 2 if len(bars) > 1 else 1
    pairs = [bars[place : place + columns] for place in range(0, len(bars), columns)]
    heights = [max(len(each.series) for each in pair) * 0.26 + 0.95 for pair in pairs]
    with pyplot.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "svg.fonttype": "path",  # who looks at it may lack the font
            "svg.hashsalt": "gtcpserver",
            "text.color": colors["ink"],
            "axes.labelcolor": colors["ink"],
            "xtick.color": colors["ink"],
            "ytick.color": colors["ink"],
        }
    ):
        figure, axes = pyplot.subplots(
            len(pairs),
            columns,
            figsize=(5.4 * columns, sum(heights)),
            squeeze=False,
            gridspec_kw={"height_ratios": heights},
            layout="constrained",
            facecolor=colors["page"],
        )
        for line, pair in zip(axes, pairs, strict=True):
            for place, axis in enumerate(line):
                if place < len(pair):
                    _bars(axis, pair[place], colors)
                else:
                    axis.set_visible(False)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None  # the same figures, the same file
            figure.savefig(path, dpi=130, facecolor=colors["page"], metadata=metadata)
            figure.set_layout_engine("none")  # once is enough
        pyplot.close(figure)
    return paths


def _bars(axis: Any, bars: Bars, colors: dict[str, str]) -> None:
    middle = {name: statistics.median(series) for name, series in bars.series.items()}
    names = sorted(middle, key=lambda name: middle[name], reverse=True)
    figures = [middle[name] for name in names]
    paint = [colors["ours"] if name.startswith("gtcpserver") else colors["others"] for name in names]
    lower, upper = zip(*_ranges(bars, names), strict=True)
    axis.barh(names, figures, color=paint, height=0.66, xerr=(lower, upper), ecolor=colors["ink"], error_kw={"lw": 0.7})
    edge = max(figure + more for figure, more in zip(figures, upper, strict=True))
    for place, (figure, more) in enumerate(zip(figures, upper, strict=True)):
        axis.text(figure + more + edge * 0.015, place, significant(figure), va="center", fontsize=8)
    axis.set_xlim(0, edge * 1.14)
    what, _, which = bars.title.rstrip(")").partition(" (")  # in two lines: it would not fit into one
    title = "\n".join([*textwrap.wrap(what, 56), *([which] if which else [])])
    axis.set_title(title, fontsize=9.5, loc="left", pad=6)
    axis.set_xlabel(bars.unit, fontsize=8)
    axis.set_facecolor(colors["page"])
    axis.xaxis.grid(True, color=colors["faint"], lw=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8.5)
    for side in axis.spines.values():
        side.set_visible(False)


def _ranges(bars: Bars, names: list[str]) -> Iterator[tuple[float, float]]:
    for name in names:
        figures = bars.series[name]
        middle = statistics.median(figures)
        yield middle - min(figures), max(figures) - middle


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m loadtests.bench.plots RESULTS.json OUTPUT", file=sys.stderr)
        return 2
    try:
        output = json.loads(Path(arguments[0]).read_text())
        for path in plot(output, Path(arguments[1])):
            print(path)
    except BenchError as error:
        print(f"python -m loadtests.bench.plots: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"python -m loadtests.bench.plots: {arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
