"""gtcpserver ctl: query and control a running master through its control socket."""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gtcpserver.errors import ConfigError
from gtcpserver.monitoring.selection import ID, Selection
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

#: Seconds to wait for an answer that the master gives at once. A stopped one (SIGSTOP) never answers.
ANSWER_SECONDS = 10.0

#: Seconds to wait for a reload, an upgrade or another number of workers: new workers must start.
WORK_SECONDS = UPGRADE_SECONDS + 30.0

#: IDs of connections in one request: of 33 characters at most, they are half of what a master reads
#: (`supervisor.control.MAX_REQUEST`).
IDS_AT_ONCE = 500

#: Path of the control socket, and seconds to wait for an answer; None: no limit; "": each command's default.
Where = tuple[str | None, float | str | None]


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
    """Add --control and --timeout."""
    for option in (
        click.option(
            "--timeout",
            type=TimeoutType(),
            default="",
            help=f"Seconds to wait for the answer; none: no limit.  [default: {ANSWER_SECONDS:g}; {WORK_SECONDS:g} for "
            "reload, upgrade, scale and rebalance; none for stop, once the master has answered]",
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
    """A command that accepts the options of ctl after its name, too: most people write them there."""

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
    """Query and control a running server (needs --workers)."""
    context.obj = (control, timeout)


@ctl.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def status(where: Where, as_json: bool) -> None:
    """Show the state of master and workers, and their summed counters. Exit status 1 if the server is not ready."""
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
    """Print one line per worker process, with its open and accepted connections."""
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
    for one in found:
        if one.get("staying"):
            click.echo(f"worker {one['number']} (pid {one['pid']}) still has {_reasons(one['staying'])}")
    counts = [one["accepted"] for one in found if one["state"] == "ready"]
    if len(counts) > 1 and min(counts):
        click.echo(f"spread: the busiest has accepted {max(counts) / min(counts):.2f} times as many as the least busy")


@ctl.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@click.pass_obj
def upstreams(where: Where, as_json: bool) -> None:
    """Print one line per member of the proxy's upstream groups: how many workers see it up, and its connections.

    Exit status 1 if a member is down in a worker.
    """
    rows = members_in(request(where, "status")["stats"].get("handler_gauges", {}))
    if as_json:
        click.echo(to_json(rows))
    else:
        width = max([len("upstream"), *(len(row["group"]) + len(row["upstream"]) + 1 for row in rows)])
        click.echo(f"{'upstream':{width}}  state  up in  down in  connections")
        for row in rows:
            name, state = f"{row['group']}/{row['upstream']}", "down" if row["down"] else "up"
            click.echo(f"{name:{width}}  {state:5}  {row['up']:5}  {row['down']:7}  {row['connections']:11}")
    if any(row["down"] for row in rows):
        sys.exit(1)


def members_in(gauges: dict[str, int]) -> list[dict[str, Any]]:
    """Return the members of upstream groups that the gauges of a proxy tell of (`UpstreamGroup.gauges`)."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in gauges.items():
        what, _, member = name.partition(":")
        kind = what.removeprefix("upstream_")
        group, slash, upstream = member.partition("/")
        if kind in ("up", "down", "connections") and what != kind and slash:
            row = rows.setdefault(member, {"group": group, "upstream": upstream, "up": 0, "down": 0, "connections": 0})
            row[kind] = value
    return list(rows.values())


@ctl.command()
@click.option(
    "--config",
    envvar="GTCPSERVER_CONFIG",
    metavar="FILE",
    required=True,
    help="The proxy's configuration file, which names the file with the quotas.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def users(config: str, as_json: bool) -> None:
    """Print one line per user of a proxy with quotas: bytes used, the limit, and when it is used anew.

    The proxy need not run. What its workers have moved in the last two seconds is not in the file yet.
    """
    try:
        from gtcpserver.proxy.config import read_config
        from gtcpserver.proxy.quota_report import quota_report
    except ModuleNotFoundError as missing:
        raise RunError(f"the proxy needs {missing.name}: pip install 'gtcpserver[proxy]'") from None
    rows = quota_report(read_config(config), time.time())
    if as_json:
        click.echo(to_json(rows))
        return
    table = [["user", "used", "limit", "resets"]] + [
        [printable(row["user"]), str(row["used"]), "-" if row["limit"] is None else str(row["limit"]), row["resets"]]
        for row in rows
    ]
    _echo_table(table)


def _echo_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def selection_options(command: Any) -> Any:
    for option in (
        click.option("--destination", metavar="D", help="Connections to this destination: HOST, HOST:PORT or .DOMAIN."),
        click.option("--client", metavar="NET", help="Connections of these clients: an address or a network."),
        click.option("--user", metavar="U", help="Connections of this user."),
    ):
        command = option(command)
    return command


@ctl.command()
@selection_options
@click.option("--rate", is_flag=True, help="Look for a second, and add the bytes per second of both directions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_obj
def connections(where: Where, /, as_json: bool, rate: bool, **selection: Any) -> None:
    """Print one line per open connection of all workers, oldest first; at most 500."""
    check_selection(**selection)
    before = request(where, "connections", **selection) if rate else None
    if before is not None:
        time.sleep(1.0)
    answer = request(where, "connections", **selection)
    rows = answer["connections"]
    if before is not None:
        add_rates(rows, before["connections"])
    if as_json:
        click.echo(to_json({name: answer[name] for name in ("connections", "found", "missing")}))
        return
    columns = ["id", "client", "user", "listener", "destination", "upstream", "age", "received", "sent"]
    table = [columns + (["rate"] if rate else [])] + [cells_of(row, rate) for row in rows]
    _echo_table(table)
    if answer["found"] > len(rows):
        click.echo(f"the first {len(rows)} of {answer['found']}")
    if answer["missing"]:
        click.echo(f"workers that did not answer: {', '.join(map(str, answer['missing']))}", err=True)


def cells_of(row: dict[str, Any], rate: bool) -> list[str]:
    names = ("id", "client", "user", "listener", "destination", "upstream")
    cells = [printable(row[name] or "-") for name in names]
    cells += [f"{row['age']:.0f}", str(row["bytes_received"]), str(row["bytes_sent"])]
    return cells + ([str(row["rate"])] if rate else [])


def printable(text: str) -> str:
    """Return a text from a client so that it cannot control the terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def add_rates(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    earlier = {row["id"]: row for row in before}
    for row in rows:
        first = earlier.get(row["id"], {"age": 0.0, "bytes_received": 0, "bytes_sent": 0})
        seconds = max(0.001, row["age"] - first["age"])
        moved = sum(row[name] - first[name] for name in ("bytes_received", "bytes_sent"))
        row["rate"] = round(moved / seconds)


def check_selection(user: str | None, client: str | None, destination: str | None) -> None:
    try:
        Selection.of({"user": user, "client": client, "destination": destination})
    except ConfigError as error:
        raise click.UsageError(f"--{error}") from None


@ctl.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@selection_options
@click.pass_obj
def end(where: Where, /, ids: tuple[str, ...], **selection: Any) -> None:
    """End connections by their IDs, as `connections` prints them, or by user, client and destination."""
    check_selection(**selection)
    for one in ids:
        if not ID.fullmatch(one):
            raise click.UsageError(f"ID: must be as `connections` prints them, got {one!r}")
    if not ids and not any(selection.values()):
        raise click.UsageError("say which connections to end: an ID, --user, --client or --destination")
    ended, missing = 0, set[int]()
    for place in range(0, max(1, len(ids)), IDS_AT_ONCE):
        answer = request(where, "end", ids=list(ids[place : place + IDS_AT_ONCE]) or None, **selection)
        ended += answer["ended"]
        missing.update(answer["missing"])
    click.echo(f"ended {counted(ended, 'connection')}")
    if missing:
        raise RunError(f"workers that did not answer: {', '.join(map(str, sorted(missing)))}")
    if not ended:
        sys.exit(1)


def _reasons(staying: dict[str, int]) -> str:
    """ "3 connections: 2 tls, 1 busy" """
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(staying.items()))
    return f"{counted(sum(staying.values()), 'connection')}: {reasons}"


@ctl.command()
@click.pass_obj
def reload(where: Where) -> None:
    """Start new workers with the code on disk; wait until they are ready. If one is not, the old ones stay."""
    answer = request(where, "reload", WORK_SECONDS)
    if answer.get("moved") or answer.get("staying"):
        stay = f", {_reasons(answer['staying'])} in the old workers" if answer.get("staying") else ""
        click.echo(f"{counted(answer['moved'], 'connection')} moved{stay}")


@ctl.command()
@click.pass_obj
def upgrade(where: Where) -> None:
    """Start a new master with the same sockets and the code on disk; wait until it is ready."""
    request(where, "upgrade", WORK_SECONDS)


@ctl.command()
@click.pass_obj
def reopen(where: Where) -> None:
    """Reopen the log file after it was renamed."""
    request(where, "reopen")


@ctl.command("rotate-tickets")
@click.pass_obj
def rotate_tickets(where: Where) -> None:
    """Use new keys for TLS session tickets. Twice: no client can resume an earlier session."""
    request(where, "rotate-tickets")


@ctl.command()
@click.argument("switch", type=click.Choice(["on", "off"]))
@click.pass_obj
def maint(where: Where, switch: str) -> None:
    """Tell balancers to send this machine no connections, until it is off again; serve those that come."""
    request(where, "maint", on=switch == "on")


@ctl.command()
@click.argument("count", type=click.IntRange(min=1), metavar="N")
@click.pass_obj
def scale(where: Where, count: int) -> None:
    """Change the number of workers to N; wait until it is reached. No connection is lost."""
    request(where, "scale", WORK_SECONDS, workers=count)


@ctl.command()
@click.pass_obj
def rebalance(where: Where) -> None:
    """Spread connections evenly over all workers, as after scale (needs --handover): idle ones and tunnels move."""
    answer = request(where, "rebalance", WORK_SECONDS)
    click.echo(f"{counted(answer['moved'], 'connection')} moved")


@ctl.command()
@click.option("--now", is_flag=True, help="End every connection without waiting for handlers.")
@click.pass_obj
def stop(where: Where, now: bool) -> None:
    """Stop gracefully; wait for the end."""
    request(where, "status")  # otherwise we would wait forever for a master that does not answer
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
