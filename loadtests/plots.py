"""Plots of results, as SVG and PNG, for light and dark pages.

python -m loadtests.plots results.json OUTPUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .measure import BenchError
from .results import Result, load_result

LIGHT = {"ink": "#1f2328", "faint": "#d0d7de", "ours": "#0969da", "others": "#afb8c1", "page": "#ffffff"}
DARK = {"ink": "#e6edf3", "faint": "#30363d", "ours": "#4493f8", "others": "#6e7681", "page": "#0d1117"}


def plot(output: dict[str, Any], base: Path) -> list[Path]:
    """Draw the loads of a run of loadtests.bench; returns the files, of which there are four.

    Raises:
        BenchError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise BenchError("plots need matplotlib: pip install '.[bench]'") from None
    matplotlib.use("Agg")
    results = {item["title"]: load_result(item["runs"]) for item in output["scenarios"].values() if item["runs"]}
    if not results:
        return []
    return [
        _draw(results, colors, base.with_name(f"{base.name}-{style}.{kind}"))
        for style, colors in (("light", LIGHT), ("dark", DARK))
        for kind in ("svg", "png")
    ]


def _draw(results: dict[str, Result], colors: dict[str, str], path: Path) -> Path:
    from matplotlib import pyplot

    columns = 2 if len(results) > 1 else 1
    pairs = [list(results.items())[place : place + columns] for place in range(0, len(results), columns)]
    heights = [max(len(result.runs) for _, result in pair) * 0.26 + 0.75 for pair in pairs]
    with pyplot.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "svg.fonttype": "none",
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
                    _bars(axis, *pair[place], colors)
                else:
                    axis.set_visible(False)
        figure.savefig(path, dpi=130, facecolor=colors["page"])
        pyplot.close(figure)
    return path


def _bars(axis: Any, title: str, result: Result, colors: dict[str, str]) -> None:
    names = sorted(result.runs, key=lambda name: result.median(name, "cpu"), reverse=True)
    figures = [result.median(name, "cpu") for name in names]
    paint = [colors["ours"] if name.startswith("gtcpserver") else colors["others"] for name in names]
    lower, upper = zip(*_ranges(result, names), strict=True)
    axis.barh(names, figures, color=paint, height=0.66, xerr=(lower, upper), ecolor=colors["ink"], error_kw={"lw": 0.7})
    edge = max(figure + more for figure, more in zip(figures, upper, strict=True))
    for place, (figure, more) in enumerate(zip(figures, upper, strict=True)):
        axis.text(figure + more + edge * 0.015, place, f"{figure:.1f}", va="center", fontsize=8)
    axis.set_xlim(0, edge * 1.14)
    axis.set_title(title, fontsize=9.5, loc="left", pad=6)
    axis.set_xlabel("server CPU µs a request (less is better)", fontsize=8)
    axis.set_facecolor(colors["page"])
    axis.xaxis.grid(True, color=colors["faint"], lw=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8.5)
    for side in axis.spines.values():
        side.set_visible(False)


def _ranges(result: Result, names: list[str]) -> Iterator[tuple[float, float]]:
    for name in names:
        figures = [run.cpu for run in result.runs[name]]
        middle = result.median(name, "cpu")
        yield middle - min(figures), max(figures) - middle


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m loadtests.plots RESULTS.json OUTPUT", file=sys.stderr)
        return 2
    try:
        output = json.loads(Path(arguments[0]).read_text())
        for path in plot(output, Path(arguments[1])):
            print(path)
    except BenchError as error:
        print(f"python -m loadtests.plots: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"python -m loadtests.plots: {arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
