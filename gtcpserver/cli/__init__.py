"""The gtcpserver command. `main` is its entry; a further command is one line in `commands.COMMANDS` and one module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# The commands that run a user's blocking code, which has to wait on gevent's loop.
MONKEY_PATCHED = ("serve", "echo")


def main() -> None:
    """Runs the command given in sys.argv and exits: 0 done, 1 it failed at work, 2 it was called wrongly."""
    arguments = sys.argv[1:]
    if wants_monkey_patch(arguments):
        # Before anything else is imported: what binds `socket.socket` or `threading.local` by name while it is being
        # imported, as the user's module or a library of his may, keeps the blocking one for good.
        from gevent import monkey

        monkey.patch_all()
    try:
        import click  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print('the command line needs click: pip install "gtcpserver[cli]"', file=sys.stderr)
        sys.exit(2)
    from gtcpserver.cli.commands import run

    sys.exit(run(arguments))


def wants_monkey_patch(arguments: Sequence[str]) -> bool:
    """Reads --monkey-patch/--no-monkey-patch ahead of click, which must be imported after the patch."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command not in MONKEY_PATCHED or "--help" in arguments:
        return False
    flags = [argument for argument in arguments if argument in ("--monkey-patch", "--no-monkey-patch")]
    return not flags or flags[-1] == "--monkey-patch"
