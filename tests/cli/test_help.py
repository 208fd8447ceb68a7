"""`-h`: what a newcomer reads first, and whether it is true."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from gtcpserver.cli import commands, help, wants_monkey_patch
from gtcpserver.cli.commands import COMMANDS, load_command
from gtcpserver.cli.commands import run as run_command

SERVERS = ("serve", "echo", "forward", "files", "proxy")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command([*arguments, "-h"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_h_is_help(capsys, name) -> None:
    text = shown(capsys, *([name] if name else []))
    assert text.startswith(f"Usage: gtcpserver {name}".strip())
    assert "-h, --help" in text


@pytest.mark.parametrize("name", ["", *SERVERS])
def test_three_examples_come_before_the_options_and_can_be_run(capsys, name, tmp_path, monkeypatch) -> None:
    text = shown(capsys, *([name] if name else []))
    examples, _, options = text.partition("Examples:\n")[2].partition("\n\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert len(lines) == 3, "each has a line of its own, in a terminal of 80 columns"
    assert options.startswith(("Options:", "Program:"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.toml").write_text('handler = "app:handle"')
    for line in lines:
        program, command, *arguments = shlex.split(re.split(r"  +", line)[0])
        assert program == "gtcpserver"
        load_command(command).make_context(command, arguments)  # raises if it cannot be parsed


@pytest.mark.parametrize("name", SERVERS)
def test_each_option_is_in_a_group_with_its_variable(capsys, name) -> None:
    command = load_command(name)
    # To join words that were broken at the end of a line or at a hyphen.
    words = re.sub(r"\s+", "", shown(capsys, name))
    shared = {parameter.name for parameter in load_command("echo").params}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in words
            assert not parameter.envvar or f"[{parameter.envvar}]" in words
            if parameter.name in shared:
                assert help.title_of(parameter) != "Options", parameter.name
    known = {parameter.name for one in SERVERS for parameter in load_command(one).params} | {"help"}
    assert frozenset().union(*help.GROUPS.values()) <= known


@pytest.mark.parametrize("name", ["serve", "echo", "files"])
def test_short_names(name) -> None:
    arguments = ["app:handle"] if name == "serve" else []
    context = load_command(name).make_context(name, [*arguments, "-b", "127.0.0.1:0", "-b", "unix:@x", "-w", "2"])
    assert [str(address) for address in context.params["bind"]] == ["127.0.0.1:0", "unix:@x"]
    assert context.params["workers"] == 2


def test_a_mistake_in_a_short_option_is_told_by_its_long_name(capsys) -> None:
    assert run_command(["echo", "-w", "many"]) == 2
    assert "--workers: must be a whole number" in capsys.readouterr().err


def test_help_needs_no_patched_library() -> None:
    assert not wants_monkey_patch(["serve", "-h"], {})


def test_each_command_has_a_line_in_the_list(capsys) -> None:
    text = shown(capsys)
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert len(commands.EXAMPLES) == 3
