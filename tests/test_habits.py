"""What contributors and releases rely on: private names, pins for every dependency, steps of CI that are all run, a
release check."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kit.paths import ROOT
from kit.patience import SOON

CI = ROOT / ".ci"

# -- private names -----------------------------------------------------------------------------------------------------


def test_no_module_of_the_package_imports_a_private_name_of_another() -> None:
    """Ruff's SLF001 sees only those behind a dot."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {alias.name}"
        for path in (ROOT / "gtcpserver").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("gtcpserver"))
        for alias in node.names
        if re.match(r"_[^_]", alias.name)
    ]
    assert found == []


def test_no_method_is_replaced_on_an_instance() -> None:
    """Two who do so break each other. mypy (strict) refuses it, unless a comment says otherwise.

    `threading.Thread` is the one class of others that is changed (server/background.py).
    """
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "gtcpserver").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "method-assign" in line and not line.strip().startswith("threading.Thread.__init__ = ")
    ]
    assert found == []


# -- constraints.txt ---------------------------------------------------------------------------------------------------


def read_project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())
    return project


def read_pins() -> list[Requirement]:
    # Nothing but requirements: an option, such as the address of a package index, cannot be parsed as one.
    lines = (line.partition(" #")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_every_dependency_has_one_pin_that_it_accepts(version: str) -> None:
    python = {"python_version": version, "python_full_version": f"{version}.9"}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(python)

    pins: dict[str, list[str]] = {}
    for pin in filter(applies, read_pins()):
        (specifier,) = pin.specifier
        assert re.fullmatch(r"==[^*]+", str(specifier)), str(pin)
        pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    assert not {name: versions for name, versions in pins.items() if len(versions) > 1}

    project = read_project()["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        if requirement.name != project["name"] and applies(requirement):
            pinned = pins.get(canonicalize_name(requirement.name), [""])[0]
            accepted = bool(pinned) and requirement.specifier.contains(pinned)
            assert accepted, f"{text}: run `make lock`, {pinned=}"


# -- changes/ ----------------------------------------------------------------------------------------------------------


def test_the_types_of_news_are_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "changes" / "README.md").read_text(), re.MULTILINE)
    towncrier = read_project()["tool"]["towncrier"]
    assert explained == [(kind["directory"], kind["name"]) for kind in towncrier["type"]]
    # Without it towncrier would put them above the title.
    assert (ROOT / "CHANGELOG.md").read_text().count(towncrier["start_string"]) == 1


# -- .ci/ --------------------------------------------------------------------------------------------------------------


def test_every_step_of_ci_is_run_and_can_be_run_alone() -> None:
    scripts = {path.name for path in CI.iterdir()} - {"lib.sh", "run", "next-python", "release-check"}
    (steps,) = re.findall(r"^steps=\((.*?)^\)$", (CI / "run").read_text(), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^ +(\w+)", steps, re.MULTILINE)) == scripts
    alone = re.findall(r"^(ci-.*): ci-%:$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(alone[0].split()) == {f"ci-{name}" for name in scripts}


def test_the_smoke_of_examples_knows_each() -> None:
    known = set(re.findall(r"\b\w+\.py(?=\)| \|)", (CI / "smoke").read_text()))
    assert known == {path.name for path in (ROOT / "examples").glob("*.py")}


# -- a release ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with all that `.ci/release-check` looks at before it builds; what it would build with is a fake."""
    if shutil.which("git") is None:
        pytest.skip("git is missing")
    folder = tmp_path / "checkout"
    shutil.copytree(CI, folder / ".ci")
    (folder / ".ci" / "package").write_text('#!/bin/sh\nmkdir "$1" && touch "$1/built"\n')
    for path, text in {
        "gtcpserver/_version.py": '__version__ = "1.2.3"\n',
        "CHANGELOG.md": "# Changes\n\n## 1.2.3 (2026-12-01)\n\n## 1.2.2 (2026-11-01)\n",
        "changes/README.md": "",
        ".gitignore": "dist/\n",
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    names = ("-c", "user.name=Ada", "-c", "user.email=ada@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *names, *arguments], cwd=folder, env=environment(), check=True, timeout=SOON)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--no-verify", "--message", "x")


def environment() -> dict[str, str]:
    # Under a hook of git these would lead to another repository.
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def check(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [".ci/release-check"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SOON
    )
    return done.returncode, done.stderr


def test_what_is_ready_for_a_release_is_built(checkout: Path) -> None:
    (checkout / "dist").mkdir()
    (checkout / "dist" / "older").touch()
    assert check(checkout) == (0, "")
    assert os.listdir(checkout / "dist") == ["built"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (
            "gtcpserver/_version.py",
            '__version__ = "1.3.dev1"\n',
            'expected a version such as 1.2.3, got "1.3.dev1"',
        ),
        ("gtcpserver/_version.py", '__version__ = "1.3.0"\n', 'expected "## 1.3.0 (YYYY-MM-DD)" as the first section'),
        ("CHANGELOG.md", "## 1.2.3 (unreleased)\n", 'got "## 1.2.3 (unreleased)"'),
        ("CHANGELOG.md", "## 1.2.30 (2026-12-01)\n", 'got "## 1.2.30 (2026-12-01)"'),
        ("changes/+late.fix.md", "Late.\n", "changes/: not in CHANGELOG.md yet: changes/+late.fix.md"),
    ],
)
def test_what_a_release_still_lacks_is_named(checkout: Path, path: str, text: str, said: str) -> None:
    (checkout / path).write_text(text)
    commit(checkout)
    status, stderr = check(checkout)
    assert (status, stderr.count("\n")) == (1, 3 if "dev1" in text else 2), stderr
    assert said in stderr
    assert not (checkout / "dist").exists()


@pytest.mark.slow
def test_only_what_is_committed_and_has_no_tag_yet_is_released(checkout: Path) -> None:
    git(checkout, "tag", "v1.2.3")
    (checkout / "forgotten.py").touch()
    status, stderr = check(checkout)
    assert status == 1
    assert stderr.splitlines() == [
        "not committed: ?? forgotten.py",
        "the tag v1.2.3 exists",
        "FAILED: no release",
    ]
