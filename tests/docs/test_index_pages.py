"""Index pages say what is behind each link, and each example has a page."""

import re

import pytest

from kit.paths import ROOT

TOCTREE = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)
PAGES = sorted(path for path in ROOT.glob("docs/**/*.md") if "_build" not in path.parts)
INDEXES = [path for path in PAGES if TOCTREE.search(path.read_text())]


def entries(text):
    lines = [line for tree in TOCTREE.findall(text) for line in tree.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


@pytest.mark.parametrize("path", INDEXES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_of_an_index_has_a_sentence(path):
    text = path.read_text()
    assert ":hidden:" in text, "Sphinx would list the pages once more, without a word"
    for entry in entries(text):
        assert re.search(rf"^- \[[^\]]+\]\({entry}\.md\).*: .{{9,}}\.$", text, re.MULTILINE), f"{path.name}: {entry}"


def test_each_example_has_a_page():
    text = "".join(path.read_text() for path in PAGES)
    shown = re.findall(r"\{literalinclude\} \.\./\.\./(\S+)", text)
    assert sorted(shown) == sorted(f"examples/{path.name}" for path in ROOT.glob("examples/*.py"))
