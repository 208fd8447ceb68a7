"""gtcpserver config: show the settings and where each comes from, and check a settings file."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from typing import Any

import click

from gtcpserver.address import Address
from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.callables import HOOKS
from gtcpserver.listening.config import ListenConfig
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.server.server import Server
from gtcpserver.strict_json import to_json
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.tls import TLSConfig
from gtcpserver.tls.config import DEFAULT_ACME_WATCH

from .commands import EPILOG, describe, load_command
from .loading import find_modules, load_hook, load_object, load_program
from .options import (
    ACME_OPTIONS,
    BALANCER_OPTIONS,
    CLIENT_OPTIONS,
    HOOK_OPTIONS,
    LISTEN_OPTIONS,
    OBJECT_OPTIONS,
    SERVER_OPTIONS,
    SUPERVISOR_OPTIONS,
    TLS_OPTIONS,
    OctalType,
    check_addresses,
    flag,
    make_listen_config,
    make_server,
    make_supervisor_config,
    of_balancers,
    was_given,
)
from .reload import settle_reload
from .settings import SECRET, key_of, settings_of, source_of, told, unknown_variables

NOT_SHOWN = "(not shown)"

of_command = click.option(
    "--command",
    "name",
    type=click.Choice(["serve", "echo", "forward", "files"]),
    default="serve",
    show_default=True,
    help="Command whose settings to use.",
)


@click.group(epilog=EPILOG)
def config() -> None:
    """Show the effective settings, or check a settings file."""


@config.command(epilog=EPILOG, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@of_command
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[--config FILE] [OPTIONS OF serve]")
@click.pass_context
def show(context: click.Context, name: str, as_json: bool, options: tuple[str, ...]) -> None:
    """Print every setting with its value, and where that comes from.

    Accepts the options of the command itself, and reads the same file and environment. Nothing is started, and no
    handler is loaded.
    """
    of = _read(name, list(options), context)
    defaults = library_defaults()
    if of.params["acme"]:
        defaults["tls_watch"] = DEFAULT_ACME_WATCH
    rows = []
    for parameter in settings_of(of.command):
        value = of.params.get(str(parameter.name))
        source = source_of(of, parameter)
        if source["source"] == "default" and value in (None, ()):
            value = defaults.get(str(parameter.name))
        elif parameter.name in SECRET:
            value = NOT_SHOWN
        if isinstance(parameter.type, OctalType) and isinstance(value, int):
            value = f"{value:o}"
        rows.append((key_of(parameter), value, source))
    if as_json:
        click.echo(to_json({key: {"value": _plain(value), **source} for key, value, source in rows}, indent=2))
    else:
        cells = [(key, _printed(value), _from(source)) for key, value, source in rows]
        wide = [max(len(row[column]) for row in cells) for column in range(2)]
        for key, printed, where in cells:
            click.echo(f"{key:{wide[0]}}  {printed:{wide[1]}}  {where}")
    for line in unknown_variables(of.command):
        click.echo(f"gtcpserver: {line}", err=True)


@config.command(epilog=EPILOG)
@of_command
@click.option("--load", is_flag=True, help="Import the handler and the hooks, too, and report what is wrong with them.")
@click.argument("file", metavar="FILE")
@click.pass_context
def check(context: click.Context, name: str, load: bool, file: str) -> None:
    """Check a settings file, and report every mistake in it: exit status 2.

    The environment counts: what the file leaves out may be set there. The program is only imported with --load; then an
    exception that it raises means exit status 1.
    """
    of = _read(name, ["--config", file], context)
    try:
        if isinstance(of.params["bind"], Address):
            of.params["bind"] = (of.params["bind"],)
        check_addresses(of)
        settle_reload(of)
        make_supervisor_config(of)
        make_server(of, lambda _connection: None, make_listen_config(of), load=False)
        loaded = _load(of) if load else []
    except click.UsageError as error:
        raise click.UsageError(told(of, describe(error))) from None
    can = f": {', '.join(loaded)} can be loaded" if loaded else ""
    click.echo(f"{file} is good{can}")


def _load(of: click.Context) -> list[str]:
    """Import what the settings name, in the order of a start, and return the names. Raise as `load_handler`."""
    find_modules(of.params)
    loaded = []
    if "handler" in of.params:
        handler = of.params["handler"]
        if not handler:
            raise click.UsageError("--load: the settings name no handler")
        load_program(of.params, handler)
        loaded.append(handler)
    for option, _ in (*OBJECT_OPTIONS, *HOOK_OPTIONS):
        if was_given(of, option):
            reference, shown = of.params[option], flag(option)
            load_hook(option, reference, shown) if option in HOOKS else load_object(reference, shown)
            loaded.append(reference)
    return loaded


def _read(name: str, arguments: list[str], parent: click.Context) -> click.Context:
    """Return the context that a command would have when it starts; required arguments may be missing."""
    command = copy.copy(load_command(name))
    command.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in command.params:
        parameter.required = False
    return command.make_context(name, arguments, parent=parent.find_root())


def library_defaults() -> dict[str, Any]:
    """Return the defaults of Server and the other classes, by parameter name of the options."""
    found: dict[str, Any] = {}
    for owner, options, prefix in (
        (Server, SERVER_OPTIONS, ""),
        (ListenConfig, LISTEN_OPTIONS, ""),
        (TLSConfig, TLS_OPTIONS, "tls_"),
        (ClientLimits, CLIENT_OPTIONS, "client_"),
        (SupervisorConfig, SUPERVISOR_OPTIONS, ""),
    ):
        found |= {f"{prefix}{name}": _default(owner, name) for name, _, _ in options}
    acme = inspect.signature(TLSConfig.acme).parameters
    found |= {name: acme[argument].default for name, argument, _, _ in ACME_OPTIONS if argument != "names"}
    found |= {of_balancers(name): _default(ProxyProtocol, name) for name, _, _ in BALANCER_OPTIONS}
    found["workers"] = None  # a single process
    return found


def _default(owner: Any, name: str) -> Any:
    if not dataclasses.is_dataclass(owner):
        return inspect.signature(owner).parameters[name].default
    default = next(field.default for field in dataclasses.fields(owner) if field.name == name)
    return None if default is dataclasses.MISSING else default


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _printed(value: Any) -> str:
    plain = _plain(value)
    if plain is None:
        return "none"
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _from(source: dict[str, Any]) -> str:
    if source["source"] == "environment":
        return f"environment {source['name']}"
    if source["source"] == "file":
        return f"{source['path']}:{source['line']}" if source["line"] is not None else str(source["path"])
    return str(source["source"])
