"""gtcpserver acme: what an operator does with certificates that servers order by themselves."""

from __future__ import annotations

from typing import Any

import click

from gtcpserver.diagnostics.logs import configure_logging
from gtcpserver.errors import ConfigError
from gtcpserver.tls.acme.folder import Folder
from gtcpserver.tls.acme.keeper import HelperFailed, run_helper

from .commands import EPILOG, RunError
from .options import acme_options, given_for_acme, make_acme_config
from .settings import obey_environment


@click.group(epilog=EPILOG)
def acme() -> None:
    """Manage certificates that servers order by themselves (--acme)."""


@acme.command(epilog=EPILOG)
@acme_options
@click.pass_context
def new_key(context: click.Context, /, **_options: Any) -> None:
    """Replace the key of the account at the authority, which somebody else may know.

    Takes the options of the server, and must run as its user. Servers that run go on, with the new key; certificates
    and their keys stay.
    """
    given = given_for_acme(context)
    if "acme" not in given:
        raise click.UsageError("--acme: is missing: give a host name of the server")
    settings = make_acme_config(given, {}).managed
    assert settings is not None
    configure_logging("info", "text")
    folder = Folder(settings)
    try:
        folder.prepare()
        lock = folder.lock()
        if lock is None:
            raise RunError("an order is under way; try again in a minute")
        run_helper(settings, lock, "roll_over")
    except (HelperFailed, ConfigError) as error:
        raise RunError(f"the account has its old key: {error}") from None
    except OSError as error:
        raise RunError(f'cannot use "{settings.folder}": {error.strerror or error}') from None


obey_environment(new_key)
