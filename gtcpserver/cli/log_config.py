"""--log-config: logging.config.dictConfig by a TOML or JSON file."""

from __future__ import annotations

import json
import logging.config
from typing import Any

import click

from gtcpserver.errors import ConfigError

from .commands import RunError
from .options import flag, was_given

NAME = "--log-config"


def configure_log(context: click.Context) -> None:
    """Obey --log-config, if it is given. Raise click.UsageError and RunError."""
    path = context.params["log_config"]
    if path is None:
        return
    for name in ("log_level", "log_format"):
        if was_given(context, name):
            raise click.UsageError(f"{flag(name)}: cannot be used together with {NAME}, which has its own")
    configure(path)


def configure(path: str) -> None:
    """Configure logging by a file; what it does not name stays as it is. Raise click.UsageError and RunError."""
    config = {"version": 1, "disable_existing_loggers": False, **_read(path)}
    _check_tables(config, path)
    try:
        logging.config.dictConfig(config)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        why = f": {error.__cause__}" if error.__cause__ is not None else ""
        raise click.UsageError(f"{NAME}: {path}: {error}{why}") from None
    except OSError as error:  # a file of a handler
        raise RunError(f"{NAME}: {path}: {error}") from None


def _check_tables(config: dict[str, Any], path: str) -> None:
    """Check what must be a table: dictConfig's own errors about it name no key. Raise click.UsageError."""
    tables = {}
    for key in ("formatters", "filters", "handlers", "loggers"):
        tables[key] = table = config.get(key, {})
        if isinstance(table, dict):
            tables |= {f"{key}.{name}": one for name, one in table.items()}
    tables["root"] = config.get("root", {})
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise click.UsageError(f"{NAME}: {path}: {name} must be a table, got {table!r}")


def _read(path: str) -> dict[str, Any]:
    try:
        from gtcpserver.files.toml_file import parse_text, read_text
    except ModuleNotFoundError as missing:  # tomli, before Python 3.11
        raise RunError(f"{NAME} needs {missing.name}: pip install 'gtcpserver[cli]'") from None
    try:
        text = read_text(path)
        if not path.endswith(".json"):
            return parse_text(text, path)
        data = json.loads(text)
    except ConfigError as error:
        raise click.UsageError(f"{NAME}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{NAME}: {path}: {error}") from None
    if not isinstance(data, dict):
        raise click.UsageError(f"{NAME}: {path}: must be an object, got {type(data).__name__}")
    return data
