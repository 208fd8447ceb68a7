"""gtcpserver serve and gtcpserver echo: one server, from the command line to its stop report."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click
import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.block_detector import DEFAULT_THRESHOLD, SHORTEST_THRESHOLD, BlockDetector
from gtcpserver.diagnostics.frames import raised_by_library
from gtcpserver.diagnostics.logs import configure_logging
from gtcpserver.errors import ConfigError
from gtcpserver.monitoring import Monitor
from gtcpserver.run_log import log_listening, log_report
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT, Server
from gtcpserver.supervisor import systemd
from gtcpserver.supervisor.lending import NamedFiles
from gtcpserver.supervisor.service_state import service_state_told

from .commands import EPILOG, RunError, describe
from .loading import find_modules, load_program
from .log_config import configure_log
from .options import (
    OrNone,
    access_log_options,
    check_addresses,
    explained,
    make_listen_config,
    make_server,
    make_supervisor_config,
    name_option,
    server_options,
    supervisor_options,
    was_given,
)
from .process import log_stats, raise_descriptor_limit, unblock_signals
from .reload import reload_options, reloading_on_saves, settle_reload, watched_by
from .settings import SettingsCommand, config_option, file_of, warnings_at_start
from .supervise import bound_by_systemd, supervise

log = logging.getLogger("gtcpserver")

Command = TypeVar("Command", bound=Callable[..., Any])


class ThresholdType(OrNone):
    """Threshold of the block detector. Its option may have no value, but then the next word is taken for it."""

    def __init__(self) -> None:
        super().__init__(float, SHORTEST_THRESHOLD)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return super().convert(value, parameter, context)
        except click.BadParameter as error:
            hint = f"; without a number the option must come last, or as --block-detector={DEFAULT_THRESHOLD}"
            self.fail(error.message + hint, parameter, context)


LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def monkey_patch_option(command: Command) -> Command:
    """Add --monkey-patch, for commands that run the user's code (`gtcpserver.cli` acts on it)."""
    return click.option(
        "--monkey-patch/--no-monkey-patch",
        default=True,
        show_default=True,
        help="Make the standard library's blocking calls wait on the event loop.",
    )(command)


def process_options(command: Command) -> Command:
    """Add the options that concern the process rather than the server."""
    options = (
        click.option(
            "--stop-timeout",
            "--graceful-timeout",
            "stop_timeout",
            type=OrNone(float, least=0),
            default=DEFAULT_STOP_TIMEOUT,
            show_default=True,
            help="Seconds handlers get to finish on SIGTERM or SIGINT; none: no limit. A second signal ends them.",
        ),
        click.option(
            "--metrics",
            metavar="ADDRESS",
            help="Serve metrics, health checks and a status page over HTTP; a port without a host is on 127.0.0.1.",
        ),
        click.option(
            "--stats-interval",
            type=OrNone(float, least=0),
            default=0.0,
            show_default=True,
            help="Log the counters every N seconds; 0: never.",
        ),
        click.option(
            "--freeze-gc/--no-freeze-gc",
            default=True,
            show_default=True,
            help="Exempt everything loaded at startup from the garbage collector, and collect less often.",
        ),
        click.option(
            "--block-detector",
            type=ThresholdType(),
            is_flag=False,
            flag_value=f"{DEFAULT_THRESHOLD:g}",
            default=None,
            metavar="[SECONDS]",
            help="Log, with its stack, and count what blocks the event loop for longer than this many seconds"
            f"  [default: off; without a value, at the end of the line: {DEFAULT_THRESHOLD:g}]",
        ),
        click.option(
            "--log-level",
            type=click.Choice(LOG_LEVELS),
            default="info",
            show_default=True,
            help="Lowest level that is logged.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Format of log lines.",
        ),
        click.option(
            "--log-config",
            metavar="FILE",
            help="Configure logging by this TOML or JSON file, a dictionary as of logging.config.dictConfig.",
        ),
        click.option(
            "--env-file",
            metavar="FILE",
            help="Read environment variables from this file first, a NAME=VALUE per line; those already set stay.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=SettingsCommand, epilog=EPILOG)
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option("--wsgi", is_flag=True, help="MODULE:HANDLER is a WSGI application.")
@click.option("--factory", is_flag=True, help="MODULE:HANDLER is a function that returns the handler or application.")
@click.option("--app-dir", metavar="FOLDER", help="Search modules in this folder first.  [default: the current one]")
@config_option
@server_options
@supervisor_options
@reload_options
@monkey_patch_option
@process_options
@access_log_options
@click.pass_context
def serve(context: click.Context, /, **_options: Any) -> None:
    """Run your handler: handler(conn) is called for every connection.

    MODULE:HANDLER is module:name, module:object.attribute or path/to/file.py:name. Modules are searched in the current
    directory first. The handler may also be a handler class written for the standard library's socketserver, such as
    http.server:SimpleHTTPRequestHandler, or, with --wsgi, a WSGI application.
    """

    def load() -> Callable[[Any], Any]:
        handler = context.params["handler"]  # read late: a reload may have changed it in the file
        return load_program(context.params, handler)

    serve_with(context, load)


@click.command(cls=SettingsCommand, epilog=EPILOG)
@config_option
@server_options
@supervisor_options
@monkey_patch_option
@process_options
@access_log_options
@click.pass_context
def echo(context: click.Context, /, **_options: Any) -> None:
    """Send back to every client what it sends: to test the network, a client or the options."""
    serve_with(context, lambda: send_back)


def send_back(conn: Connection) -> None:
    while True:
        with conn.idle():  # a client that stays connected does not delay a stop
            data = conn.recv(65536)
        if not data:
            return
        conn.sendall(data)


def serve_with(
    context: click.Context,
    load: Callable[[], Callable[[Any], Any]],
    reads_files: bool = False,
    files: Callable[[], NamedFiles] = NamedFiles,
) -> None:
    """Serve with the handler that `load` returns, in this process or, with --workers, in others.

    Args:
        reads_files: the handler is made from files, not code: on SIGHUP `load` makes a new one, even in a single
            process. Then the old one's ``retire(new)`` is called, and it keeps serving the connections it has.
        files: returns the names of the files that `load` needs, besides those in the options.
    """
    fds = systemd.take_listen_fds()
    if fds:
        given = context.params["bind"] if was_given(context, "bind") else ()
        # A descriptor that was also given as an address ("fd:3") is not adopted twice.
        more = [address for address in given if not (address.kind == "fd" and address.fd in fds)]
        context.params["bind"] = (*bound_by_systemd(fds), *more)
    check_addresses(context)
    on_saves = None
    if settle_reload(context):
        on_saves = reloading_on_saves(watched_by(context), str(context.params.get("handler") or ""))
    config = make_supervisor_config(context)
    if config is not None:
        supervise(context, config, load, len(fds), files, on_saves)
        return
    prepare(context)
    listen = make_listen_config(context)
    find_modules(context.params)
    server = make_server(context, load(), listen)
    if not os.isatty(0):  # otherwise the signal means that the terminal is gone, and we stop too
        obey_hangup(server, load if reads_files else None, file_of(context))
    elif signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _stop_gracefully)
    obey_user_signals()
    serve_until_stopped(context, server)


def _stop_gracefully(_number: int, _frame: Any) -> None:
    # The kernel and the shell (bash(1), "SIGNALS") may send one each; a second SIGTERM would end everything at once.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


def obey_user_signals() -> None:
    """Keep SIGUSR1 and SIGUSR2, which are commands to a master, from ending a single process, as they do by default."""
    for number, line in (
        (signal.SIGUSR1, "SIGUSR1: no log file to reopen; a renamed access log is reopened without a signal"),
        (signal.SIGUSR2, "SIGUSR2: an upgrade needs worker processes (--workers 1); nothing was done"),
    ):
        if signal.getsignal(number) is signal.SIG_DFL:  # otherwise the program uses it
            signal.signal(number, partial(_log_in_loop, line))


def _log_in_loop(line: str, _number: int, _frame: Any) -> None:
    # A signal handler runs between any two bytecodes, even inside a log handler.
    gevent.get_hub().loop.run_callback(log.warning, line)


def obey_hangup(server: Server, load: Callable[[], Callable[[Any], Any]] | None, settings: str | None = None) -> None:
    """On SIGHUP, reload what a single process can: the handler's files, and certificates; but not the settings file."""

    def read_again() -> None:
        try:
            new = load() if load is not None else None
            if server.tls is not None:
                server.reload_tls()
            if new is not None:
                old, server.handler = server.handler, new
                old.retire(new)  # type: ignore[attr-defined]
        except (ConfigError, click.ClickException) as error:
            message = describe(error) if isinstance(error, click.ClickException) else str(error)
            log.error("SIGHUP: nothing has changed: %s", message)
        except Exception:
            log.exception("SIGHUP: nothing has changed")
        else:
            if settings is not None:
                log.warning("SIGHUP: reloading %s needs worker processes (--workers 1)", settings)
            if load is not None or server.tls is not None:
                log.info("SIGHUP: files reloaded")
            else:
                log.warning("SIGHUP: reloading the program needs worker processes (--workers 1); nothing was done")

    loop = gevent.get_hub().loop
    signal.signal(signal.SIGHUP, lambda _number, _frame: loop.run_callback(gevent.spawn, read_again))


def prepare(context: click.Context) -> None:
    """Prepare this process for serving on its own."""
    configure_logging(context.params["log_level"], context.params["log_format"])
    configure_log(context)
    unblock_signals()
    raise_descriptor_limit()
    for line in warnings_at_start(context):
        log.warning("%s", line)


def serve_until_stopped(context: click.Context, server: Server) -> None:
    """Start the server, log where it listens, and log the report when a signal or --max-accepts has stopped it.

    Raises:
        RunError: the address is not available, the listening socket was lost, or a step of the stop failed.
        ConfigError: this system cannot listen on the address.
    """
    monitor = make_monitor(context, server)
    try:
        # First: if this fails later, a server that already serves would lose its clients.
        if monitor is not None:
            monitor.start()
        server.start()
        # These run when serve_forever waits, and a signal is a graceful stop from then on: anyone who reads that we
        # listen may send one at once.
        helpers = [gevent.spawn(log_listening, server)]
        if context.params["stats_interval"]:
            helpers.append(gevent.spawn(log_stats, server, context.params["stats_interval"]))
        if context.params["block_detector"]:
            helpers.append(gevent.spawn(BlockDetector(context.params["block_detector"]).start))
        with service_state_told(server):
            report = server.serve_forever(context.params["stop_timeout"])
    except OSError as error:
        if not raised_by_library(error):  # in on_start
            raise
        raise RunError(f"cannot listen: {name_option(error.strerror or str(error))}") from None
    finally:
        if monitor is not None:
            monitor.stop()
    gevent.killall(helpers)
    log_report(report)
    if report.failures:
        raise RunError(f"the stop was not complete: {'; '.join(report.failures)}")


def make_monitor(context: click.Context, server: Server) -> Monitor | None:
    address = context.params["metrics"]
    name = str(context.params.get("handler") or context.info_name)
    return None if address is None else explained(lambda: Monitor(server, address, name=name), fields=("metrics",))
