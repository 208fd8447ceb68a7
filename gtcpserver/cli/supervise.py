"""serve and echo with --workers: a master and its worker processes, from the command line to the stop report."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click
import gevent

from gtcpserver.address import Address
from gtcpserver.diagnostics.block_detector import BlockDetector
from gtcpserver.errors import ConfigError, GtcpServerError
from gtcpserver.files.trusted_path import UntrustedPath, check_content
from gtcpserver.server.server import Server
from gtcpserver.supervisor import (
    CannotStart,
    Hooks,
    LogStyle,
    Master,
    Program,
    SupervisorConfig,
    WorkersCannotStart,
    current_worker,
)
from gtcpserver.supervisor.lending import NamedFiles
from gtcpserver.supervisor.log_files import log_in_master

from .commands import RunError, describe
from .loading import find_modules, load_hook
from .log_config import configure_log
from .options import (
    HOOK_OPTIONS,
    SUPERVISOR_OPTIONS,
    flag,
    make_listen_config,
    make_self_signed,
    make_server,
    name_option,
    was_given,
)
from .process import log_stats, raise_descriptor_limit
from .settings import FIXED, file_of, read_again, told, warnings_at_start

log = logging.getLogger("gtcpserver")

SELF_SIGNED = "gtcpserver.self_signed"

#: Options by the beginning of the master's messages about their files.
OPTION_OF = {"PID file ": "--pid-file: ", "log file ": "--log-file: ", "control socket ": "--control: "}


class StartError(RunError):
    """No worker could be started; has its error, and its exit status."""

    def __init__(self, error: WorkersCannotStart) -> None:
        wrong_call = error.status == 2
        super().__init__(str(error) if wrong_call else f"workers cannot start: {error}", error.details)
        self.exit_code = error.status  # type: ignore[misc]


def supervise(
    context: click.Context,
    config: SupervisorConfig,
    load: Callable[[], Callable[[Any], Any]],
    listen_fds: int,
    files: Callable[[], NamedFiles] = NamedFiles,
    around: AbstractContextManager[None] | None = None,
) -> None:
    """Serve with worker processes until told to stop.

    Args:
        load: returns the handler; it is called in each worker, so that a reload finds new code.
        listen_fds: number of addresses that came from systemd.
        files: returns the names of the files that `load` needs, besides those in the options.
        around: entered for as long as the master runs.

    Raises:
        RunError: with exit status 3 (2 for a usage error) if no worker could be started, otherwise 1.
    """
    raise_descriptor_limit()
    style = LogStyle(context.params["log_level"], context.params["log_format"])
    log_in_master(style)
    configure_log(context)
    for line in warnings_at_start(context):
        log.warning("%s", line)
    listen = make_listen_config(context)
    if context.params["tls_self_signed"]:
        _make_one_certificate(context)
    loaded: list[Callable[[Any], Any]] = []

    def preload() -> None:
        find_modules(context.params)
        loaded.append(_told_to_the_master(load, context))

    def prepare() -> NamedFiles:
        if file_of(context) is not None:
            read_settings_again(context)
        if config.user is None:
            return NamedFiles()
        more = files()
        named = NamedFiles([*_files_to_read(context), *more.read], [*_files_to_append(context), *more.append])
        return named if _only_root_has_named(context, named) else NamedFiles()

    def build(sockets: list[socket.socket]) -> tuple[Server, Hooks]:
        find_modules(context.params)

        def make() -> tuple[Server, Hooks]:
            context.params["bind"] = tuple(sockets)
            server = make_server(context, loaded[0] if loaded else load(), listen)
            hooks = {
                name: load_hook(name, context.params[name], flag(name))
                for name, _ in HOOK_OPTIONS
                if was_given(context, name)
            }
            return server, Hooks(**hooks)

        server, hooks = _told_to_the_master(make, context)
        if context.params["stats_interval"]:
            gevent.spawn(log_stats, server, context.params["stats_interval"])
        if context.params["block_detector"]:
            # Only when the loop runs: importing the program and starting take a while.
            gevent.spawn(BlockDetector(context.params["block_detector"]).start)
        return server, hooks

    program = Program(
        addresses=list(context.params["bind"]),
        listen=listen,
        build=build,
        preload=preload,
        name=str(context.params.get("handler") or context.info_name),
        log_style=style if context.params["log_config"] is None else None,
        prepare=lambda: _told_to_the_master(prepare, context),
    )
    try:
        with around or nullcontext():
            Master(program, config).run(listen_fds)
    except WorkersCannotStart as error:
        raise StartError(error) from None
    except ConfigError:
        raise
    except GtcpServerError as error:  # it cannot take over from another master
        raise RunError(str(error)) from None
    except OSError as error:
        message = name_option(error.strerror or str(error))
        option = next((option for what, option in OPTION_OF.items() if message.startswith(what)), "")
        raise RunError(f"cannot start: {option}{message}") from None


def read_settings_again(context: click.Context) -> None:
    """Read the settings file again in a new worker, so that a reload applies changes; log those it cannot apply."""
    certificate = {} if context.params["tls_self_signed"] else {**context.meta.get(SELF_SIGNED, {})}
    changed = read_again(context, FIXED | {name for name, _, _ in SUPERVISOR_OPTIONS})
    if certificate and context.params["tls_self_signed"]:
        _use_certificate(context, certificate)
    worker = current_worker()
    if worker is not None and worker.number != 0:
        return  # one of them reports it for all
    for key in changed:
        if key == "workers":
            takes = "gtcpserver ctl scale, or a restart"  # an upgrade keeps the current number
        else:
            # An upgrade takes sockets over unchanged.
            takes = "a restart" if key.startswith("listen.") else "an upgrade (SIGUSR2) or a restart"
        log.warning("%s: %s changed: that takes %s", context.obj.path, key, takes)


def _files_to_read(context: click.Context) -> list[str]:
    names = ("tls_certfile", "tls_keyfile", "tls_client_ca", "tls_crl")
    found = [context.params[name] for name in names] + [path for _, *pair in context.params["tls_sni"] for path in pair]
    return [str(path) for path in (*found, file_of(context)) if path]


def _files_to_append(context: click.Context) -> list[str]:
    path = context.params.get("access_log_file")
    return [path] if path else []


def _only_root_has_named(context: click.Context, named: NamedFiles) -> bool:
    """Return whether no other user could have made a worker name a file of root's, through a file with settings."""
    for path in (file_of(context), context.params.get("config")):
        try:
            if path and (named.read or named.append):
                check_content(path)
        except (OSError, UntrustedPath) as error:
            worker = current_worker()
            if worker is None or worker.number == 0:  # one of them reports it for all
                log.warning("files that only root may open are not lent to workers: %s", error)
            return False
    return True


def _told_to_the_master(make: Callable[[], Any], context: click.Context) -> Any:
    try:
        return make()
    except RunError as error:
        raise CannotStart(error.message, error.details) from None
    except click.ClickException as error:
        raise CannotStart(told(context, describe(error)), status=2) from None
    except ConfigError as error:
        raise CannotStart("; ".join(str(error).splitlines()), status=2) from None


def _make_one_certificate(context: click.Context) -> None:
    # One for all workers: a client that accepted it must meet it again.
    made = make_self_signed(context)
    context.meta[SELF_SIGNED] = {"tls_certfile": made.certfile, "tls_keyfile": made.keyfile}
    _use_certificate(context, context.meta[SELF_SIGNED])


def _use_certificate(context: click.Context, certificate: Mapping[str, Any]) -> None:
    for name, path in certificate.items():
        context.params[name] = path
        context.set_parameter_source(name, click.core.ParameterSource.COMMANDLINE)
    context.params["tls_self_signed"] = False


def bound_by_systemd(fds: list[int]) -> tuple[Address, ...]:
    """Return the addresses of the descriptors that systemd has opened."""
    return tuple(Address("fd", fd=fd) for fd in fds)
