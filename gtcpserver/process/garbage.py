"""The cyclic garbage collector of a server's process."""

from __future__ import annotations

import gc

#: Python's defaults (700, 10, 10) suit short programs: with thousands of open connections the collector would traverse
#: them over and over, and find nothing, since a connection is not part of a cycle.
GC_THRESHOLDS = (10_000, 20, 50)


def freeze_garbage_collector() -> None:
    """Exempt everything that exists now from the cyclic garbage collector, and make it run less often.

    Modules, functions and classes stay until exit anyway. Cycles created later are still collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
