"""Metrics for Prometheus, health checks, and a status page, served beside a server or a fleet of workers.

`monitor` puts it beside one server; `process` is what runs beside worker processes, whose master is asked by
`supervisor.monitor_source`. Both serve `web`, which knows neither. `watch` measures inside of the serving process.
"""

from .monitor import Monitor

__all__ = ["Monitor"]
