"""Metrics for Prometheus, health checks, and a status page, served beside a server or a fleet of workers.

`monitor` serves it beside one server. `process` is its counterpart beside worker processes; it asks their master
through `supervisor.monitor_source`. Both serve `web`, which depends on neither. `watch` measures in the serving
process.
"""

from .monitor import Monitor

__all__ = ["Monitor"]
