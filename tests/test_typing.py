"""What a type checker tells a user: tests/typed/program.py, in `mypy --strict`."""

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "typed" / "program.py"

PUBLIC = [
    "gtcpserver",
    "gtcpserver.adapters",
    "gtcpserver.static_files",
    "gtcpserver.supervisor",
    "gtcpserver.testing",
    "gtcpserver.tls",
]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_program_uses_every_public_name(module):
    tree = ast.parse(PROGRAM.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) in used
    }
    names = importlib.import_module(module).__all__
    # Some have two places: gtcpserver.TLSConfig is gtcpserver.tls.TLSConfig.
    missing = [name for name in names if not {(module, name), ("gtcpserver", name)} & imported]
    assert not missing


def test_a_user_s_program_is_clean_and_its_types_are_known(tmp_path):
    if find_spec("mypy") is None:
        pytest.skip("mypy is missing")
    # Without the checkout's pyproject.toml, whose settings a user has not; and silent on the package itself, as mypy is
    # on what is installed.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += ["--no-error-summary", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}", str(PROGRAM)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    messages = (done.stdout + done.stderr).splitlines()
    revealed = {}
    for message in messages:
        if found := re.search(r'program\.py:(\d+): note: Revealed type is "(.*)"$', message):
            revealed[int(found[1])] = found[2]
    others = [message for message in messages if "note: Revealed type" not in message]
    assert not others, "\n".join(others)
    expected = {
        number: line.split("# revealed: ")[1]
        for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
        if "reveal_type(" in line
    }
    assert expected.keys() == revealed.keys()
    wrong = [
        f"line {number}: {revealed[number]}, not {type}"
        for number, type in expected.items()
        if not _short(revealed[number]).startswith(type)
    ]
    assert not wrong, "\n".join(wrong)


def _short(type):
    """Without the modules of the names."""
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", type)
