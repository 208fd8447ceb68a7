"""Draw the pictures of docs/architecture.md, and write its tables of states, from the code.

    .venv/bin/python docs/pictures.py          # after imports between rooms, or tables of states, have changed

tests/docs/test_architecture.py fails where a picture or table is out of date. The pictures are SVG, in colours for
light and for dark pages; nothing but Python is needed to draw them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "gtcpserver"
FOLDER = DOCS / "pictures"
PAGE = DOCS / "architecture.md"

#: Modules at the bottom that everything may import: one box together.
GROUND = (
    "address",
    "c",
    "callables",
    "checks",
    "errors",
    "linux",
    "networks",
    "plural",
    "signatures",
    "strict_json",
)

#: What is not part of the picture: the public face, and the version.
FACE = ("__init__", "__main__", "_build", "_compiled", "_version")

#: Modules that are one room with another.
TOGETHER = {"run_log": "run"}

#: Where each room stands from left to right; its floor follows from what it imports.
PLACES = {
    "cli": 0.6,
    "run": 3.4,
    "supervisor": 3.4,
    "monitoring": 3.4,
    "proxy": 1.1,
    "testing": 2.2,
    "adapters": 3.4,
    "handover": 4.6,
    "server": 2.2,
    "static_files": -0.9,
    "forwarder": 0.1,
    "admission": 2.2,
    "coroutines": 3.4,
    "connection": 1.5,
    "transfer": 0.9,
    "tls": 2.1,
    "store": 3.3,
    "proxy_protocol": 0.3,
    "diagnostics": 1.5,
    "shared": 3.9,
    "files": 2.6,
    "listening": 3.7,
    "pool": 4.8,
    "http1": -0.9,
    "framing": 1.45,
    "process": 2.6,
    "ground": 1.5,
}


# -- what imports what -------------------------------------------------------------------------------------------------


def room_of(name: str) -> str | None:
    """Return the room of a module, "gtcpserver.server.acceptor" for example; None for what is left out."""
    parts = name.split(".")
    if parts[0] != "gtcpserver" or len(parts) < 2 or parts[1] in FACE:
        return None
    return "ground" if parts[1] in GROUND else TOGETHER.get(parts[1], parts[1])


@cache
def imports() -> dict[str, set[str]]:
    """Return the rooms, and the other rooms that each imports at run time, functions included."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("gtcpserver", *path.relative_to(PACKAGE).with_suffix("").parts)
        room = room_of(".".join(parts))
        if room is None:
            continue
        others = found.setdefault(room, set())
        for name in _imported(ast.parse(path.read_text()), parts[:-1]):
            other = room_of(name)
            if other is not None and other != room:
                others.add(other)
    return found


def _imported(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _imported(other, package)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = ".".join(package[: len(package) - child.level + 1]) if child.level else ""
            module = ".".join(filter(None, (base, child.module)))
            # A name may be a module: `from gtcpserver.files import lent`.
            yield from (f"{module}.{alias.name}" for alias in child.names)
        else:
            yield from _imported(child, package)


def below(room: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return all that a room imports, by way of others too."""
    found: set[str] = set()
    rest = list(graph.get(room, ()))
    while rest:
        other = rest.pop()
        if other not in found:
            found.add(other)
            rest += graph.get(other, ())
    return found


def arrows(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others: with a to b and b to c, an import of c by a is left out."""
    far = {room: below(room, graph) for room in graph}
    return sorted(
        (room, other)
        for room, others in graph.items()
        for other in others
        if not any(other in far[third] for third in others)
    )


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the floor of each room: one above the highest that it imports."""
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max(map(floor, graph.get(room, ())), default=-1)
        return found[room]

    for room in graph:
        floor(room)
    return found


# -- the tables of states ----------------------------------------------------------------------------------------------

Changes = Mapping[Any, str]  # by pairs of states, each table by those of another Enum


def lives() -> dict[str, Changes]:
    """Return the tables of states by the name of their picture."""
    from gtcpserver.server.state import STATE_CHANGES
    from gtcpserver.supervisor.master import MASTER_CHANGES
    from gtcpserver.supervisor.reload import RELOAD_CHANGES
    from gtcpserver.supervisor.slots import WORKER_CHANGES
    from gtcpserver.supervisor.upgrade import UPGRADE_CHANGES

    return {
        "server": STATE_CHANGES,
        "worker": WORKER_CHANGES,
        "master": MASTER_CHANGES,
        "reload": RELOAD_CHANGES,
        "upgrade": UPGRADE_CHANGES,
    }


def table_of(changes: Changes) -> str:
    """Return a table of states in Markdown."""
    rows = ["| from | to | when |", "| --- | --- | --- |"]
    rows += [f"| {before.value} | {after.value} | {why} |" for (before, after), why in changes.items()]
    return "\n".join(rows) + "\n"


# -- drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours:
    """Of one theme."""

    box: str
    edge: str
    text: str
    line: str
    strong: str
    page: str


THEMES = {
    "light": Colours(box="#eef3fc", edge="#2a6fdb", text="#1b1f24", line="#7d8590", strong="#d9e6fb", page="#ffffff"),
    "dark": Colours(box="#1c2636", edge="#6ea3f5", text="#e6edf3", line="#8b949e", strong="#25395a", page="#131416"),
}

FONT = "font-family='system-ui, sans-serif'"


@dataclass
class Drawing:
    """An SVG picture."""

    width: float
    height: float
    title: str
    colours: Colours
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, text: str, strong: bool = False) -> None:
        """A box with text in its middle, which is at x, y."""
        fill = self.colours.strong if strong else self.colours.box
        self.parts.append(
            f"<rect x='{x - width / 2:.0f}' y='{y - height / 2:.0f}' width='{width:.0f}' height='{height:.0f}' rx='6' "
            f"fill='{fill}' stroke='{self.colours.edge}'/>"
        )
        self.parts.append(self._text(x, y + 4, text, 13))

    def text(self, x: float, y: float, text: str) -> None:
        """Text with its middle at x; a halo keeps lines out of its letters."""
        halo = f"paint-order='stroke' stroke='{self.colours.page}' stroke-width='3' stroke-linejoin='round'"
        self.parts.append(self._text(x, y, text, 11, halo))

    def _text(self, x: float, y: float, text: str, size: int, more: str = "") -> str:
        return (
            f"<text x='{x:.0f}' y='{y:.0f}' text-anchor='middle' font-size='{size}' {FONT} "
            f"fill='{self.colours.text}' {more}>{escape(text)}</text>"
        )

    def path(self, way: str) -> None:
        self.parts.append(f"<path d='{way}' fill='none' stroke='{self.colours.line}' marker-end='url(#tip)'/>")

    def svg(self) -> str:
        head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width:.0f} {self.height:.0f}' role='img'>\n"
            f"<title>{escape(self.title)}</title>\n"
            "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' "
            f"orient='auto'><path d='M0 0 8 4 0 8Z' fill='{self.colours.line}'/></marker></defs>\n"
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


COLUMN, FLOOR, BOX = 132.0, 66.0, 30.0


def draw_rooms(colours: Colours) -> str:
    graph = imports()
    floor = floors(graph)
    unknown = sorted(set(graph) - set(PLACES))
    if unknown:
        raise SystemExit(f"docs/pictures.py: PLACES does not say where to draw {', '.join(unknown)}")
    left, top = min(PLACES.values()), max(floor.values())
    width = (max(PLACES.values()) - left + 1) * COLUMN
    drawing = Drawing(width, (top + 1) * FLOOR, "The rooms of gtcpserver, and what each imports", colours)
    where = {room: ((PLACES[room] - left + 0.5) * COLUMN, (top - floor[room] + 0.5) * FLOOR) for room in sorted(graph)}
    for room, other in arrows(graph):
        (x, y), (to_x, to_y) = where[room], where[other]
        y, to_y = y + BOX / 2, to_y - BOX / 2
        bend = min(40.0, (to_y - y) / 2)
        drawing.path(f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}")
    for room, (x, y) in where.items():
        text = "address, checks, errors, ..." if room == "ground" else room
        drawing.box(x, y, 190.0 if room == "ground" else 110, BOX, text, strong=room in ("server", "connection"))
    return drawing.svg()


STEP, STATE, ARC = 190.0, 104.0, 46.0  # pixels from state to state, of a state's box, and between two arcs


def draw_life(whose: str, changes: Changes, colours: Colours) -> str:
    states = [state for state in type(next(iter(changes))[0]) if any(state in change for change in changes)]
    place = {state: index for index, state in enumerate(states)}
    # Arcs over the row for changes that leave states out, under it for those that go back; the longest are outermost.
    over = sorted((c for c in changes if place[c[1]] - place[c[0]] > 1), key=lambda c: place[c[1]] - place[c[0]])
    under = sorted((c for c in changes if place[c[1]] <= place[c[0]]), key=lambda c: place[c[0]] - place[c[1]])
    row = 40.0 + ARC * len(over)
    drawing = Drawing(STEP * len(states), row + 40 + ARC * len(under), f"The states of {whose}", colours)
    middle = {state: STEP * (place[state] + 0.5) for state in states}
    labels = []
    for arcs, sign in ((over, -1), (under, 1)):
        for rank, change in enumerate(arcs):
            # Outer arcs begin and end farther outside, so that none lies on another.
            x = middle[change[0]] - sign * (30 - 12 * rank)
            to_x = middle[change[1]] + sign * (30 - 12 * rank)
            edge, y = row + sign * BOX / 2, row + sign * (BOX / 2 + ARC * (rank + 1) - 14)
            drawing.path(f"M{x:.0f} {edge:.0f}V{y:.0f}H{to_x:.0f}V{edge:.0f}")
            labels.append(((x + to_x) / 2, y - 5 if sign < 0 else y + 14, short(changes[change])))
    for change, why in changes.items():
        if change not in over and change not in under:
            x, to_x = middle[change[0]] + STATE / 2, middle[change[1]] - STATE / 2
            drawing.path(f"M{x:.0f} {row:.0f}H{to_x:.0f}")
            first, *rest = wrap(short(why), 14)
            labels += [((x + to_x) / 2, row - 5 + 20 * number, line) for number, line in enumerate([first, *rest])]
    for label in labels:
        drawing.text(*label)
    for state in states:
        drawing.box(middle[state], row, STATE, BOX, state.value, strong=state is states[0])
    return drawing.svg()


def short(text: str) -> str:
    """Return the words before the first comma, semicolon or colon."""
    return re.split(r"[,;:]", text)[0].replace("`", "")


def pictures() -> dict[Path, str]:
    """Return the file of each picture, and what is to be in it."""
    found = {}
    for theme, colours in THEMES.items():
        found[FOLDER / f"rooms-{theme}.svg"] = draw_rooms(colours)
        for name, changes in lives().items():
            found[FOLDER / f"{name}-{theme}.svg"] = draw_life(
                "an upgrade" if name == "upgrade" else f"a {name}", changes, colours
            )
    return found


def page(text: str) -> str:
    """Return the page with its tables of states as the code has them."""
    for name, changes in lives().items():
        begin, end = f"<!-- states: {name} -->\n", "<!-- end of states -->"
        if text.count(begin) != 1:
            raise SystemExit(f"docs/architecture.md must have {begin.strip()} once, found {text.count(begin)}")
        before, after = text.split(begin)
        text = before + begin + table_of(changes) + after[after.index(end) :]
    return text


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for path, svg in pictures().items():
        path.write_text(svg)
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
