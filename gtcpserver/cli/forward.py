"""gtcpserver forward: a TCP port forwarder."""

from __future__ import annotations

import ssl
from typing import Any

import click
import gevent.ssl

from gtcpserver.forwarder import Forwarder

from .commands import EPILOG
from .options import (
    AddressType,
    OrNone,
    access_log_options,
    explained,
    handover_options,
    server_options_but_bind,
    supervisor_options,
)
from .serve import process_options, serve_with
from .settings import SettingsCommand, config_option, made_anew

FIELDS = ("balance", "connect_timeout", "idle_timeout", "send_proxy")


@click.command(cls=SettingsCommand, epilog=EPILOG)
@click.argument("bind", metavar="LISTEN", type=AddressType())
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True)
@click.option(
    "--balance",
    type=click.Choice(["first", "round-robin", "least"]),
    default="first",
    show_default=True,
    help="Which target to try first: the first one, each in turn, or the one with the fewest connections.",
)
@click.option(
    "--connect-timeout",
    type=float,
    default=5.0,
    show_default=True,
    help="Seconds to wait for each target before trying the next one.",
)
@click.option(
    "--idle-timeout",
    type=OrNone(float),
    default=None,
    help="Seconds without data from either side until a connection is ended; none: no limit.  [default: none]",
)
@click.option(
    "--send-proxy",
    type=click.Choice(["v1", "v2"]),
    help="Send the client's address to the targets in a PROXY header of this version; they must expect it.",
)
@click.option("--target-tls/--no-target-tls", default=False, help="Speak TLS with the targets, and verify them.")
@click.option(
    "--target-cafile",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="PEM file with the CAs that may have issued a target's certificate.  [default: the system's]",
)
@config_option
@handover_options("Move connections without TLS of a worker that leaves to another.")
@server_options_but_bind
@supervisor_options
@process_options
@access_log_options
@click.pass_context
def forward(context: click.Context, /, **_options: Any) -> None:
    """Forward every connection on LISTEN to the first TARGET that accepts it.

    Large flows are moved by splice(2), bypassing the program. A target that fails is set aside for a while; a client
    with no target left is reset.
    """
    load = made_anew(context, lambda: make_forwarder(**context.params))
    context.params["bind"] = (context.params["bind"],)  # a tuple, as from --bind, to which systemd's sockets are added
    serve_with(context, load)


def make_forwarder(
    *,
    targets: tuple[str, ...],
    balance: Any,
    connect_timeout: float,
    idle_timeout: float | None,
    send_proxy: Any,
    target_tls: bool,
    target_cafile: str | None,
    **_options: Any,
) -> Forwarder:
    """Make the requested handler. Raise click.UsageError."""
    if target_cafile and not target_tls:
        raise click.UsageError("--target-cafile: needs --target-tls")
    nameless = [target for target in targets if target.startswith("unix:")]
    if target_tls and nameless:
        raise click.UsageError(f"--target-tls: {nameless[0]} has no host name to check its certificate against")
    tls = None
    if target_tls:
        # gevent's own class, whether the program is patched or not; it verifies certificates and names.
        tls = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if target_cafile is None:
            tls.load_default_certs()
        else:
            try:
                tls.load_verify_locations(target_cafile)
            except OSError as error:
                raise click.UsageError(
                    f"--target-cafile: cannot read certificates from {target_cafile}: {error}"
                ) from None
    return explained(
        lambda: Forwarder(
            targets,
            balance=balance,
            connect_timeout=connect_timeout,
            idle_timeout=idle_timeout,
            tls=tls,
            send_proxy=send_proxy,
        ),
        fields=FIELDS,
    )
