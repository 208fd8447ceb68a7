"""What the examples share: the address from the command line, one line when ready, one line for a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gtcpserver import GtcpServerError, Server


def serve(handler: Callable[[Any], Any], default: str = "127.0.0.1:5000", **options: Any) -> int:
    """Serve on the address that the command line names; returns the exit status."""
    arguments = sys.argv[1:]
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: python {sys.argv[0]} [ADDRESS]    (default {default})", file=sys.stderr)
        return 2
    try:
        server = Server(arguments[0] if arguments else default, handler, **options)
        server.start()
    except GtcpServerError as mistake:
        print(f"{sys.argv[0]}: {mistake}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"{sys.argv[0]}: {problem}", file=sys.stderr)
        return 1
    print(f"listening on {server.address}", flush=True)
    report = server.serve_forever()
    for connection in report.cut:
        print(f"cut: {connection}", file=sys.stderr)
    return 0
