"""Results as Markdown."""

from __future__ import annotations

from .results import Result
from .scenarios import Scenario


def table(scenario: Scenario, clients: int, result: Result) -> str:
    """One scenario. "(noise)": in some round the one was better, in some the other."""
    peers = [peer for peer in scenario.against if peer in result.runs]
    test = f" (test {scenario.test} of the Go original)" if scenario.test else ""
    lines = [
        f"### {scenario.named(clients)}{test}",
        "",
        "| server | user | system | CPU us a request | spread | requests/s | limit | p50 ms | p99 ms | p99.9 ms |"
        " errors |" + "".join(f" of {peer} |" for peer in peers),
        "| --- |" + " ---: |" * (10 + len(peers)),
    ]
    for name in sorted(result.runs, key=lambda name: result.median(name, "cpu")):
        figures = [f"{result.median(name, figure):.1f}" for figure in ("user", "system", "cpu")]
        times = [f"{result.median(name, figure):.2f}" for figure in ("p50", "p99", "p999")]
        cells = [
            name,
            *figures,
            f"±{result.spread(name):.0%}",
            f"{result.median(name, 'rate'):,.0f}",
            result.limit(name),
            *times,
            str(result.errors(name)),
            *(str(result.ratio(name, peer)) if peer != name else "" for peer in peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name}: {why}." for name, why in result.failed.items()]
    return "\n".join(lines) + "\n"


def simple_table(title: str, columns: list[str], rows: dict[str, list[float]]) -> str:
    """Figures that are not runs of a load."""
    lines = [f"### {title}", "", f"| server | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | {' | '.join(f'{figure:,.2f}' for figure in figures)} |" for name, figures in rows.items()]
    return "\n".join(lines) + "\n"
