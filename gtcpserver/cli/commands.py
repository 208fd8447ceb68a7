"""The table of commands, and how errors are reported: one line on stderr and the exit status."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence

import click
import gevent
from click.shell_completion import CompletionItem

from gtcpserver._compiled import why_pure
from gtcpserver._version import __version__
from gtcpserver.errors import ConfigError

# Where each command lives. It is imported when called, so that missing libraries of one command do not affect others.
COMMANDS = {
    "serve": "gtcpserver.cli.serve:serve",
    "echo": "gtcpserver.cli.serve:echo",
    "forward": "gtcpserver.cli.forward:forward",
    "files": "gtcpserver.cli.files:files",
    "proxy": "gtcpserver.cli.proxy:proxy",
    "check": "gtcpserver.cli.check:check",
    "ctl": "gtcpserver.cli.ctl:ctl",
    "acme": "gtcpserver.cli.acme:acme",
    "config": "gtcpserver.cli.config:config",
    "completion": "gtcpserver.cli.completion:completion",
}

#: The options that print a command's help.
HELP = ["-h", "--help"]

#: Prefix of the message of a SystemError that ends gevent's loop, such as an error of epoll_wait(2).
LIBEV = "(libev) "

#: The most frequent uses: the command line, and what it is for.
EXAMPLES = (
    ("gtcpserver serve app:handle", "on 127.0.0.1:5000"),
    ("gtcpserver serve app:handle -b '*:80' -w auto", "in production, on all CPUs"),
    ("gtcpserver echo -b 5001", "to test a client with"),
)

EPILOG = """Exit status: 0 stopped or done; 1 runtime failure (address in use, an exception in the handler's module);
2 usage error; 3 worker processes cannot start."""


class RunError(click.ClickException):
    """A runtime failure, as opposed to a usage error: exit status 1 and one line.

    Args:
        message: the line.
        details: text printed above it unchanged, such as a traceback in the user's code.
    """

    exit_code = 1

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def load_command(name: str) -> click.Command:
    """Import a command. Raise RunError if a library that it needs is missing."""
    module, _, attribute = COMMANDS[name].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


class CommandTable(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return load_command(name) if name in COMMANDS else None

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(context, formatter)
        with formatter.section("Examples"):
            formatter.write_dl(list(EXAMPLES), col_max=60)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in COMMANDS:
            try:
                rows.append((name, load_command(name).get_short_help_str(formatter.width - 16)))
            except RunError as error:  # a missing library does not concern the other commands
                rows.append((name, error.message))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own method imports every command for its help text, and fails if a library is missing.
        names = [CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, context, incomplete)]

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if not arguments and not context.resilient_parsing:
            raise click.UsageError(f"missing command; choose from {', '.join(COMMANDS)} (see gtcpserver --help)")
        return super().parse_args(context, arguments)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments[0] not in COMMANDS and not context.resilient_parsing:
            raise click.UsageError(f"no command {arguments[0]!r}; choose from {', '.join(COMMANDS)}")
        return super().resolve_command(context, arguments)


def print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(
            f"gtcpserver {__version__}, gevent {gevent.__version__}, "
            f"{platform.python_implementation()} {platform.python_version()}, "
            f"{platform.system()} {platform.release()}, "
            f"{'compiled' if why_pure is None else f'pure Python ({why_pure})'}"
        )
        context.exit()


@click.group(
    cls=CommandTable,
    no_args_is_help=False,
    epilog=EPILOG,
    context_settings={"help_option_names": HELP},  # of every command
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print versions."
)
def gtcpserver() -> None:
    """TCP servers as plain blocking Python."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        status = gtcpserver.main(list(arguments), prog_name="gtcpserver", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        if isinstance(error, RunError) and error.details:
            click.echo(error.details, err=True, nl=False)
        complain(describe(error))
        return error.exit_code
    except ConfigError as error:
        for line in str(error).splitlines():
            complain(line)
        return 2
    except click.Abort:
        return 130
    except SystemError as error:
        if not str(error).startswith(LIBEV):
            raise
        complain(f"the event loop failed: {str(error).removeprefix(LIBEV)}")
        return 1
    except BrokenPipeError:
        # `gtcpserver check | head`: the rest is not wanted. Buffered output must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError) as error:
        if isinstance(error, FileNotFoundError) and error.filename is None and _is_folder_gone():
            # From getcwd(), called in many places, by os.path.abspath among others.
            complain("the working directory does not exist any more: change to one that does")
            return 1
        # The system refused a call that hardly ever fails, and has no message of its own: getrandom(2), for one.
        complain(f"{type(error).__name__}: {error} ({_place(error)})")
        return 1


def _is_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {frame.name}, {frame.filename}:{frame.lineno}"


def describe(error: click.ClickException) -> str:
    """Return one line for what click would print as usage, hint and error: the option, and what is wrong."""
    message = (error.format_message() if isinstance(error, click.NoSuchOption) else error.message).rstrip(".")
    if isinstance(error, click.BadParameter):
        name = name_of(error.param) if error.param is not None else ""
        if isinstance(error, click.MissingParameter):
            return f"missing {name}"
        return f"{name}: {message}" if name else message
    # click's own messages begin with a capital; a name in capitals stays.
    return message[:1].lower() + message[1:] if message[1:2].islower() else message


def name_of(parameter: click.Parameter) -> str:
    # The first of its names; the others are what other servers call it.
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name


def complain(message: str) -> None:
    if sys.stderr is None:  # it was closed, and there is no /dev/null: print() would use stdout
        return
    try:
        print("gtcpserver:", " ".join(message.split()), file=sys.stderr)
    except (OSError, ValueError):  # nobody reads stderr
        pass
