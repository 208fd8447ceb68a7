"""Settings from a file and from the environment: every option of a command, by the rules of docs/settings.md.

The command line takes precedence over the environment, the environment over the file, and the file over the defaults.
click does the work: each option has its variable (`envvar`), and the contents of the file become the command's
`default_map`. This module reads the file, reports all mistakes in it, and knows where each value comes from.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gtcpserver.errors import ConfigError

from .commands import COMMANDS, RunError, describe, load_command
from .env_file import FROM_FILE
from .help import GroupedHelp
from .mistakes import mistakes
from .options import (
    ACME_OPTIONS,
    BALANCER_OPTIONS,
    CLIENT_OPTIONS,
    LISTEN_OPTIONS,
    TLS_OPTIONS,
    OctalType,
    OrNone,
    ServerNameType,
    WorkersType,
    of_balancers,
)

if TYPE_CHECKING:
    from gtcpserver.files.toml_file import Lines

PREFIX = "GTCPSERVER_"

#: Not options: what a master passes to its successor in an upgrade, which variables come from --env-file, and the
#: choice of pure Python (`_compiled`).
OTHER_VARIABLES = frozenset({"GTCPSERVER_HANDOVER", "GTCPSERVER_PURE", FROM_FILE})

#: Report at most this many mistakes; a file with more of them is some other file.
MOST_MISTAKES = 50

# The table of an option in the file: a field of an object in Python is a key of the table that is named like Server's
# argument.
TABLES: dict[str, tuple[str, str]] = (
    {name: ("listen", name) for name, _, _ in LISTEN_OPTIONS}
    | {f"tls_{name}": ("tls", name) for name, _, _ in TLS_OPTIONS}
    | {name: ("tls", name) for name, _, _, _ in ACME_OPTIONS}
    | {"tls_password": ("tls", "password_file"), "tls_self_signed": ("tls", "self_signed")}
    | {of_balancers(name): ("proxy_protocol", name) for name, _, _ in BALANCER_OPTIONS}
    | {f"client_{name}": ("client_limits", name) for name, _, _ in CLIENT_OPTIONS}
)

SECRET = frozenset({"tls_password", "shared_limits"})


@dataclass
class Settings:
    """The sources of a command's settings besides its command line.

    Attributes:
        arguments: the command line.
        path: path of the file; None for none.
        lines: line numbers of the file's keys.
        at_start: the values at the start, by parameter name.
    """

    arguments: list[str]
    path: str | None = None
    lines: Lines | None = None
    at_start: dict[str, Any] = field(default_factory=dict)


class _Telling(GroupedHelp):
    """Report a mistake in a value with the source of the value."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.obj = settings = Settings(list(args))
        try:
            rest = super().parse_args(context, args)
        except click.MissingParameter:
            raise
        except click.BadParameter as error:
            raise click.UsageError(told(context, describe(error)), context) from None
        settings.at_start = dict(context.params)
        if settings.path is not None and not context.resilient_parsing:
            _raise(f"{label_of(context, name)}: {message}" for name, message in mistakes(context))
        return rest

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except click.UsageError as error:
            raise click.UsageError(told(context, describe(error)), context) from None


class SettingsCommand(_Telling):
    """A command whose options are also settings. It must have :func:`config_option`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        obey_environment(self)


class SettingsGroup(_Telling, click.Group):
    """The same for a command with subcommands, whose file is of another kind. It decides which variables it obeys."""


def config_option(command: Any) -> Any:
    """Add --config to a command of the class :class:`SettingsCommand`."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(),
        is_eager=True,  # before the other options, whose defaults it sets
        expose_value=False,
        callback=_read_into,
        help="TOML file with any of these options, see docs/settings.md. Each may also be set in the environment, "
        "by the variable in brackets.",
    )(command)


def obey_environment(
    command: click.Command, but: Collection[str] = (), names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Give each option except those in `but` the environment variable of its name, or the one in `names`."""
    for parameter in command.params:
        if parameter.name not in but and parameter.name != "help":
            parameter.envvar = names.get(str(parameter.name)) or variable_of(parameter)


#: Options whose variable has another name, since theirs is what a master passes to the next (supervisor/upgrade.py),
#: which may be of another version.
TAKEN = {"handover": "hand-over"}


def variable_of(parameter: click.Parameter) -> str:
    """Return "GTCPSERVER_STOP_TIMEOUT" for --stop-timeout."""
    name = parameter.opts[0].lstrip("-") if isinstance(parameter, click.Option) else str(parameter.name)
    name = TAKEN.get(name, name)
    return PREFIX + name.replace("-", "_").upper()


def key_of(parameter: click.Parameter) -> str:
    """Return the option's name in the file: "stop_timeout", "listen.backlog"."""
    table, key = TABLES.get(str(parameter.name), ("", str(parameter.name)))
    return f"{table}.{key}" if table else key


def settings_of(command: click.Command) -> list[click.Parameter]:
    """Return the parameters of a command that are settings."""
    return [
        parameter for parameter in command.params if parameter.envvar and parameter.name not in ("config", "env_file")
    ]


# -- the file ----------------------------------------------------------------------------------------------------------


def _read_into(context: click.Context, _parameter: click.Parameter, path: str | None) -> None:
    if path is None or context.resilient_parsing:
        return
    try:
        from gtcpserver.files.toml_file import Lines, parse_text, read_text
    except ModuleNotFoundError as missing:  # tomli, before Python 3.11
        raise RunError(f"--config needs {missing.name}: pip install 'gtcpserver[cli]'") from None
    text = read_text(path)
    data = parse_text(text, path)
    settings: Settings = context.obj
    settings.path, settings.lines = path, Lines(text)
    found = _Reader(context.command, settings)
    context.default_map = found.read(data)
    _raise(found.mistakes)


def _raise(mistakes: Iterable[str]) -> None:
    told = list(mistakes)[:MOST_MISTAKES]
    if told:
        raise ConfigError("\n".join(told))


class _Reader:
    """Reads the data of one file for one command."""

    def __init__(self, command: click.Command, settings: Settings) -> None:
        self.mistakes: list[str] = []
        self._settings = settings
        self._known = {key_of(parameter): parameter for parameter in settings_of(command)}
        self._tables = {key.partition(".")[0] for key in self._known if "." in key}

    def read(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by parameter name, in the form that the options take."""
        values: dict[str, Any] = {}
        for key, value in self._entries(data):
            parameter = self._known.get(key)
            if parameter is None:
                if isinstance(value, dict) and "." not in key:
                    self._note(key, f"there is no table [{key}]{self._near_table(key)}")
                else:
                    self._note(key, f"there is no key {key}{self._near(key)}")
                continue
            try:
                values[str(parameter.name)] = _checked(parameter, value)
            except ValueError as error:
                self._note(key, f"{key}: {error}")
        return values

    def _entries(self, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in data.items():
            if key not in self._tables or key in self._known:
                yield key, value
            elif isinstance(value, dict):
                yield from ((f"{key}.{inner}", one) for inner, one in value.items())
            else:
                hint = '; where to listen is "bind"' if key == "listen" else ""
                self._note(key, f"{key}: must be a table, [{key}], got {_shown(value)}{hint}")

    def _note(self, key: str, message: str) -> None:
        self.mistakes.append(f"{place_of(self._settings, key)}: {message}")

    def _near_table(self, table: str) -> str:
        near = difflib.get_close_matches(table.replace("-", "_"), self._tables, 1)
        if near:
            return f"; did you mean [{near[0]}]?"
        return f"; there are {', '.join(f'[{one}]' for one in sorted(self._tables))}" if self._tables else ""

    def _near(self, key: str) -> str:
        name = key.rpartition(".")[2].replace("-", "_")
        same = [known for known in self._known if known.rpartition(".")[2] == name]
        near = same or difflib.get_close_matches(key.replace("-", "_"), self._known, 1)
        return f"; did you mean {' or '.join(near)}?" if near else ""


def place_of(settings: Settings, key: str) -> str:
    """Return, for example, "app.toml line 3"."""
    line = settings.lines.of(key) if settings.lines is not None else None
    return f"{settings.path}" if line is None else f"{settings.path} line {line}"


def _checked(parameter: click.Parameter, value: Any) -> Any:
    """Return a value of the file in the form that the option takes. Raise ValueError for a wrong type or value."""
    if isinstance(parameter.type, ServerNameType) and isinstance(value, dict):
        value = [f"{name}={_pair(name, files)}" for name, files in value.items()]
    elif isinstance(parameter.type, ServerNameType):
        raise ValueError(f'must be a table, such as {{ "a.example.com" = ["a.pem", "a.key"] }}, got {_shown(value)}')
    if not (getattr(parameter, "multiple", False) or parameter.nargs == -1):
        _check_one(parameter, value)
        return value
    values = value if isinstance(value, list) else [value]
    for one in values:
        _check_one(parameter, one)
    return values


def _pair(name: str, files: Any) -> str:
    pair = [files] if isinstance(files, str) else files
    if not (isinstance(pair, list) and len(pair) in (1, 2) and all(isinstance(path, str) and path for path in pair)):
        raise ValueError(f'"{name}" must be a certificate file, or [certificate file, key file], got {_shown(files)}')
    return str(pair[0]) + "," + (pair[1] if len(pair) == 2 else "")


def _check_one(parameter: click.Parameter, value: Any) -> None:
    kind = parameter.type
    wanted, fits = _wanted(parameter, value)
    if not fits:
        raise ValueError(f"must be {wanted}, got {_shown(value)}")
    if isinstance(value, bool):
        return
    try:
        kind.convert(value, parameter, None)
    except click.BadParameter as error:
        message = error.message.rstrip(".")
        raise ValueError(message[:1].lower() + message[1:] if message[1:2].islower() else message) from None


def _wanted(parameter: click.Parameter, value: Any) -> tuple[str, bool]:
    kind = parameter.type
    if getattr(parameter, "is_flag", False):
        return "true or false", isinstance(value, bool)
    whole = type(value) is int
    if isinstance(kind, WorkersType):
        return 'a whole number or "auto"', whole or value == "auto"
    if isinstance(kind, OrNone):
        least = "" if kind.least is None else f", {kind.least:g} or more,"
        if kind.number is int:
            return f'a whole number{least} or "none"', whole or value == "none"
        return f'a number{least} or "none"', type(value) in (int, float) or value == "none"
    if isinstance(kind, type(click.INT)):
        return "a whole number", whole
    if isinstance(kind, type(click.FLOAT)):
        return "a number", type(value) in (int, float)
    if isinstance(kind, OctalType):
        return 'octal digits in quotes, such as "660"', isinstance(value, str)
    return "text in quotes", isinstance(value, str)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


# -- where a value comes from ------------------------------------------------------------------------------------------


def source_of(context: click.Context, parameter: click.Parameter) -> dict[str, Any]:
    """Return where the value comes from: {"source": "command line"}, {"source": "environment", "name": ...},
    {"source": "file", "path": ..., "line": ...} or {"source": "default"}."""
    source = context.get_parameter_source(str(parameter.name))
    if source is ParameterSource.COMMANDLINE:
        return {"source": "command line"}
    if source is ParameterSource.ENVIRONMENT:
        return {"source": "environment", "name": parameter.envvar}
    if source is ParameterSource.DEFAULT_MAP:
        settings: Settings = context.obj
        line = settings.lines.of(key_of(parameter)) if settings.lines is not None else None
        return {"source": "file", "path": settings.path, "line": line}
    return {"source": "default"}


def label_of(context: click.Context, name: str) -> str:
    """Return what a message about a parameter's value calls it, according to its source."""
    parameter = next(parameter for parameter in context.command.params if parameter.name == name)
    source = source_of(context, parameter)["source"]
    if source == "environment":
        return str(parameter.envvar)
    if source == "file":
        return f"{place_of(context.obj, key_of(parameter))}: {key_of(parameter)}"
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name


def told(context: click.Context, message: str) -> str:
    """Replace the option at the start of a message, "--pool: must be ...", by the source of the value:
    "GTCPSERVER_POOL: must be ..."."""
    match = re.match(r"(--[\w-]+|[A-Z]+(?::[A-Z]+)?): ", message)
    if match is None:
        return message
    for parameter in context.command.params:
        names = (*parameter.opts, *parameter.secondary_opts, getattr(parameter, "metavar", None))
        if match[1] in names and parameter.name is not None:
            source = source_of(context, parameter)["source"]
            if source in ("environment", "file"):
                return f"{label_of(context, parameter.name)}: {message[match.end() :]}"
    return message


def warn_at_start(context: click.Context, message: str) -> None:
    """Have a line logged once this process has set up its log."""
    context.meta.setdefault(_WARNINGS, []).append(message)


def warnings_at_start(context: click.Context) -> list[str]:
    """Return the lines to log: those of `warn_at_start`, and the mistakes in the environment."""
    return [*context.meta.get(_WARNINGS, ()), *unknown_variables(context.command)]


_WARNINGS = f"{__name__}.warnings"


def unknown_variables(command: click.Command) -> list[str]:
    """Return a line for each environment variable that looks like a setting but is not one."""
    known = {str(parameter.envvar) for parameter in command.params if parameter.envvar}
    given = {name for name in os.environ if name.startswith(PREFIX)} - OTHER_VARIABLES - known
    if not given:
        return []
    for name in COMMANDS:
        # Another command's variable is no mistake: containers give all their processes the same environment.
        try:
            known |= {str(parameter.envvar) for parameter in load_command(name).params if parameter.envvar}
        except RunError:  # its libraries are not installed
            continue
    lines = []
    for name in sorted(given - known):
        near = difflib.get_close_matches(name, known, 1)
        lines.append(f"there is no setting {name}{f'; did you mean {near[0]}?' if near else ''}")
    return lines


# -- a reload ----------------------------------------------------------------------------------------------------------

#: What a worker cannot change: settings of the master, or of steps that precede the server.
FIXED = frozenset(
    {
        "bind",
        "stop_timeout",
        "freeze_gc",
        "metrics",
        "log_level",
        "log_format",
        "monkey_patch",
        "reload",
        "reload_path",
        "log_config",
    }
    | {name for name, _, _ in LISTEN_OPTIONS}
)


def file_of(context: click.Context) -> str | None:
    """Return the path of the settings file, which a reload reads again."""
    return context.obj.path if isinstance(context.obj, Settings) else None


def made_anew(context: click.Context, make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that returns the handler made by `make`: the first one is made now, to report mistakes at once;
    each worker that reads the settings again makes a new one."""
    first = make()
    return make if file_of(context) is not None else lambda: first


def read_again(context: click.Context, fixed: Collection[str]) -> list[str]:
    """Read the file again, in a new worker process.

    Args:
        context: gets the new values and their sources.
        fixed: parameters that keep their values.

    Returns:
        the names in the file of those fixed parameters that have changed there.

    Raises:
        ConfigError, click.ClickException: all mistakes in the file.
    """
    settings: Settings = context.obj
    new = context.command.make_context(context.info_name, list(settings.arguments), parent=context.parent)
    changed = []
    for parameter in settings_of(context.command):
        name = str(parameter.name)
        if name in fixed:
            if new.params.get(name) != settings.at_start.get(name):
                changed.append(key_of(parameter))
            continue
        context.params[name] = new.params.get(name)
        source = new.get_parameter_source(name)
        if source is not None:
            context.set_parameter_source(name, source)
    new.obj.at_start = settings.at_start
    context.obj = new.obj
    return changed
