"""What the TLS examples share: an address and PEM files from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import gevent
from serve import DEFAULT_ADDRESS, end

from gtcpserver import Connection, GtcpServerError, Server, TLSConfig


def serve_tls(
    handler: Callable[[Connection], Any],
    config: Callable[[list[str]], TLSConfig],
    usage: str = "",
    files: Collection[int] = (0,),
    at_once: bool = True,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        handler: called with each connection.
        config: makes the configuration from the files that the command line names.
        usage: names of these files.
        files: how many there may be.
        at_once: encrypt before the handler gets the connection. False: the handler has it as ``conn.context``.
    """
    program, *arguments = sys.argv
    expected = f"[ADDRESS] {usage}".rstrip() if 0 in files else f"ADDRESS {usage}"
    if arguments in (["-h"], ["--help"]):
        print(f"usage: python {program} {expected}    (default address {DEFAULT_ADDRESS})")
        print(sys.modules["__main__"].__doc__)
        sys.exit(0)
    address, *paths = arguments or [DEFAULT_ADDRESS]
    if len(paths) not in files:
        end(2, f"expected {expected}, got {' '.join(arguments) or 'nothing'}")
    try:
        tls = config(paths)
        server = Server(address, handler, tls=tls if at_once else None, context=tls)
        server.start()
    except GtcpServerError as mistake:
        end(2, str(mistake))
    except OSError as problem:
        end(1, str(problem))
    # Printed when serve_forever waits: whoever reads it may send a signal at once.
    gevent.spawn(print, f"listening on {server.address}", flush=True)
    server.serve_forever()
