"""What the examples share: an address from the command line, a line when it is ready, a line for a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import gevent

from gtcpserver import GtcpServerError, Server, parse_address

DEFAULT_ADDRESS = "127.0.0.1:5000"


def start(handler: Callable[[Any], Any], prepare: Callable[[], None] | None = None, **options: Any) -> Server:
    """A server on the address that the command line names. Ends the program where that cannot be.

    Args:
        prepare: called first, but after a mistake in the command line was told.
    """
    program, *arguments = sys.argv
    if arguments in (["-h"], ["--help"]):
        print(f"usage: python {program} [ADDRESS]    (default {DEFAULT_ADDRESS})")
        print(sys.modules["__main__"].__doc__)
        sys.exit(0)
    if len(arguments) > 1:
        end(2, f"expected one ADDRESS at most, got {' '.join(arguments)}")
    try:
        address = parse_address(arguments[0] if arguments else DEFAULT_ADDRESS)
        server = Server(address, handler, **options)
        if prepare is not None:
            prepare()
        server.start()
    except GtcpServerError as mistake:
        end(2, str(mistake))
    except OSError as problem:
        end(1, str(problem))
    # Printed when serve_forever waits: whoever reads it may send a signal at once.
    gevent.spawn(print, f"listening on {server.address}", flush=True)
    return server


def serve(handler: Callable[[Any], Any], **options: Any) -> None:
    """Serve until SIGTERM or SIGINT, which let the handlers finish."""
    start(handler, **options).serve_forever()


def end(status: int, message: str) -> NoReturn:
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    sys.exit(status)
