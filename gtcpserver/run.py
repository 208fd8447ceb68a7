"""run: a whole server program in one call, in this process or in worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .server import Server
from .signatures import ConnectionT, Handler
from .standard_descriptors import open_standard_descriptors
from .stats import StopReport

if TYPE_CHECKING:
    from typing_extensions import Unpack, overload  # which type checkers have

    from .address import ListenAddress
    from .connection import Connection
    from .signatures import RunOptions

if TYPE_CHECKING:
    # To type checkers the handler and the hooks are for connections of connection_class.
    @overload
    def run(
        handler: Handler[Connection] | str,
        address: ListenAddress | list[Any] = ...,
        *,
        bind: ListenAddress | list[Any] | None = ...,
        workers: int | Literal["auto"] | None = ...,
        metrics: str | int | None = ...,
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
        connection_class: type[ConnectionT],
        **options: Unpack[RunOptions[ConnectionT]],
    ) -> StopReport: ...


def run(
    handler: Handler[Any] | str,
    address: ListenAddress | list[Any] = "127.0.0.1:5000",
    *,
    bind: ListenAddress | list[Any] | None = None,
    workers: int | Literal["auto"] | None = None,
    metrics: str | int | None = None,
    **options: Any,
) -> StopReport:
    """Serve until SIGTERM or SIGINT: ``Server(address, handler, **options).serve_forever()``.

    Args:
        handler: called with each connection; or its name, "module:name".
        address: where to listen, as :class:`Server`.
        bind: the same, as the command line calls it.
        workers: serve with so many worker processes ("auto": one for each CPU). A handler given by its name is imported
            by each worker, so that a reload (SIGHUP) finds new code.
        metrics: where metrics, health checks and a status page are served over HTTP, such as "127.0.0.1:9100"; a port
            alone is on 127.0.0.1. None: nowhere.
        **options: as :class:`Server`; with workers, the fields of ``SupervisorConfig`` and the hooks worker_start,
            worker_stop and worker_error as well.

    Raises:
        ConfigError, OSError: as :class:`Server`.
        gtcpserver.supervisor.WorkersCannotStart: no worker could be started.
    """
    open_standard_descriptors()
    # Worker processes and monitoring are not loaded by those who have none.
    from .supervisor.api import check_needs_no_workers, load_name, run_workers

    if bind is not None:
        address = bind
    if workers is not None:
        return run_workers(handler, address, workers=workers, metrics=metrics, **options)
    check_needs_no_workers(options)
    server = Server(address, load_name(handler), **options)
    if metrics is None:
        return server.serve_forever()
    from .monitoring import Monitor

    with Monitor(server, metrics):
        return server.serve_forever()
