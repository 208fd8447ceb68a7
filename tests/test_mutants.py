"""The list of mutants fits the code it is about, and the program that plants them tells which of them the tests see."""

import ast
import re
import subprocess
import sys

import pytest

import mutants
from kit.paths import ROOT
from mutants import ListError, Mutant, choose, read_list

LISTED = read_list()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", LISTED, ids=[one.name for one in LISTED])
def test_each_mutant_fits_its_file_once_and_its_tests_are_there(mutant):
    source = (ROOT / "gtcpserver" / mutant.file).read_text()
    changed = mutant.apply(source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    for test in mutant.tests:
        file, _, function = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^def {function.partition('[')[0]}\(", text, re.MULTILINE), test


def make(old, new):
    return Mutant("example", "file.py", old, new, "harm", ("test_x.py",))


@pytest.mark.parametrize(
    "source",
    [
        "if ready and call(one, two):\n    go()\n",
        "    if (ready and call(one, two)):\n        go()\n",
        "if ready and call(\n    one,\n    two,\n):\n    go()\n",
    ],
)
def test_a_mutant_fits_however_the_source_is_wrapped(source):
    changed = make("ready and call(one, two)", "True").apply(source)
    assert changed.lstrip().startswith("if True" if "(ready" not in source else "if (True)")


def test_lines_of_a_mutant_are_indented_as_what_they_replace():
    changed = make("one = 1", "if True:\n    one = 2").apply("def f():\n    one = 1\n    return one\n")
    assert changed == "def f():\n    if True:\n        one = 2\n    return one\n"


@pytest.mark.parametrize(("source", "count"), [("nothing\n", 0), ("taken -= 1\ntaken -= 1\n", 2), ("mistaken -= 1", 0)])
def test_a_mutant_that_does_not_fit_once_is_an_error(source, count):
    with pytest.raises(ListError, match=f"it is there {count} times"):
        make("taken -= 1", "pass").apply(source)


def test_mutants_are_chosen_by_name_and_pattern():
    chosen = choose(LISTED, ["pool-*", "pool-late-kill", "linger-unbounded"])
    assert chosen[-1].name == "linger-unbounded"
    assert len(chosen) == 1 + sum(one.name.startswith("pool-") for one in LISTED)
    with pytest.raises(ListError, match="no mutant is called 'pol-'"):
        choose(LISTED, ["pol-"])


@pytest.mark.slow
def test_seen_and_survived_are_told_and_the_checkout_stays_as_it_is(tmp_path, monkeypatch, capsys):
    one_test = "test_networks.py"
    before = (ROOT / "gtcpserver/networks.py").read_bytes()
    (tmp_path / "list.toml").write_text(
        f"""
        [seen]
        file = "networks.py"
        old = "from __future__ import annotations"
        new = "raise SystemExit"
        harm = "nothing works"
        tests = ["{one_test}"]

        [not-seen]
        file = "networks.py"
        old = "from __future__ import annotations"
        new = "from __future__ import annotations, generators"
        harm = "none"
        tests = ["{one_test}"]
        """
    )
    monkeypatch.setattr(mutants, "LIST", tmp_path / "list.toml")
    monkeypatch.setattr(sys, "argv", ["mutants", "--unchecked", "-j", "1"])
    assert mutants.main() == 1
    printed = capsys.readouterr().out
    assert re.search(r"^seen +seen ", printed, re.MULTILINE)
    assert re.search(r"^SURVIVED not-seen ", printed, re.MULTILINE)
    assert "1 of 2 mutants were seen" in printed
    assert "survived: not-seen (networks.py): none" in printed
    assert (ROOT / "gtcpserver/networks.py").read_bytes() == before


def test_a_wrong_call_is_one_line_and_status_2():
    command = [sys.executable, ROOT / "tests/mutants.py", "no-such-mutant"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "no mutant is called 'no-such-mutant'\n")
