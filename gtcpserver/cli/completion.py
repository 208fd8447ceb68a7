"""gtcpserver completion: the script that completes the command's names and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .commands import EPILOG, RunError, gtcpserver

PROGRAM = "gtcpserver"
VARIABLE = "_GTCPSERVER_COMPLETE"  # click derives this name from the program's


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete commands, options and their values.

    \b
    bash: gtcpserver completion bash > ~/.local/share/bash-completion/completions/gtcpserver
    zsh:  gtcpserver completion zsh > a folder of $fpath, as _gtcpserver
    fish: gtcpserver completion fish > ~/.config/fish/completions/gtcpserver.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise RunError(f"this version of click does not support {shell}")
    # Only the words of the script: click's own source() starts bash to ask for its version.
    script = made(gtcpserver, {}, PROGRAM, VARIABLE)
    click.echo(script.source_template % script.source_vars())
