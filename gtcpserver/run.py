"""run: a whole server program in one call, in this process or in worker processes."""

from __future__ import annotations

from typing import Any, Literal

from .server import Handler, Server
from .standard_descriptors import open_standard_descriptors
from .stats import StopReport


def run(
    handler: Handler | str,
    address: Any = "127.0.0.1:5000",
    *,
    bind: Any = None,
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
    from .supervisor.api import load_name, run_workers

    if bind is not None:
        address = bind
    if workers is not None:
        return run_workers(handler, address, workers=workers, metrics=metrics, **options)
    server = Server(address, load_name(handler), **options)
    if metrics is None:
        return server.serve_forever()
    from .monitoring import Monitor

    with Monitor(server, metrics):
        return server.serve_forever()
