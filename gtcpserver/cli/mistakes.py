"""Find every option value that the library rejects, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click

from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.errors import ConfigError
from gtcpserver.listening.config import ListenConfig
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.server.server import Server
from gtcpserver.supervisor.config import SupervisorConfig

from .options import (
    ACME_OPTIONS,
    BALANCER_OPTIONS,
    CLIENT_OPTIONS,
    LISTEN_OPTIONS,
    SERVER_OPTIONS,
    SUPERVISOR_OPTIONS,
    TLS_OPTIONS,
    acme_config,
    of_balancers,
    tls_config,
    was_given,
)


def mistakes(context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield all values that the library rejects, as (parameter, what is wrong with it)."""
    groups: list[tuple[Callable[..., Any], dict[str, str]]] = [
        (_server, {name: name for name, _, _ in SERVER_OPTIONS}),
        (ListenConfig, {name: name for name, _, _ in LISTEN_OPTIONS}),
        (tls_config, {name: f"tls_{name}" for name, _, _ in TLS_OPTIONS}),
        (acme_config, {argument: name for name, argument, _, _ in ACME_OPTIONS}),
        (ClientLimits, {name: f"client_{name}" for name, _, _ in CLIENT_OPTIONS}),
        (ProxyProtocol, {name: of_balancers(name) for name, _, _ in BALANCER_OPTIONS}),
        (SupervisorConfig, {name: name for name, _, _ in SUPERVISOR_OPTIONS}),
    ]
    needs = {tls_config: "certfile", acme_config: "names", ProxyProtocol: "trusted", SupervisorConfig: "workers"}
    for make, names in groups:
        options = {
            name: context.params[parameter]
            for name, parameter in names.items()
            if parameter in context.params and was_given(context, parameter)
        }
        alone = False
        while options and needs.get(make, next(iter(options))) in options:
            try:
                make(**options)
                break
            except ConfigError as error:
                name, _, message = str(error).partition(" ")
                name = name.rstrip(":")
                if name not in options:
                    break  # reported when it is really made
                # Once one value is removed, another that depends on it fails without being a mistake.
                if not alone or ("must " in message and "together" not in message):
                    yield names[name], message.lstrip()
                alone = True
                del options[name]


def _server(**options: Any) -> Server:
    return Server("127.0.0.1:0", lambda _connection: None, **options)
