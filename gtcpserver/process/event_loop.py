"""Which of gevent's event loops can be used."""

from __future__ import annotations

import gevent

from gtcpserver.errors import ConfigError


def check_event_loop() -> None:
    """Refuse libuv.

    A connection keeps one read watcher started for life (see `stream`). On libuv, gevent hands out shares of one poll
    handle a descriptor instead of watchers, and to close a connection would print a traceback. libev works, compiled
    or by CFFI.

    Raises:
        ConfigError: gevent is set to use libuv.
    """
    loop = gevent.config.loop
    if loop.__module__.startswith("gevent.libuv"):
        raise ConfigError(
            "gevent's event loop must be libev, GEVENT_LOOP=libuv is not supported: unset it, or set GEVENT_LOOP=libev"
        )
