"""docs/architecture.md is true: its rooms, pictures, tables of states, paths and words are those of the code."""

import importlib.util
import re
import sys

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from gtcpserver import Server
from gtcpserver.server.state import STATE_CHANGES, ServerState, State
from gtcpserver.supervisor.master import MASTER_CHANGES, Master, MasterState
from gtcpserver.supervisor.reload import RELOAD_CHANGES, Reload, ReloadStage
from gtcpserver.supervisor.slots import WORKER_CHANGES, WorkerProcess, WorkerState
from gtcpserver.supervisor.upgrade import UPGRADE_CHANGES, Upgrade, UpgradeStage
from kit.forms import pure_only
from kit.paths import ROOT

PAGE = ROOT / "docs" / "architecture.md"
AGAIN = "out of date: run .venv/bin/python docs/pictures.py"

#: Words that begin a path on the page, and the folder that they are in.
FOLDERS = ("", "gtcpserver", "docs")


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = sys.modules["pictures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pictures"]


def section(begin, end):
    return re.search(rf"<!-- {begin} -->\n(.*?)<!-- {end} -->", PAGE.read_text(), re.DOTALL)[1]


# -- the rooms ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_room_once():
    rows = [row.split("|")[1] for row in section("rooms", "end of rooms").splitlines()[2:]]
    named = sorted(name for row in rows for name in re.findall(r"`(\w+)`", row))
    package = ROOT / "gtcpserver"
    there = {path.parent.name if path.parent != package else path.stem for path in package.glob("**/*.py")}
    assert named == sorted(there - {"__init__", "__main__", "_build", "_compiled", "_version", "gtcpserver"})


@pytest.mark.slow
def test_a_room_is_above_all_that_it_imports(pictures):
    graph = pictures.imports()
    assert "connection" in graph["server"]
    assert "server" not in graph["connection"]  # but for type checkers
    floors = pictures.floors(graph)
    assert all(floors[room] > floors[other] for room, others in graph.items() for other in others)


def test_arrows_and_what_follows_from_them_are_the_imports(pictures):
    assert pictures.arrows({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == [("a", "b"), ("b", "c")]
    graph = pictures.imports()
    drawn = {room: {other for one, other in pictures.arrows(graph) if one == room} for room in graph}
    assert all(pictures.below(room, drawn) == pictures.below(room, graph) for room in graph)


def test_the_pictures_are_those_of_the_code(pictures):
    wanted = pictures.pictures()
    assert sorted(pictures.FOLDER.iterdir()) == sorted(wanted), AGAIN
    for path, svg in wanted.items():
        assert path.read_text() == svg, f"{path.name} is {AGAIN}"


def test_each_picture_is_on_the_page_in_both_colours(pictures):
    shown = re.findall(r'(?:src|srcset)="pictures/([^"]+)"', PAGE.read_text())
    assert sorted(shown) == sorted(path.name for path in pictures.pictures())


# -- the states --------------------------------------------------------------------------------------------------------


def test_the_tables_of_states_are_those_of_the_code(pictures):
    assert PAGE.read_text() == pictures.page(PAGE.read_text()), AGAIN


@pytest.fixture
def watched(monkeypatch):
    """`watched(cls, name)`: the changes of an attribute of all objects of the class, from now on."""

    def watch(cls, name):
        changes = []
        set_attribute = cls.__setattr__

        def note(self, key, value):
            if key == name and name in vars(self) and vars(self)[name] is not value:
                changes.append((vars(self)[name], value))
            set_attribute(self, key, value)

        monkeypatch.setattr(cls, "__setattr__", note)
        return changes

    return watch


@pure_only
def test_a_server_changes_its_state_as_the_table_says(watched, monkeypatch):
    changes = watched(ServerState, "now")

    def server():
        return Server("127.0.0.1:0", lambda conn: None)

    served = server()
    served.start()
    served.stop(1)
    halted = server()
    halted.start()
    halted.halt()
    server().stop()
    failing = server()
    monkeypatch.setattr("gtcpserver.server.server.Acceptor.start", lambda self: [][0])
    with pytest.raises(IndexError):
        failing.start()  # it stays as it was
    failing.stop()
    # Of a forked child the tests of forks tell: see tests/process.
    in_child = {(State.SERVING, State.STOPPED)}
    assert set(changes) == STATE_CHANGES.keys() - in_child


@pytest.mark.slow
def test_masters_and_workers_change_their_states_as_the_tables_say(watched):
    """In the simulated system, by random schedules."""
    from supervisor.test_schedules import Schedules

    tables = {
        (Master, "state"): MASTER_CHANGES,
        (WorkerProcess, "state"): WORKER_CHANGES,
        (Reload, "stage"): RELOAD_CHANGES,
        (Upgrade, "stage"): UPGRADE_CHANGES,
    }
    seen = {thing: watched(*thing) for thing in tables}
    few = settings(max_examples=25, stateful_step_count=20, phases=[Phase.generate])
    run_state_machine_as_test(Schedules, settings=few)
    for thing, table in tables.items():
        assert set(seen[thing]) <= table.keys(), thing


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        (STATE_CHANGES, State),
        (MASTER_CHANGES, MasterState),
        (WORKER_CHANGES, WorkerState),
        (RELOAD_CHANGES, ReloadStage),
        (UPGRADE_CHANGES, UpgradeStage),
    ],
)
def test_a_table_has_every_state(changes, states):
    assert {state for change in changes for state in change} == set(states)


# -- paths and words ---------------------------------------------------------------------------------------------------


def test_paths_on_the_page_exist():
    text = PAGE.read_text()
    paths = set(re.findall(r"(?:\w+/)+\w+(?:\.\w+)?|\.importlinter", re.sub(r"\(.*?\)|https?:\S+", "", text)))
    paths = {path for path in paths if path.endswith((".py", ".md")) or path.startswith(("tests/", "."))}
    assert len(paths) > 20
    missing = [path for path in sorted(paths) if not any((ROOT / folder / path).exists() for folder in FOLDERS)]
    assert not missing


def test_the_glossary_is_sorted_and_defines_each_word_once():
    glossary = re.search(r"## Glossary\n.*?(\n\| word .*?)\n\n", PAGE.read_text(), re.DOTALL)[1]
    words = [row.split("|")[1].strip() for row in glossary.strip().splitlines()[2:]]
    assert words == sorted(set(words), key=str.lower)
