"""The choice between the compiled modules and the same ones in pure Python, made before any of them is imported.

All are compiled or all are pure: compiled ones call each other in C.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

from ._build import FAILED, MODULES, digest, forced_pure, library, record, source

_FOLDER = os.path.dirname(__file__)


class _PureFinder:
    """Finds the .py files of the modules, where Python's own finder prefers the compiled ones beside them."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_file_location(name, os.path.join(_FOLDER, source(name))) if name in MODULES else None


def _choose() -> str | None:
    """Import the compiled modules. Where they cannot be used, see to it that the pure ones will be; return why."""
    pure = "GTCPSERVER_PURE is set" if forced_pure() else _missing()
    if pure is None:
        before = set(sys.modules)
        try:
            pure = _mismatch()
            if pure is None:
                for name in MODULES:
                    import_module(name)
        except Exception as error:  # of dlopen(3), of what they import, or another layout of greenlet's objects
            pure = f"{type(error).__name__}: {error}"
            _forget(set(sys.modules) - before)
        if pure is None:
            return None
        warnings.warn(f"gtcpserver runs in pure Python: {pure}", RuntimeWarning, stacklevel=4)
    if any(os.path.exists(os.path.join(_FOLDER, library(name))) for name in MODULES):
        sys.meta_path.insert(0, _PureFinder)
    return pure


def _missing() -> str | None:
    """Return why there is nothing compiled: an ordinary state, which nobody is warned of."""
    try:
        with open(os.path.join(_FOLDER, record()), encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
    except OSError:
        first = ""
    if not (first and MODULES):
        return "nothing is compiled for this Python"
    return f"compiling {first}" if first.startswith(FAILED) else None


def _mismatch() -> str | None:
    """Return what is not as it was built: a compiled module that is missing, or a source that was edited."""
    for name in MODULES:
        if not os.path.exists(os.path.join(_FOLDER, library(name))):
            return f"{library(name)} is missing"
    with open(os.path.join(_FOLDER, record()), encoding="utf-8") as file:
        for line in file:
            built, _, path = line.strip().partition(" ")
            try:
                found = digest(os.path.join(_FOLDER, path))
            except FileNotFoundError:  # a distribution without sources
                continue
            if found != built:
                return f"{path} has changed since it was compiled; install gtcpserver again, or `make compiled`"
    return None


def _forget(names: set[str]) -> None:
    """Undo imports, so that nothing holds what a compiled module defined."""
    package = __name__.partition(".")[0]
    for name in names:
        if name.startswith(package + "."):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent == package:
                vars(sys.modules[package]).pop(child, None)


#: Why the pure modules are used, in a few words; None if the compiled ones are.
why_pure: str | None = _choose()

#: Whether the hot path runs compiled in this process.
compiled: bool = why_pure is None
