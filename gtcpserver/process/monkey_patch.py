"""Monkey patching by run(..., monkey_patch=True): after the program's imports, so it checks what was missed."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from gevent import monkey

log = logging.getLogger("gtcpserver")

#: Modules whose waiting functions gevent replaces.
WAITING = (
    "time",
    "socket",
    "ssl",
    "select",
    "selectors",
    "subprocess",
    "threading",
    "_thread",
    "_threading_local",
    "queue",
)

#: Packages that take care of it themselves. In the standard library gevent replaces what is needed.
EXEMPT = frozenset({"gevent", "greenlet", "gtcpserver", *sys.stdlib_module_names})

#: Maximum named in the log line; a reader needs an example, not all of them.
MOST_NAMED = 6


def patch_all() -> None:
    """Monkey-patch the standard library unless the program has done so, and warn about older objects.

    Modules imported earlier (``import time``) are patched like any other, and names in modules (``from time import
    sleep``) are set to their replacements. A subclass, a lock or another object that already exists does not change,
    and blocks.
    """
    if monkey.is_module_patched("socket"):
        return
    before = _MadeBefore()
    with warnings.catch_warnings():
        # gevent warns about names of ssl.SSLContext, which are replaced below.
        warnings.simplefilter("ignore", monkey.MonkeyPatchWarning)
        monkey.patch_all()
    found = sorted(before.replace_names())
    if found:
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        log.warning(
            "monkey_patch=True comes too late for what was made before run(): %s%s; these still block. Name the "
            "handler's module (run('module:handler')), or begin the program with 'from gevent import monkey; "
            "monkey.patch_all()'",
            ", ".join(found[:MOST_NAMED]),
            more,
        )


class _MadeBefore:
    """What the modules of the program and its libraries hold of the unpatched standard library."""

    def __init__(self) -> None:
        self._modules = [
            (name, module)
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and name.partition(".")[0] not in EXEMPT
        ]
        # System locks, and objects built on them.
        self._kinds: tuple[type, ...] = (
            type(threading.Lock()),
            type(threading.RLock()),
            threading.local,
            threading.Condition,
            threading.Event,
            threading.Semaphore,
            queue.Queue,
        )

    def replace_names(self) -> Iterator[str]:
        """Set the names of what was replaced, after patching; yield what cannot be replaced."""
        originals = _originals()
        for module_name, module in self._modules:
            for name, value in list(vars(module).items()):
                if id(value) in originals:
                    vars(module)[name] = originals[id(value)]
                elif isinstance(value, type):
                    # An object of the program, built on what was replaced.
                    if value.__module__ == module_name and any(id(base) in originals for base in value.__mro__):
                        yield f"{module_name}.{name} (a subclass)"
                elif type(value) in self._kinds or id(type(value)) in originals:
                    yield f"{module_name}.{name} (a {type(value).__name__})"


def _originals() -> dict[int, Any]:
    """Return the replacements by the ID of what gevent has replaced."""
    saved: dict[str, dict[str, Any]] = monkey.saved
    return {
        id(original): getattr(sys.modules[module], name)
        for module in WAITING
        for name, original in saved.get(module, {}).items()
        if callable(original) and getattr(sys.modules[module], name, original) is not original
    }
