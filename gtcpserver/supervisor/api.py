"""`gtcpserver.run(..., workers=...)`: the command line's function, for a program that is its own main module."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterable
from mmap import mmap
from typing import Any

import gevent

from gtcpserver.address import parse_address
from gtcpserver.callables import full_name_of
from gtcpserver.diagnostics.block_detector import PLACES, start_detector
from gtcpserver.diagnostics.frames import raised_by_library
from gtcpserver.diagnostics.logs import is_logging_configured
from gtcpserver.errors import ConfigError
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.server.access_log import AccessLog
from gtcpserver.server.server import Server
from gtcpserver.server.stats import StopReport
from gtcpserver.tls import TLSConfig
from gtcpserver.tls.contexts import watched_files

from .config import SupervisorConfig
from .lending import NamedFiles
from .log_files import LogStyle
from .master import Master
from .program import Program
from .worker import CannotStart, Hooks

CONFIG_FIELDS = frozenset(field.name for field in dataclasses.fields(SupervisorConfig))
HOOK_FIELDS = frozenset(field.name for field in dataclasses.fields(Hooks))


def run_workers(
    handler: Callable[[Any], Any] | str, address: Any, *, block_detector: float | None = None, **options: Any
) -> StopReport:
    """Serve with worker processes until told to stop; see :func:`gtcpserver.run`.

    Args:
        handler: a callable, which workers inherit as it is, or "module:name", which each worker imports.
        address: address as for Server; a list for several.
        block_detector: threshold in seconds of each worker's BlockDetector; None for no detector.
        **options: fields of SupervisorConfig and Hooks (hooks may be names too), and options of Server.

    Raises:
        ConfigError: an option is invalid.
        OSError: an address is unavailable.
        WorkersCannotStart: no worker could start.
    """
    config = SupervisorConfig(**{name: options.pop(name) for name in CONFIG_FIELDS & options.keys()})
    hooks = {name: options.pop(name) for name in HOOK_FIELDS & options.keys()}
    if config.relieve_lagging and not options.get("handover"):
        raise ConfigError("relieve_lagging needs handover")
    if "accept_loops" in options:
        raise ConfigError("accept_loops cannot be used together with workers")
    listen = options.get("listen") or ListenConfig()
    # Report a mistake in the options here, once, and not in each worker.
    Server("127.0.0.1:0", _nobody if isinstance(handler, str) else handler, **options)
    Hooks(**{name: hook for name, hook in hooks.items() if not isinstance(hook, str)})
    addresses = [_parse(one) for one in (address if isinstance(address, list) else [address])]

    def build(sockets: list[socket.socket]) -> tuple[Server, Hooks]:
        try:
            loaded = {name: load_name(hook) for name, hook in hooks.items()}
            return Server(list(sockets), load_name(handler), **options), Hooks(**loaded)
        except ConfigError as error:
            if not raised_by_library(error):
                raise
            raise CannotStart("; ".join(str(error).splitlines()), status=2) from None

    def preload() -> None:
        for reference in (handler, *hooks.values()):
            load_name(reference)

    def name_files() -> NamedFiles:
        tls, access_log = options.get("tls"), options.get("access_log")
        return NamedFiles(
            list(watched_files(tls)) if isinstance(tls, TLSConfig) else [],
            access_log.files if isinstance(access_log, AccessLog) else [],
        )

    reported = mmap(-1, PLACES)  # shared, so that each place is reported by one worker only

    def watch_event_loop() -> None:
        if block_detector is not None:
            # Only once the loop runs: the worker's start takes time.
            gevent.spawn(start_detector, block_detector, reported)

    program = Program(
        addresses=addresses,
        listen=listen,
        build=build,
        preload=preload,
        preloaded=not isinstance(handler, str),
        settle=watch_event_loop,
        prepare=name_files,
        name=handler if isinstance(handler, str) else full_name_of(handler),
        # Keep logging that the program has configured.
        log_style=None if is_logging_configured() else LogStyle(),
    )
    fleet = Master(program, config).run()
    return StopReport(fleet.finished, fleet.ended)


def check_needs_no_workers(options: Iterable[str]) -> None:
    """Raise ConfigError for an option that requires worker processes."""
    for name in options:
        if name in CONFIG_FIELDS | HOOK_FIELDS:
            raise ConfigError(f"{name} needs workers; workers=1 is a master with one worker")


def load_name(reference: Any) -> Any:
    """Return the object named by "module:name" or "module:object.attribute"; return anything but text unchanged.

    Raises:
        ConfigError: no such object exists.
    """
    if not isinstance(reference, str):
        return reference
    module_name, colon, attributes = reference.partition(":")
    if not (module_name and colon and attributes):
        raise ConfigError(f'handler and hooks must be callable or "module:name", got {reference!r}')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module_name)
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            raise ConfigError(f"{reference!r}: {module_name} has no {attribute!r}") from None
    return found


def _parse(address: Any) -> Any:
    return address if hasattr(address, "getsockname") else parse_address(address)


def _nobody(_connection: Any) -> None:
    """Stand in for a handler that is imported later."""
