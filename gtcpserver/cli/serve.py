"""gtcpserver serve and gtcpserver echo: one server, from the command line to its last report."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click
import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.block_detector import DEFAULT_THRESHOLD, SHORTEST_THRESHOLD, BlockDetector
from gtcpserver.diagnostics.logs import configure_logging
from gtcpserver.errors import ConfigError
from gtcpserver.monitoring import Monitor
from gtcpserver.run_log import log_listening, log_report
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT, Server
from gtcpserver.supervisor import systemd
from gtcpserver.supervisor.lending import NamedFiles
from gtcpserver.supervisor.service_state import service_state_told

from .commands import EPILOG, RunError, describe
from .loading import load_handler, load_wsgi
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
from .process import freeze_garbage_collector, log_stats, raise_descriptor_limit, unblock_signals
from .settings import SettingsCommand, config_option, file_of, warnings_at_start
from .supervise import bound_by_systemd, supervise

log = logging.getLogger("gtcpserver")

Command = TypeVar("Command", bound=Callable[..., Any])


class ThresholdType(OrNone):
    """Of the block detector. Its option may stand alone, but then what follows is taken for its value."""

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
    """Adds --monkey-patch, for commands that run the user's code (`gtcpserver.cli` obeys it)."""
    return click.option(
        "--monkey-patch/--no-monkey-patch",
        default=True,
        show_default=True,
        help="Let the standard library's blocking calls wait on the event loop.",
    )(command)


def process_options(command: Command) -> Command:
    """Adds the options that are about the process and not about the server."""
    options = (
        click.option(
            "--stop-timeout",
            "--graceful-timeout",
            "stop_timeout",
            type=OrNone(float, least=0),
            default=DEFAULT_STOP_TIMEOUT,
            show_default=True,
            help="Seconds handlers get to finish at SIGTERM or SIGINT; none: for ever. A second signal ends them.",
        ),
        click.option(
            "--metrics",
            metavar="ADDRESS",
            help="Serve metrics, health checks and a status page there over HTTP; a port alone is on 127.0.0.1.",
        ),
        click.option(
            "--stats-interval",
            type=OrNone(float, least=0),
            default=0.0,
            show_default=True,
            help="Log the counters every so many seconds; 0 is never.",
        ),
        click.option(
            "--freeze-gc/--no-freeze-gc",
            default=True,
            show_default=True,
            help="After start-up take what is there out of the garbage collector's work, and collect less often.",
        ),
        click.option(
            "--block-detector",
            type=ThresholdType(),
            is_flag=False,
            flag_value=f"{DEFAULT_THRESHOLD:g}",
            default=None,
            metavar="[SECONDS]",
            help="Log with its stack, and count, what blocks the event loop for longer than so many seconds"
            f"  [default: off; alone at the end of the line: {DEFAULT_THRESHOLD:g}]",
        ),
        click.option(
            "--log-level",
            type=click.Choice(LOG_LEVELS),
            default="info",
            show_default=True,
            help="The least that is logged.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="How messages are logged.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=SettingsCommand, epilog=EPILOG)
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option("--wsgi", is_flag=True, help="MODULE:HANDLER is a WSGI application.")
@config_option
@server_options
@supervisor_options
@monkey_patch_option
@process_options
@access_log_options
@click.pass_context
def serve(context: click.Context, /, **_options: Any) -> None:
    """Serve every connection with a function of yours: handler(conn).

    MODULE:HANDLER is module:name, module:object.attribute or path/to/file.py:name. The current directory is searched
    for modules first. It may also be a handler class made for the standard library's socketserver, such as
    http.server:SimpleHTTPRequestHandler, or, with --wsgi, a WSGI application.
    """

    def load() -> Callable[[Any], Any]:
        handler = context.params["handler"]  # now: a reload may have read another one from the file
        return load_wsgi(handler) if context.params["wsgi"] else load_handler(handler)

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
    """Send every client back what it sends: to try the network, a client or the options."""
    serve_with(context, lambda: send_back)


def send_back(conn: Connection) -> None:
    while True:
        with conn.idle():  # a client that stays connected does not hold up a stop
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
    """Serves with the handler that `load` gives, in this process or, with --workers, in others.

    Args:
        reads_files: the handler comes of files, and not of code: at SIGHUP `load` makes another one, also in a single
            process. The old one's ``retire()`` is called then, and it serves the connections that it has.
        files: names the files that `load` needs, besides those of the options.
    """
    fds = systemd.take_listen_fds()
    if fds:
        given = context.params["bind"] if was_given(context, "bind") else ()
        # One that was named as well ("fd:3") is not adopted twice.
        more = [address for address in given if not (address.kind == "fd" and address.fd in fds)]
        context.params["bind"] = (*bound_by_systemd(fds), *more)
    check_addresses(context)
    config = make_supervisor_config(context)
    if config is not None:
        supervise(context, config, load, len(fds), files)
        return
    prepare(context)
    listen = make_listen_config(context)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    server = make_server(context, load(), listen)
    if not os.isatty(0):  # otherwise the signal says that the terminal has gone, and so shall we
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
    """From now on SIGUSR1 and SIGUSR2, which a master obeys, do not end a single process, as they do by default."""
    for number, line in (
        (signal.SIGUSR1, "SIGUSR1: there is no log file to open again; an access log that was renamed is opened anew"),
        (signal.SIGUSR2, "SIGUSR2: an upgrade takes worker processes (--workers 1); nothing was done"),
    ):
        if signal.getsignal(number) is signal.SIG_DFL:  # otherwise the program has a use of its own for it
            signal.signal(number, partial(_log_in_loop, line))


def _log_in_loop(line: str, _number: int, _frame: Any) -> None:
    # A signal handler runs between any two bytecodes, also of a log handler.
    gevent.get_hub().loop.run_callback(log.warning, line)


def obey_hangup(server: Server, load: Callable[[], Callable[[Any], Any]] | None, settings: str | None = None) -> None:
    """From now on SIGHUP reads again what a single process can: the handler's files, and certificates; but not the
    file with the settings."""

    def read_again() -> None:
        try:
            new = load() if load is not None else None
            if server.tls is not None:
                server.reload_tls()
            if new is not None:
                old, server.handler = server.handler, new
                old.retire()  # type: ignore[attr-defined]
        except (ConfigError, click.ClickException) as error:
            message = describe(error) if isinstance(error, click.ClickException) else str(error)
            log.error("SIGHUP: nothing has changed: %s", message)
        except Exception:
            log.exception("SIGHUP: nothing has changed")
        else:
            if settings is not None:
                log.warning("SIGHUP: to read %s again takes worker processes (--workers 1)", settings)
            if load is not None or server.tls is not None:
                log.info("SIGHUP: files were read again")
            else:
                log.warning("SIGHUP: to read the program again takes worker processes (--workers 1); nothing was done")

    loop = gevent.get_hub().loop
    signal.signal(signal.SIGHUP, lambda _number, _frame: loop.run_callback(gevent.spawn, read_again))


def prepare(context: click.Context) -> None:
    """What a process does to itself before it serves alone."""
    configure_logging(context.params["log_level"], context.params["log_format"])
    unblock_signals()
    raise_descriptor_limit()
    for line in warnings_at_start(context):
        log.warning("%s", line)


def serve_until_stopped(context: click.Context, server: Server) -> None:
    """Starts the server, logs where it listens, and logs the report when a signal or --max-accepts has stopped it.

    Raises:
        RunError: the address cannot be had, the listening socket was lost, or a step of the stop failed.
        ConfigError: the address is none this system can listen on.
    """
    monitor = make_monitor(context, server)
    try:
        # First: a server that has begun to serve would lose its clients where this fails.
        if monitor is not None:
            monitor.start()
        if context.params["freeze_gc"]:
            freeze_garbage_collector()  # before, as it takes a while in which a signal would not be a graceful stop yet
        server.start()
        # They run when serve_forever waits, and a signal is then a graceful stop: whoever reads that we listen may
        # send one at once.
        helpers = [gevent.spawn(log_listening, server)]
        if context.params["stats_interval"]:
            helpers.append(gevent.spawn(log_stats, server, context.params["stats_interval"]))
        if context.params["block_detector"]:
            helpers.append(gevent.spawn(BlockDetector(context.params["block_detector"]).start))
        with service_state_told(server):
            report = server.serve_forever(context.params["stop_timeout"])
    except OSError as error:
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
    return None if address is None else explained(lambda: Monitor(server, address), fields=("metrics",))
