"""gtcpserver ctl: asks a running master, and tells it what to do, through its control socket."""

from __future__ import annotations

import math
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gtcpserver.plural import counted
from gtcpserver.strict_json import to_json
from gtcpserver.supervisor.control import ControlError, ask
from gtcpserver.supervisor.upgrade import UPGRADE_SECONDS

from .commands import EPILOG, RunError

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic before click 8.2

VARIABLE = "GTCPSERVER_CONTROL"

ANSWER_SECONDS = 10.0
"""How long an answer may take that the master gives at once. One that is stopped (SIGSTOP) gives none."""

WORK_SECONDS = UPGRADE_SECONDS + 30.0
"""The same of a reload, an upgrade, another number of workers: workers start, which an upgrade waits for so long."""

Where = tuple[str | None, float | str | None]
"""Path of the control socket, and seconds to wait for an answer; None: for ever; "": each command's own."""


class TimeoutType(ParamType):
    name = "number|none"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float | str | None:
        if value in ("", "none"):
            return "" if value == "" else None
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < math.inf:
            self.fail(f'must be a number above 0, or "none", got {value!r}', parameter, context)
        return seconds


def where_options(command: Any, envvar: str | None = None) -> Any:
    """Adds --control and --timeout."""
    for option in (
        click.option(
            "--timeout",
            type=TimeoutType(),
            default="",
            help=f"Seconds to wait for the answer; none: for ever.  [default: {ANSWER_SECONDS:g}; {WORK_SECONDS:g} for "
            "reload, upgrade and scale; none for stop, once the master has answered]",
        ),
        click.option(
            "--control",
            envvar=envvar,
            metavar="PATH",
            help=f"The control socket, as given to serve --control; or in the environment as {VARIABLE}.",
        ),
    ):
        command = option(command)
    return command


class _Command(click.Command):
    """A command that takes the options of ctl behind its name, too: there most people write them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        where_options(self)

    def invoke(self, context: click.Context) -> Any:
        control, timeout = context.params.pop("control"), context.params.pop("timeout")
        before: Where = context.obj
        context.obj = (before[0] if control is None else control, before[1] if timeout == "" else timeout)
        return super().invoke(context)


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group, epilog=EPILOG)
@partial(where_options, envvar=VARIABLE)
@click.pass_context
def ctl(context: click.Context, control: str | None, timeout: float | str | None) -> None:
    """Ask and steer a running server with worker processes."""
    context.obj = (control, timeout)


@ctl.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def status(where: Where, as_json: bool) -> None:
    """State of master and workers, and the counters of all of them together. Exit status 1 if it is not ready."""
    answer = request(where, "status")
    if as_json:
        click.echo(to_json(answer))
    else:
        click.echo(
            f"{answer['state']}, {'ready' if answer['ready'] else 'not ready'}: "
            f"{counted(len(answer['workers']), 'worker')} of {answer['target']} wanted, "
            f"{answer.get('retired', 0)} retired, generation {answer['generation']}, "
            f"{answer['restarts']} replaced, master {answer['pid']}, up {answer['uptime']:.0f} s"
        )
        click.echo(f"listening on {', '.join(answer['addresses'])}")
        for name, value in answer["stats"].items():
            click.echo(f"{name:20} {round(value, 4) if isinstance(value, float) else value}")
    if not answer["ready"]:
        sys.exit(1)


@ctl.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def workers(where: Where, as_json: bool) -> None:
    """One line for each worker process, with the connections it has and has had."""
    found = request(where, "status")["workers"]
    if as_json:
        click.echo(to_json(found))
        return
    click.echo(f"{'worker':>6} {'pid':>8} {'state':9} {'gen':>4} {'up s':>8} {'lag ms':>7} {'MiB':>6} accepted active")
    for one in found:
        click.echo(
            f"{one['number']:6} {one['pid']:8} {one['state']:9} {one['generation']:4} {one['uptime']:8.0f} "
            f"{one['lag'] * 1000:7.1f} {one['rss'] / 2**20:6.0f} {one['accepted']:8} {one['active']:6}"
        )
    counts = [one["accepted"] for one in found if one["state"] == "ready"]
    if len(counts) > 1 and min(counts):
        click.echo(f"spread: the busiest has accepted {max(counts) / min(counts):.2f} times what the idlest has")


@ctl.command()
@click.pass_obj
def reload(where: Where) -> None:
    """New workers, from the code on the disk; waits until they are ready. The old ones stay if one is not."""
    request(where, "reload", WORK_SECONDS)


@ctl.command()
@click.pass_obj
def upgrade(where: Where) -> None:
    """A new master with the same sockets, from the code on the disk; waits until it is ready."""
    request(where, "upgrade", WORK_SECONDS)


@ctl.command()
@click.pass_obj
def reopen(where: Where) -> None:
    """Open the log file again, when it was moved away."""
    request(where, "reopen")


@ctl.command()
@click.argument("count", type=click.IntRange(min=1), metavar="N")
@click.pass_obj
def scale(where: Where, count: int) -> None:
    """N workers from now on; waits until there are. No connection is lost."""
    request(where, "scale", WORK_SECONDS, workers=count)


@ctl.command()
@click.option("--now", is_flag=True, help="End every connection, and do not wait for handlers.")
@click.pass_obj
def stop(where: Where, now: bool) -> None:
    """Stop gracefully; waits for the end."""
    request(where, "status")  # a master that does not answer would be waited for without end
    request(where, "stop", None, now=now)


def request(where: Where, command: str, seconds: float | None = ANSWER_SECONDS, **more: Any) -> dict[str, Any]:
    path, asked = where
    timeout = seconds if isinstance(asked, str) else asked
    if path is None:
        raise click.UsageError(f"missing --control PATH, or {VARIABLE} in the environment")
    try:
        return ask(path if path.startswith("@") else os.path.abspath(path), {"command": command, **more}, timeout)
    except ControlError as error:
        raise RunError(str(error)) from None
