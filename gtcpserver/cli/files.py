"""gtcpserver files: a static file server."""

from __future__ import annotations

from typing import Any

import click

from gtcpserver.static_files import StaticFiles

from .commands import EPILOG
from .options import access_log_options, explained, server_options, supervisor_options
from .serve import process_options, serve_with
from .settings import SettingsCommand, config_option, made_anew

FIELDS = ("index", "cache_control")


@click.command(cls=SettingsCommand, epilog=EPILOG)
@click.argument("directory", default=".")
@click.option(
    "--index", default="index.html", show_default=True, metavar="NAME", help="File to serve for its directory."
)
@click.option(
    "--listing/--no-listing", default=False, help="List directories that have no index.  [default: no-listing]"
)
@click.option("--hidden/--no-hidden", default=False, help="Serve names that begin with a dot.  [default: no-hidden]")
@click.option(
    "--follow-symlinks/--no-follow-symlinks",
    default=False,
    help="Follow symbolic links that lead outside the directory.  [default: no-follow-symlinks]",
)
@click.option("--cache-control", metavar="VALUE", help='Cache-Control header for files, such as "max-age=3600".')
@click.option("--log-requests/--no-log-requests", default=False, help="Log each request.  [default: no-log-requests]")
@config_option
@server_options
@supervisor_options
@process_options
@access_log_options
@click.pass_context
def files(context: click.Context, /, **_options: Any) -> None:
    """Serve the files of DIRECTORY (default: the current one) over HTTP.

    Supports GET and HEAD, with ranges and conditions. Files are sent with sendfile(2). Nothing outside the directory is
    served.
    """
    serve_with(context, made_anew(context, lambda: make_handler(**context.params)))


def make_handler(
    *,
    directory: str,
    index: str,
    listing: bool,
    hidden: bool,
    follow_symlinks: bool,
    cache_control: str | None,
    log_requests: bool,
    **_options: Any,
) -> StaticFiles:
    """Make the requested handler. Raise click.UsageError."""
    return explained(
        lambda: StaticFiles(
            directory,
            index=index,
            listing=listing,
            hidden=hidden,
            follow_symlinks=follow_symlinks,
            cache_control=cache_control,
            log_requests=log_requests,
        ),
        fields=FIELDS,
    )
