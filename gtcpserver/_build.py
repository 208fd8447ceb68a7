"""Which modules are compiled, and the record of a build beside them. setup.py reads this file, without the package.

A compiled module is the same ``.py`` file, which Cython compiles by the types of the ``.pxd`` file beside it.
"""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import source_hash

#: In the order of import: what others use comes first. Each has a .pxd file beside it.
MODULES: tuple[str, ...] = (
    "gtcpserver.connection.accepted",
    "gtcpserver.connection.poller",
    "gtcpserver.connection.stream",
    "gtcpserver.connection.blocks",
    "gtcpserver.connection.lingering",
    "gtcpserver.connection.lifecycle",
    "gtcpserver.pool.places",
    "gtcpserver.pool.greenlets",
    "gtcpserver.server.state",
    "gtcpserver.server.capacity",
    "gtcpserver.server.idle",
    "gtcpserver.server.timed_idle",
    "gtcpserver.server.serving",
    "gtcpserver.server.accept_loop",
)

#: The suffix of this Python, such as ".cpython-311-x86_64-linux-gnu.so": builds for several Pythons lie side by side.
SUFFIX = EXTENSION_SUFFIXES[0]

#: First word of the record of a build that failed; the reason follows.
FAILED = "failed:"


def source(name: str) -> str:
    """Return the path of a module's .py file, from the folder of the package."""
    return os.path.join(*name.split(".")[1:]) + ".py"


def library(name: str) -> str:
    """Return the path of a compiled module, from the folder of the package."""
    return source(name).removesuffix(".py") + SUFFIX


def record() -> str:
    """Return the path of the record, from the folder of the package. Each line has the digest and path of a source."""
    return "_build" + SUFFIX.removesuffix(".so") + ".txt"


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return source_hash(file.read()).hex()  # what Python itself compares .pyc files with their sources by


def forced_pure() -> bool:
    """Return whether GTCPSERVER_PURE in the environment, a switch as in docs/settings.md, asks for pure Python."""
    said = os.environ.get("GTCPSERVER_PURE", "").strip().lower()
    return said not in ("", "0", "false", "f", "no", "n", "off")
