"""How loadtests is built: four rooms that do not know each other, and modules that do not import in a circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from kit.paths import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("loadtests/**/*.py")
}
ROOMS = ("loadtests.bench", "loadtests.handover", "loadtests.load", "loadtests.soak")


def imported(name):
    """The modules of loadtests that this one imports, those within functions included."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found & MODULES.keys() - {name}


def room_of(name):
    return next((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), "")


def test_no_module_imports_itself_through_others():
    order = list(TopologicalSorter({name: imported(name) for name in MODULES}).static_order())
    assert order.index("loadtests.bench.publish") < order.index("loadtests.bench.workers")


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_a_room_imports_itself_and_what_is_shared(room):
    inside = [name for name in MODULES if room_of(name) == room]
    assert len(inside) > 2
    assert {room_of(other) for name in inside for other in imported(name)} <= {room, ""}
