"""gtcpserver files: a static file server."""

from __future__ import annotations

from typing import Any

import click

from gtcpserver.cli.commands import EPILOG
from gtcpserver.cli.options import explained, server_options, supervisor_options
from gtcpserver.cli.serve import process_options, serve_with
from gtcpserver.static_files import StaticFiles

FIELDS = ("index", "cache_control")


@click.command(epilog=EPILOG)
@click.argument("directory", default=".")
@click.option(
    "--index", default="index.html", show_default=True, metavar="NAME", help="The file that stands for its directory."
)
@click.option(
    "--listing/--no-listing", default=False, help="List directories that have no index.  [default: no-listing]"
)
@click.option("--hidden/--no-hidden", default=False, help="Serve names that begin with a dot.  [default: no-hidden]")
@click.option(
    "--follow-symlinks/--no-follow-symlinks",
    default=False,
    help="Follow symbolic links that lead out of the directory.  [default: no-follow-symlinks]",
)
@click.option("--cache-control", metavar="VALUE", help='Cache-Control header for files, such as "max-age=3600".')
@click.option("--access-log/--no-access-log", default=False, help="Log each request.  [default: no-access-log]")
@server_options
@supervisor_options
@process_options
@click.pass_context
def files(
    context: click.Context,
    /,
    directory: str,
    index: str,
    listing: bool,
    hidden: bool,
    follow_symlinks: bool,
    cache_control: str | None,
    access_log: bool,
    **_options: Any,
) -> None:
    """Serve the files of DIRECTORY (here, if none is given) over HTTP.

    GET and HEAD, with ranges and conditions. Files are sent by sendfile(2). Nothing outside of the directory is served.
    """
    handler = explained(
        lambda: StaticFiles(
            directory,
            index=index,
            listing=listing,
            hidden=hidden,
            follow_symlinks=follow_symlinks,
            cache_control=cache_control,
            access_log=access_log,
        ),
        fields=FIELDS,
    )
    serve_with(context, lambda: handler)
