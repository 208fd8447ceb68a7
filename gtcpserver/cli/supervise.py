"""serve and echo with --workers: a master and its worker processes, from the command line to the last report."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import click
import gevent

from gtcpserver.address import Address
from gtcpserver.block_detector import BlockDetector
from gtcpserver.cli.commands import RunError, describe
from gtcpserver.cli.loading import load_callable
from gtcpserver.cli.options import (
    HOOK_OPTIONS,
    explained,
    flag,
    make_listen_config,
    make_server,
    name_option,
    was_given,
)
from gtcpserver.cli.process import freeze_garbage_collector, log_stats, raise_descriptor_limit
from gtcpserver.errors import ConfigError
from gtcpserver.server import Server
from gtcpserver.supervisor import CannotStart, Hooks, LogStyle, Master, Program, SupervisorConfig, WorkersCannotStart
from gtcpserver.tls import self_signed


class StartError(RunError):
    """No worker could be started: its error, and its exit status."""

    def __init__(self, error: WorkersCannotStart) -> None:
        wrong_call = error.status == 2
        super().__init__(str(error) if wrong_call else f"workers cannot start: {error}", error.details)
        self.exit_code = error.status  # type: ignore[misc]


def supervise(
    context: click.Context, config: SupervisorConfig, load: Callable[[], Callable[[Any], Any]], listen_fds: int
) -> None:
    """Serves with worker processes until told to stop.

    Args:
        load: gives the handler; it is called in each worker, so that a reload finds new code.
        listen_fds: how many of the addresses came from systemd.

    Raises:
        RunError: with exit status 3 (2 for a wrong call) where no worker could be started, otherwise 1.
    """
    raise_descriptor_limit()
    listen = make_listen_config(context)
    style = LogStyle(context.params["log_level"], context.params["log_format"])
    if context.params["tls_self_signed"]:
        _make_one_certificate(context)
    loaded: list[Callable[[Any], Any]] = []

    def preload() -> None:
        _find_modules()
        loaded.append(_told_to_the_master(load))

    def build(sockets: list[socket.socket]) -> tuple[Server, Hooks]:
        _find_modules()
        context.params["bind"] = tuple(sockets)

        def make() -> tuple[Server, Hooks]:
            server = make_server(context, loaded[0] if loaded else load(), listen)
            hooks = {
                name: load_callable(context.params[name], flag(name), arguments)
                for name, arguments, _ in HOOK_OPTIONS
                if was_given(context, name)
            }
            return server, Hooks(**hooks)

        server, hooks = _told_to_the_master(make)
        if context.params["stats_interval"]:
            gevent.spawn(log_stats, server, context.params["stats_interval"])
        if context.params["block_detector"]:
            # When the loop runs: to import the program and start takes its time.
            gevent.spawn(BlockDetector(context.params["block_detector"]).start)
        return server, hooks

    program = Program(
        addresses=list(context.params["bind"]),
        listen=listen,
        build=build,
        preload=preload,
        settle=freeze_garbage_collector if context.params["freeze_gc"] else None,
        log_style=style,
    )
    try:
        Master(program, config).run(listen_fds)
    except WorkersCannotStart as error:
        raise StartError(error) from None
    except OSError as error:
        raise RunError(f"cannot start: {name_option(error.strerror or str(error))}") from None


def _told_to_the_master(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except RunError as error:
        raise CannotStart(error.message, error.details) from None
    except click.ClickException as error:
        raise CannotStart(describe(error), status=2) from None
    except ConfigError as error:
        raise CannotStart(str(error), status=2) from None


def _find_modules() -> None:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _make_one_certificate(context: click.Context) -> None:
    # One for all workers: a client that has accepted it meets it again.
    if was_given(context, "tls_certfile"):
        raise click.UsageError("--tls-self-signed: cannot be used together with --tls-certfile")
    made = explained(self_signed)
    for name, path in (("tls_certfile", made.certfile), ("tls_keyfile", made.keyfile)):
        context.params[name] = path
        context.set_parameter_source(name, click.core.ParameterSource.COMMANDLINE)
    context.params["tls_self_signed"] = False
    click.echo(
        "gtcpserver: a self-signed certificate for localhost was made, which clients cannot trust; only for trying",
        err=True,
    )


def bound_by_systemd(fds: list[int]) -> tuple[Address, ...]:
    """The addresses of descriptors that systemd has opened."""
    return tuple(Address("fd", fd=fd) for fd in fds)
