"""gtcpserver completion, in a real bash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.patience import SOON

pytestmark = pytest.mark.slow

BIN = str(Path(sys.executable).parent)


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False, **options)


def script(shell: str) -> str:
    result = run(sys.executable, "-m", "gtcpserver", "completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def complete(script: str, *words: str) -> tuple[list[str], str]:
    """What a bash with the script offers for the last of these words, and what it has written on stderr."""
    quoted = " ".join(f"'{word}'" for word in words)
    commands = f"""{script}
COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1} COMPREPLY=()
_gtcpserver_completion gtcpserver
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    result = run("bash", "--norc", "-c", commands, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stderr
    return result.stdout.split(), result.stderr


@pytest.mark.skipif(not os.path.exists(f"{BIN}/gtcpserver"), reason="the package is not installed")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values():
    made = script("bash")
    registered = run("bash", "--norc", "-c", f"{made}\ncomplete -p gtcpserver")
    assert registered.stdout == "complete -o nosort -F _gtcpserver_completion gtcpserver\n"
    for words, wanted in (
        (("gtcpserver", "se"), ["serve"]),
        (("gtcpserver", "config", ""), ["check", "show"]),
        (("gtcpserver", "serve", "app:handle", "--stop-t"), ["--stop-timeout"]),
        (("gtcpserver", "echo", "--access-log", "j"), ["json"]),
        (("gtcpserver", "serve", "--config", "/no/such.toml", "--on-f"), ["--on-full"]),
        (("gtcpserver", "no-such", "x"), []),
    ):
        assert complete(made, *words) == (wanted, "")
    names, errors = complete(made, "gtcpserver", "")
    assert {"serve", "proxy", "completion"} <= set(names)
    assert errors == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell):
    made = script(shell)
    assert f"_GTCPSERVER_COMPLETE={shell}_complete" in made
    if shutil.which(shell):
        result = run(shell, "-n", "-c", made)
        assert (result.returncode, result.stderr) == (0, "")


def test_a_missing_library_of_one_command_is_no_matter_to_the_others():
    code = "import sys; sys.modules['msgspec'] = None; import gtcpserver.cli as c; c.main()"
    shown = run(sys.executable, "-c", code, "--help")
    assert shown.returncode == 0
    assert re.search("^  serve +Run your handler", shown.stdout, re.MULTILINE)
    assert re.search("^  proxy +the proxy needs msgspec: pip install", shown.stdout, re.MULTILINE)
    variables = {"_GTCPSERVER_COMPLETE": "bash_complete", "COMP_WORDS": "gtcpserver p", "COMP_CWORD": "1"}
    result = run(sys.executable, "-c", code, env={**os.environ, **variables})
    assert (result.stdout, result.stderr) == ("plain,proxy\n", "")
