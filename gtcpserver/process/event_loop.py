"""Check that gevent's event loop is a supported one."""

from __future__ import annotations

import gevent

from gtcpserver.errors import ConfigError


def check_event_loop() -> None:
    """Refuse libuv.

    A connection keeps one read watcher started for life (see `stream`). On libuv, gevent's watchers share one poll
    handle per descriptor, and closing a connection would print a traceback. libev works, compiled or by CFFI.

    Raises:
        ConfigError: gevent is set to use libuv.
    """
    loop = gevent.config.loop
    if loop.__module__.startswith("gevent.libuv"):
        raise ConfigError(
            "gevent's event loop must be libev, GEVENT_LOOP=libuv is not supported: unset it, or set GEVENT_LOOP=libev"
        )
