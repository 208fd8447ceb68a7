"""run: run a whole server program with one call, in this process or in worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from gevent.monkey import is_module_patched

from .checks import check_number
from .diagnostics.block_detector import DEFAULT_THRESHOLD, PLACES, SHORTEST_THRESHOLD, BlockDetector, start_detector
from .diagnostics.logs import configure_logging, is_logging_configured
from .process.standard_descriptors import open_standard_descriptors
from .run_log import log_listening, log_report, one_line_if_uncaught
from .server.server import DEFAULT_STOP_TIMEOUT, Server
from .server.stats import StopReport
from .signatures import ConnectionT, Handler

if TYPE_CHECKING:
    from typing_extensions import Unpack, overload  # which type checkers have

    from .address import ListenAddress
    from .connection.connection import Connection
    from .signatures import RunOptions

if TYPE_CHECKING:
    # For type checkers the handler and the hooks take connections of connection_class.
    @overload
    def run(
        handler: Handler[Connection] | str,
        address: ListenAddress | list[Any] = ...,
        *,
        bind: ListenAddress | list[Any] | None = ...,
        workers: int | Literal["auto"] | None = ...,
        metrics: str | int | None = ...,
        stop_timeout: float | None = ...,
        monkey_patch: bool = ...,
        block_detector: float | Literal["auto"] | None = ...,
        **options: Unpack[RunOptions],
    ) -> StopReport: ...
    @overload
    def run(
        handler: Handler[ConnectionT] | str,
        address: ListenAddress | list[Any] = ...,
        *,
        bind: ListenAddress | list[Any] | None = ...,
        workers: int | Literal["auto"] | None = ...,
        metrics: str | int | None = ...,
        stop_timeout: float | None = ...,
        monkey_patch: bool = ...,
        block_detector: float | Literal["auto"] | None = ...,
        connection_class: type[ConnectionT],
        **options: Unpack[RunOptions[ConnectionT]],
    ) -> StopReport: ...


@one_line_if_uncaught()
def run(
    handler: Handler[Any] | str,
    address: ListenAddress | list[Any] = "127.0.0.1:5000",
    *,
    bind: ListenAddress | list[Any] | None = None,
    workers: int | Literal["auto"] | None = None,
    metrics: str | int | None = None,
    stop_timeout: float | None = DEFAULT_STOP_TIMEOUT,
    monkey_patch: bool = False,
    block_detector: float | Literal["auto"] | None = "auto",
    **options: Any,
) -> StopReport:
    """Serve until SIGTERM or SIGINT: ``Server(address, handler, **options).serve_forever()``, with log lines.

    The address it listens on and the outcome of the stop are logged (info, logger "gtcpserver"). In a program without
    logging configuration, log lines go to stderr as those of the command line do.

    Under systemd, a unit with ``Type=notify`` is notified when the server listens and when its stop begins.

    Args:
        handler: called with each connection; or its name, "module:name".
        address: where to listen, as :class:`Server`.
        bind: another name of ``address``, as on the command line.
        workers: number of worker processes ("auto": one for each CPU). Each worker imports a handler given by its name,
            so that a reload (SIGHUP) loads new code.
        metrics: address for metrics, health checks and a status page over HTTP, such as "127.0.0.1:9100"; a bare port
            is on 127.0.0.1. None: not served.
        stop_timeout: seconds that handlers get to finish at a stop; None: no limit. With workers it is another name of
            ``graceful_timeout``.
        monkey_patch: patch the standard library as ``gevent.monkey.patch_all()``, unless it is patched; names imported
            before (``from time import sleep``) are patched, too. Objects made before (subclasses of sockets, locks)
            still block: a warning lists those found. A handler given by its name is imported afterwards.
        block_detector: seconds. Code that blocks the event loop for longer, and so all other connections, is logged
            once for each place, with file, line and the cure: see :class:`BlockDetector`. "auto": 0.1 in a program that
            is not monkey-patched, otherwise None; None: no detector.
        **options: as :class:`Server`; with workers, the fields of ``SupervisorConfig`` and the hooks worker_start,
            worker_stop and worker_error as well.

    Raises:
        ConfigError, OSError: as :class:`Server`.
        gtcpserver.supervisor.WorkersCannotStart: no worker could be started.

    A program that does not catch these ends with one line on stderr instead of a traceback, and with the exit status of
    the command line: 2 for a ConfigError, 1 for an OSError, 2 or 3 if no worker could be started.

    Example::

        from gtcpserver import run

        def echo(conn):
            while data := conn.recv(65536):
                conn.sendall(data)

        run(echo, "127.0.0.1:5000", timeout=60, stop_timeout=10)
    """
    open_standard_descriptors()
    check_number("stop_timeout", stop_timeout, least=0, none="to wait forever")
    if block_detector != "auto":
        check_number("block_detector", block_detector, least=SHORTEST_THRESHOLD, none="for no detector")
    if workers is None and not is_logging_configured():
        configure_logging()  # a master has no event loop, and configures logging itself
    if monkey_patch:
        from .process.monkey_patch import patch_all

        patch_all()
    if block_detector == "auto":
        block_detector = None if is_module_patched("socket") else DEFAULT_THRESHOLD
    # Programs without worker processes or monitoring do not load them.
    from .supervisor.api import check_needs_no_workers, load_name, run_workers

    if bind is not None:
        address = bind
    if workers is not None:
        options.setdefault("graceful_timeout", stop_timeout)
        return run_workers(handler, address, workers=workers, metrics=metrics, block_detector=block_detector, **options)
    check_needs_no_workers(options)
    server = Server(address, load_name(handler), **options)
    if metrics is None:
        return _serve(server, stop_timeout, block_detector)
    from .monitoring import Monitor

    with Monitor(server, metrics):
        return _serve(server, stop_timeout, block_detector)


def _serve(server: Server, stop_timeout: float | None, threshold: float | None) -> StopReport:
    from .supervisor.service_state import service_state_told

    detectors: list[BlockDetector | None] = []

    def announce(server: Server) -> None:
        if threshold is not None:
            detectors.append(start_detector(threshold, bytearray(PLACES)))
        log_listening(server)

    server.when_serving = announce
    try:
        with service_state_told(server):
            report = server.serve_forever(stop_timeout)
    finally:
        for detector in detectors:
            if detector is not None:
                detector.stop()
    log_report(report)
    return report
