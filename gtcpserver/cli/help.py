"""What --help prints: three examples, then the options in groups, each with its environment variable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from .commands import HELP
from .options import (
    ACCESS_LOG_OPTIONS,
    ACME_OPTIONS,
    BALANCER_OPTIONS,
    CLIENT_OPTIONS,
    HOOK_OPTIONS,
    LISTEN_OPTIONS,
    OBJECT_OPTIONS,
    SERVER_OPTIONS,
    SUPERVISOR_OPTIONS,
    TLS_OPTIONS,
    of_balancers,
)

#: What a command does for its most frequent uses: the command line, and what it is for. By the command's name.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "serve": (
        ("gtcpserver serve app:handle --reload", "while you develop"),
        ("gtcpserver serve app:handle -b '*:80' -w auto", "in production, on all CPUs"),
        ("gtcpserver serve --config app.toml", "with all options in a file"),
    ),
    "echo": (
        ("gtcpserver echo", "on 127.0.0.1:5000"),
        ("gtcpserver echo -b 5001 --tls-self-signed", "over TLS"),
        ("gtcpserver echo -b unix:/tmp/echo.sock", "on a Unix socket"),
    ),
    "forward": (
        ("gtcpserver forward '*:80' 127.0.0.1:8000", "to one target"),
        ("gtcpserver forward 80 a:80 b:80 --balance least", "to the less busy target"),
        ("gtcpserver forward 80 a:443 --target-tls", "to a target that speaks TLS"),
    ),
    "files": (
        ("gtcpserver files", "this folder, on 127.0.0.1:5000"),
        ("gtcpserver files /srv/www -b '*:80' -w auto", "on all CPUs"),
        ("gtcpserver files --listing --log-requests", "while you develop"),
    ),
    "proxy": (
        ("gtcpserver proxy", "for this host alone"),
        ("gtcpserver proxy --mixed '*:1080' --user-file users", "for these users"),
        ("gtcpserver proxy --config proxy.toml", "with rules in a file"),
    ),
}

#: Titles of the groups, with the parameters in each. Options of one command alone come first, as "Options".
GROUPS: dict[str, frozenset[str]] = {
    title: frozenset(names)
    for title, names in (
        (
            "Program",
            (
                *("wsgi", "factory", "app_dir", "config", "env_file", "reload", "reload_path", "monkey_patch", "help"),
                *(name for name, _ in (*OBJECT_OPTIONS, *HOOK_OPTIONS)),
            ),
        ),
        (
            "Listening sockets",
            (
                "bind",
                *(name for name, _, _ in LISTEN_OPTIONS),
                *(of_balancers(name) for name, _, _ in BALANCER_OPTIONS),
            ),
        ),
        ("Worker processes", ("freeze_gc", *(name for name, _, _ in SUPERVISOR_OPTIONS))),
        (
            "Limits and timeouts",
            (
                "stop_timeout",
                *(name for name, _, _ in SERVER_OPTIONS),
                *(f"client_{name}" for name, _, _ in CLIENT_OPTIONS),
            ),
        ),
        (
            "TLS",
            (
                "tls_self_signed",
                *(f"tls_{name}" for name, _, _ in TLS_OPTIONS),
                *(name for name, _, _, _ in ACME_OPTIONS),
            ),
        ),
        (
            "Logging and monitoring",
            (
                *("metrics", "stats_interval", "block_detector", "log_level", "log_format", "log_config"),
                *(name for name, _, _ in ACCESS_LOG_OPTIONS),
            ),
        ),
    )
}


class GroupedHelp(click.Command):
    """A command whose help has examples, and its options in groups."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Also for a context without its parent's: click keeps the names of the first one.
        kwargs["context_settings"] = {"help_option_names": HELP, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(context, formatter)
        if self.name in EXAMPLES:
            with formatter.section("Examples"):
                formatter.write_dl(list(EXAMPLES[self.name]), col_max=60)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, records in _grouped(self, context):
            with formatter.section(title):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(context, formatter)


def title_of(parameter: click.Parameter) -> str:
    """Return the title of a parameter's group."""
    return next((title for title, names in GROUPS.items() if parameter.name in names), "Options")


def _grouped(command: click.Command, context: click.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    found: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *GROUPS)}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            spec, text = record
            if parameter.envvar:
                text = f"{text}  [{parameter.envvar}]".lstrip()
            found[title_of(parameter)].append((spec, text))
    return ((title, records) for title, records in found.items() if records)
