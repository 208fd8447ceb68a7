"""The gtcpserver command. `main` is its entry point; a new command takes a line in `commands.COMMANDS` and a module."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from gtcpserver.files.lent import read_file
from gtcpserver.process.standard_descriptors import open_standard_descriptors

from .env_file import BadEnvFile
from .env_file import load as load_env_file

# The commands that run a user's blocking code, which has to wait on gevent's loop.
MONKEY_PATCHED = ("serve", "echo")


def main() -> None:
    """Run the command in sys.argv and exit: 0 done, 1 runtime failure, 2 usage error."""
    try:
        open_standard_descriptors()
    except OSError as error:
        sys.exit(f"gtcpserver: {error.strerror}")
    arguments = sys.argv[1:]
    try:
        load_env_file(arguments)
    except BadEnvFile as error:
        print(f"gtcpserver: --env-file: {error}", file=sys.stderr)
        sys.exit(2)
    if wants_monkey_patch(arguments):
        # Before anything else is imported: a module that binds `socket.socket` or `threading.local` by name while it is
        # being imported, as the user's program or a library may, keeps the blocking one for good.
        from gevent import monkey

        monkey.patch_all()
    try:
        import click  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("the command line needs click: pip install 'gtcpserver[cli]'", file=sys.stderr)
        sys.exit(2)
    from .commands import run

    sys.exit(run(arguments))


def wants_monkey_patch(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Read --monkey-patch/--no-monkey-patch before click, which must be imported after patching; if it is not given,
    read the environment and the settings file (gtcpserver.cli.settings)."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    loads = command == "config" and "--load" in arguments  # loads the program, as `serve` would
    if not (command in MONKEY_PATCHED or loads) or {"-h", "--help"} & {*arguments}:
        return False
    flags = [argument for argument in arguments if argument in ("--monkey-patch", "--no-monkey-patch")]
    if flags:
        return flags[-1] == "--monkey-patch"
    said = environment.get("GTCPSERVER_MONKEY_PATCH", "").strip().lower()
    if said:
        return said not in ("0", "false", "f", "no", "n", "off")  # click's words
    path = environment.get("GTCPSERVER_CONFIG", "")
    if loads:
        path = next(filter(os.path.isfile, arguments), "")
    for place, argument in enumerate(arguments):
        if argument == "--config" and place + 1 < len(arguments):
            path = arguments[place + 1]
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
    return not path or _read_monkey_patch(path)


def _read_monkey_patch(path: str) -> bool:
    # Mistakes in the file are reported later.
    try:
        text = read_file(path)
        if b"monkey_patch" not in text:
            return True
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        return tomllib.loads(text.decode()).get("monkey_patch") is not False
    except (OSError, ValueError, RecursionError, ModuleNotFoundError):
        return True
