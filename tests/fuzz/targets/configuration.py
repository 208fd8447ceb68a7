"""Files of settings: the proxy's and the commands'."""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

import click

from fuzz.engine import Target
from fuzz.targets.helpers import Choices
from gtcpserver.cli.commands import load_command
from gtcpserver.cli.settings import settings_of
from gtcpserver.errors import ConfigError
from gtcpserver.files.toml_file import Lines, parse_text
from gtcpserver.proxy.config import MOST_MISTAKES, parse_config
from gtcpserver.proxy.settings import ProxyConfig


def proxy_config(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        config = parse_config(text, "file")
    except ConfigError as error:
        _check_mistakes(str(error), text)
        return
    assert isinstance(config, ProxyConfig)
    _check_lines(text)


def _check_mistakes(message: str, text: str) -> None:
    told = message.split("\nfile")
    assert message.startswith("file")
    assert len(told) <= MOST_MISTAKES
    lines = text.count("\n") + 1
    for number in re.findall(r"^file line (\d+)", message, re.MULTILINE):
        assert 1 <= int(number) <= lines


def _check_lines(text: str) -> None:
    """The line of each key has the key in it, or the brackets of its table."""
    data = parse_text(text, "file")
    lines = Lines(text)
    for key in data:
        line = lines.of(key)
        assert line is None or 1 <= line <= text.count("\n") + 1


COMMANDS = ("serve", "files", "forward", "echo")
ARGUMENTS = {"serve": ["os:getcwd"], "forward": ["127.0.0.1:9"], "files": ["."], "echo": []}


def settings(data: bytes) -> None:
    """A file of settings, read by a command as at its start."""
    choices = Choices(data)
    name = COMMANDS[choices.number(len(COMMANDS) - 1)]
    command = load_command(name)
    with tempfile.NamedTemporaryFile(dir=_FOLDER, suffix=".toml") as file:
        file.write(choices.rest())
        file.flush()
        try:
            context = command.make_context(name, ["--config", file.name, *ARGUMENTS[name]])
        except (ConfigError, click.ClickException) as error:
            assert str(error)
            return
        with context:
            known = {str(parameter.name) for parameter in settings_of(command)}
            read: dict[str, Any] = context.default_map or {}
            assert set(read) <= known, "settings that the command does not have"


_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None

TARGETS = [
    Target(
        "proxy_config",
        proxy_config,
        tokens=(
            *(
                b"\n[[listener]]\n",
                b"\n[rules]\n",
                b"\n[auth.staff]\n",
                b"\n[upstream.other]\n",
                b"\n[limits]\n",
                b"\n[log]\n",
            ),
            *(
                b"\n[timeouts]\n",
                b"\n[resolver]\n",
                b"\n[http]\n",
                b'name = "a"\n',
                b'listen = "127.0.0.1:1080"\n',
                b'speaks = "http"\n',
            ),
            *(
                b'clients = ["allow 127.0.0.1"]\n',
                b'destinations = ["allow any"]\n',
                b'upstreams = ["through other any"]\n',
            ),
            *(
                b'url = "socks5://u:p@h:1"\n',
                b'through = "other"\n',
                b'resolve = "there"\n',
                b"users = {}\n",
                b"idle = 3\n",
            ),
            *(
                b'external = "same"\n',
                b'proxy_protocol = ["10.0.0.0/8"]\n',
                b'tls_certfile = "/none"\n',
                b"certificate = true\n",
            ),
            *(
                b'style = "json"\n',
                b"nan",
                b"-inf",
                b"1e999",
                b"true",
                b'""',
                b"{}",
                b"[]",
                b"[[",
                b"]]",
                b"'''",
                b'"""',
                b"#",
                b"\n",
            ),
            *(b" = ", b".", b"\\u0000", b"\\n", b"2026-01-31T12:00:00Z", b"[a.b]", b"[[a.b]]", b"0x", b"1_0", b"\r\n"),
        ),
        # Tables are found by reading each line anew with those before it, up to toml_file.MOST_LINES_TRIED times; and
        # the file is the operator's own.
        longest=16_000,
        lines=(100_000, 500),
        seconds=(1.0, 300e-6),
        memory=(4_000_000, 2000),
    ),
    Target(
        "settings",
        settings,
        tokens=(
            *(
                b'bind = ["127.0.0.1:0"]\n',
                b"pool = 10\n",
                b'pool = "none"\n',
                b"timeout = 1.5\n",
                b"workers = 2\n",
                b'workers = "auto"\n',
            ),
            *(
                b"\n[listen]\n",
                b"\n[tls]\n",
                b"\n[proxy_protocol]\n",
                b"\n[client_limits]\n",
                b"backlog = 5\n",
                b'mode = "660"\n',
            ),
            *(
                b'certfile = "/none"\n',
                b'trusted = ["10.0.0.0/8"]\n',
                b"connections = 5\n",
                b'rate = "10/s"\n',
                b'deny = ["::1"]\n',
            ),
            *(
                b'log_level = "debug"\n',
                b'access_log = "json"\n',
                b"stop_timeout = 5\n",
                b"reuse_port = true\n",
                b"nan",
                b"-1",
                b"1e999",
            ),
            *(
                b"sni = {}\n",
                b"99999999999999999999",
                b"true",
                b'""',
                b"{}",
                b"[]",
                b'"none"',
                b"#",
                b"\n",
                b" = ",
                b".",
                b"\\u0000",
            ),
        ),
        longest=16_000,
        lines=(200_000, 500),
        seconds=(1.0, 300e-6),
        memory=(6_000_000, 2000),
    ),
]
