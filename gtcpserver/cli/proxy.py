"""gtcpserver proxy: a SOCKS4, SOCKS4a, SOCKS5 and HTTP proxy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import click
from click.core import ParameterSource

from gtcpserver.address import parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.listening.config import ListenConfig
from gtcpserver.server.access_log import log_to_file
from gtcpserver.supervisor import systemd
from gtcpserver.supervisor.lending import NamedFiles

from .commands import EPILOG, RunError, complain
from .options import flag, handover_options, server_options_but_bind, supervisor_options, was_given
from .secret_files import STANDARD_INPUT, read_url, read_users
from .serve import process_options, serve_with
from .settings import SettingsGroup, label_of, obey_environment, warn_at_start

try:
    import msgspec

    from gtcpserver.proxy.build import check_closed, make_advertise, make_external, make_ports
    from gtcpserver.proxy.config import Proxy, ProxyConfig, make_proxy, parse_config, read_config
    from gtcpserver.proxy.config_text import config_text
    from gtcpserver.proxy.handler import Speaks
    from gtcpserver.proxy.import_files import PROGRAMS, Program, import_file, program_of
    from gtcpserver.proxy.passwords import hash_password, read_htpasswd
    from gtcpserver.proxy.rules import COMMANDS, parse_client_rule, parse_destination_rule
    from gtcpserver.proxy.settings import (
        DEFAULT_LISTEN,
        AuthTable,
        ListenerTable,
        LogTable,
        RulesTable,
        UdpTable,
        UpstreamTable,
    )
    from gtcpserver.proxy.upstream_url import parse_upstream
except ModuleNotFoundError as missing:
    raise RunError(f"the proxy needs {missing.name}: pip install 'gtcpserver[proxy]'") from None

#: The authenticator of --user.
USERS = "users"

#: The upstream of --upstream.
UPSTREAM = "upstream"

#: Exit status of an import that cannot express all restrictions, or allows less. 1 and 2 are failures.
EXIT_DIFFERS = 3

NOT_BESIDE_CONFIG = (
    *("mixed", "socks", "http", "users", "user_file", "htpasswd", "allow_client", "allow_destination"),
    *("deny_destination", "allow_command", "upstream", "upstream_file", "external", "intercept"),
    *("udp_advertise", "udp_ports", "udp_full_cone", "allow_open"),
)
#: Keys of the table [log] that options override.
LOG_KEYS = {"access_log_style": "style", "redact": "redact"}
#: What is in the file of --print-config.
OF_THE_PROXY = (*NOT_BESIDE_CONFIG, *LOG_KEYS)
#: Names of the options for what a listener speaks, where they differ: --transparent is one of all servers.
OPTION_OF = {"transparent": "intercept"}
FLAGS = {"users": "--user"}
#: GTCPSERVER_USER is what other commands run their workers as, and containers may share one environment.
VARIABLES = {"users": "GTCPSERVER_PROXY_USER"}


def with_worker_user(command: Any) -> Any:
    """Name the workers' user --worker-user, since --user is a client here."""
    for parameter in command.__click_params__:
        if parameter.name == "user":
            parameter.opts = ["--worker-user"]
    return command


@click.group(cls=SettingsGroup, invoke_without_command=True, epilog=EPILOG)
@click.option(
    "--config",
    envvar="GTCPSERVER_CONFIG",
    metavar="FILE",
    help="TOML file with all settings; reloaded on SIGHUP.",
)
@click.option(
    "--print-config", is_flag=True, help="Print a file for --config that does what the other options say, and exit."
)
@click.option("--mixed", metavar="ADDRESS", multiple=True, help="Listen for SOCKS and HTTP. [default: 127.0.0.1:1080]")
@click.option("--socks", metavar="ADDRESS", multiple=True, help="Listen for SOCKS4, 4a and 5.")
@click.option("--http", metavar="ADDRESS", multiple=True, help="Listen for HTTP.")
@click.option(
    "--intercept",
    metavar="ADDRESS",
    multiple=True,
    help="Listen for connections that the firewall redirects: by REDIRECT; with --transparent also by TPROXY.",
)
@click.option(
    "--user", "users", metavar="NAME:PASSWORD", multiple=True, help="Only admit these users; may be repeated."
)
@click.option(
    "--user-file",
    metavar="FILE",
    help="The same from a file of mode 600, one per line, which ps does not show to others; -: standard input.",
)
@click.option("--htpasswd", metavar="FILE", help="Only admit users of this file (htpasswd -B).")
@click.option("--allow-client", metavar="NETWORK", multiple=True, help="Clients to admit.  [default: this host]")
@click.option("--allow-destination", metavar="DESTINATION", multiple=True, help="Only allow these destinations.")
@click.option("--deny-destination", metavar="WHERE", multiple=True, help="Destinations to deny.")
@click.option(
    "--allow-command",
    type=click.Choice(COMMANDS),
    multiple=True,
    help="Only allow these commands; may be repeated.  [default: all]",
)
@click.option("--allow-open/--no-allow-open", default=False, help="Serve everybody without a password. Think twice.")
@click.option(
    "--upstream",
    metavar="URL",
    help="Go through another proxy: socks5://[user:password@]host:port, http://, https://, socks4://, socks4a://.",
)
@click.option("--upstream-file", metavar="FILE", help="Read the URL from a file of mode 600; -: standard input.")
@click.option("--external", metavar="ADDRESS", help="Connect from this address.")
@click.option(
    "--udp-advertise",
    metavar="ADDRESS",
    multiple=True,
    help="Tell clients to send datagrams to this address; one of each family.  [default: the one they connected to]",
)
@click.option("--udp-ports", metavar="FIRST-LAST", help="Ports for datagrams of clients, for firewalls.")
@click.option(
    "--udp-full-cone", is_flag=True, help="Pass on datagrams from all allowed addresses, not only those written to."
)
@click.option(
    "--redact/--no-redact", default=None, help="Leave destinations out of the access log.  [default: as in the file]"
)
@click.option(
    "--access-log",
    "access_log_style",
    type=click.Choice(["text", "json"]),
    help="Style of the access log.  [default: as in the file, or text]",
)
@handover_options(
    "Move tunnels, and clients between two HTTP requests, of a worker that leaves to another: without TLS."
)
@server_options_but_bind
@with_worker_user
@supervisor_options
@process_options
@click.pass_context
def proxy(context: click.Context, /, config: str | None, print_config: bool, **options: Any) -> None:
    """Run a SOCKS4, SOCKS4a, SOCKS5 and HTTP proxy.

    By default it listens on 127.0.0.1:1080, only serves this host, and reaches no private networks.
    """
    if context.invoked_subcommand is not None:
        return
    given = [name for name in NOT_BESIDE_CONFIG if was_given(context, name)]
    if config is not None and (given or print_config):
        option = "--print-config" if print_config else FLAGS.get(given[0], flag(given[0]))
        raise click.UsageError(f"{option}: cannot be used together with {label_of(context, 'config')}")
    if was_given(context, "upstream") and was_given(context, "upstream_file"):
        raise click.UsageError(f"--upstream-file: cannot be used together with {label_of(context, 'upstream')}")
    options = _with_secrets(options)
    if print_config:
        _print_config(context, options)
        return
    if _is_visible(context, "users") or (_is_visible(context, "upstream") and _has_password(options["upstream"])):
        warn_at_start(
            context,
            "passwords on the command line are visible to every user of this host (ps): use --user-file and "
            "--upstream-file",
        )
    made = _load(config, options)
    if systemd.promises_sockets():
        # This replaces our defaults, and who can reach those listeners is unknown.
        check_closed(_config(config, options), elsewhere=True)
    context.params["bind"] = tuple(made.addresses)
    if made.needs_transparent:
        _listen_for_tproxy(context)

    def load() -> Any:
        # Called once up front, to report mistakes before anything is started; then in each worker, so that a reload
        # reads the file again.
        now = _load(config, options)
        if now.addresses != made.addresses:
            raise ConfigError(
                f"the listeners were {_listed(made)} and are now {_listed(now)}: a reload keeps the sockets; "
                "an upgrade (SIGUSR2 with --workers) opens and closes them without losing a connection"
            )
        log_to_file(now.access_log)
        if config is not None:
            now.handler.make_again = load
        return now.handler

    def files() -> NamedFiles:
        return _files_named(config, _config(config, options))

    serve_with(context, load, reads_files=config is not None, files=files)


obey_environment(proxy, but=("print_config",), names=VARIABLES)


def _listen_for_tproxy(context: click.Context) -> None:
    """Set --transparent, for tproxy = true. Raise ConfigError: it is not permitted."""
    try:
        ListenConfig(transparent=True)
    except ConfigError:
        if not was_given(context, "transparent"):
            raise ConfigError(
                "tproxy = true: the system refuses IP_TRANSPARENT; expected Linux, and the privilege CAP_NET_ADMIN "
                "(start as root; workers can have --worker-user)"
            ) from None
    context.params["transparent"] = True
    context.set_parameter_source("transparent", ParameterSource.COMMANDLINE)


def _listed(proxy: Proxy) -> str:
    return ", ".join(map(str, proxy.addresses))


def _files_named(path: str | None, config: ProxyConfig) -> NamedFiles:
    read = [path, *(table.htpasswd for table in config.auth.values())]
    for table in config.listener:
        read += [table.tls_certfile, table.tls_keyfile, table.tls_client_ca]
    read += [table.tls_ca for table in config.upstream.values()]
    return NamedFiles([name for name in read if name], [config.log.file] if config.log.file else [])


def _load(path: str | None, options: dict[str, Any]) -> Proxy:
    return make_proxy(_config(path, options))


def _config(path: str | None, options: dict[str, Any]) -> ProxyConfig:
    if path is None:
        return _from_options(options)
    config = read_config(path)
    return msgspec.structs.replace(config, log=msgspec.structs.replace(config.log, **_of_the_log(options)))


def _of_the_log(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[name] for name, key in LOG_KEYS.items() if options[name] is not None}


def _is_visible(context: click.Context, name: str) -> bool:
    """Return whether every user of the host can read the value; the environment is the process's own."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _given(context: click.Context, own: bool, source: ParameterSource) -> list[str]:
    """Return the options, or variables, that were given: those of the proxy's own, or those of every server."""
    names = [str(one.name) for one in context.command.params if one.name not in ("config", "print_config")]
    given = [name for name in names if context.get_parameter_source(name) is source]
    return sorted(label_of(context, name) for name in given if (name in OF_THE_PROXY) == own)


def _print_config(context: click.Context, options: dict[str, Any]) -> None:
    config = _from_options(options)
    make_proxy(config).handler.server_stopped()  # reports mistakes
    if _has_password(options["upstream"]):
        click.echo("# It contains a password: keep the file from others (mode 600).\n")
    for said, own, source in (
        ("These options stay on the command line, beside --config", False, ParameterSource.COMMANDLINE),
        ("These variables stay in the environment", False, ParameterSource.ENVIRONMENT),
        ("These variables are in this file: take them out of the environment", True, ParameterSource.ENVIRONMENT),
    ):
        given = _given(context, own, source)
        if given:
            click.echo(f"# {said}: {', '.join(given)}\n")
    click.echo(config_text(config), nl=False)


def _from_options(options: dict[str, Any]) -> ProxyConfig:
    places: list[tuple[str, Speaks, str]] = [
        (f"{speaks}-{number}" if number else speaks, speaks, address)
        for speaks in get_args(Speaks)
        for number, address in enumerate(options[OPTION_OF.get(speaks, speaks)])
    ]
    for _, speaks, address in places:
        _checked(flag(OPTION_OF.get(speaks, speaks)), parse_address, address)
    external = "auto" if options["external"] is None else options["external"]
    _checked("--external", make_external, ListenerTable(external=external))
    if options["udp_advertise"]:
        _checked("--udp-advertise", make_advertise, options["udp_advertise"])
    if options["udp_ports"] is not None:
        _checked("--udp-ports", make_ports, options["udp_ports"])
    listeners = [
        ListenerTable(
            name=name,
            listen=address,
            speaks=speaks,
            commands=list(options["allow_command"] or COMMANDS),
            external=external,
            tproxy=speaks == "transparent" and bool(options["transparent"]),
        )
        for name, speaks, address in places or [("default", "mixed", DEFAULT_LISTEN)]
    ]
    users = {name: hash_password(password.encode()) for name, password in options["users_read"]}
    for text in options["users"]:
        name, colon, password = text.partition(":")
        if not colon or not name or not password:
            raise click.UsageError(f"--user: must be NAME:PASSWORD, got {name + ':...' if colon else text!r}")
        _check_utf8("--user", text)
        users[name] = hash_password(password.encode())
    htpasswd = options["htpasswd"]
    if htpasswd is not None:
        if not htpasswd:
            raise click.UsageError("--htpasswd: must name a file, got ''")
        _checked("--htpasswd", read_htpasswd, htpasswd)
    has_users = bool(users or htpasswd)
    with_auth = f" with auth {USERS}" if has_users else ""
    clients = [f"allow from {network} to any{with_auth}" for network in options["allow_client"]]
    if has_users and not clients:
        clients = [f"allow from {network} to any{with_auth}" for network in ("127.0.0.0/8", "::1")]
    if options["allow_open"] and not clients:
        clients = ["allow any"]
    destinations = [f"deny {what}" for what in options["deny_destination"]]
    destinations += [f"allow {what}" for what in options["allow_destination"] or (["any"] if destinations else [])]
    for name, parse, rules in (
        ("allow_client", parse_client_rule, clients),
        ("deny_destination", parse_destination_rule, destinations),
        ("allow_destination", parse_destination_rule, destinations[len(options["deny_destination"]) :]),
    ):
        for rule, _ in zip(rules, options[name], strict=False):
            _checked(flag(name), parse, rule)
    upstream = options["upstream"]
    if upstream is not None:
        said_by = "--upstream" if options["upstream_file"] is None else "--upstream-file"
        _checked(said_by, lambda url: parse_upstream(UPSTREAM, url), upstream)
    return ProxyConfig(
        listener=listeners,
        rules=RulesTable(
            clients=clients or None,
            destinations=destinations or None,
            upstreams=[] if upstream is None else [f"through {UPSTREAM} any"],
        ),
        auth={USERS: AuthTable(users=users, htpasswd=htpasswd)} if has_users else {},
        upstream={} if upstream is None else {UPSTREAM: UpstreamTable(url=upstream)},
        udp=UdpTable(
            advertise=list(options["udp_advertise"]), ports=options["udp_ports"], full_cone=options["udp_full_cone"]
        ),
        log=LogTable(**_of_the_log(options)),
        allow_open=options["allow_open"],
    )


def _checked(option: str, check: Callable[[Any], object], value: Any) -> None:
    """Call a check of one option's value. Raise click.UsageError, which names the option and not our word for it."""
    try:
        check(value)
    except (ConfigError, ValueError) as error:
        raise click.UsageError(f"{option}: {_OUR_WORDS.sub('', str(error), 1)}") from None


#: What messages about a configuration call the values of options.
_OUR_WORDS = re.compile(rf"^(?:external|address|udp\.advertise|udp\.ports|the url of upstream '{UPSTREAM}') (?=must )")


def _with_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, with the contents of files. These are read once: workers may not be able to, and standard
    input ends."""
    users, url = options["user_file"], options["upstream_file"]
    if users == url == STANDARD_INPUT:
        raise click.UsageError("--upstream-file: standard input is read by --user-file")
    return {
        **options,
        "users_read": _read(read_users, "--user-file", users) if users is not None else [],
        "upstream": _read(read_url, "--upstream-file", url) if url is not None else options["upstream"],
    }


def _read(read: Callable[[str], Any], option: str, path: str) -> Any:
    try:
        return read(path)
    except ConfigError as error:
        raise click.UsageError(f"{option}: {error}") from None


def _check_utf8(option: str, secret: str) -> None:
    """Raise click.UsageError for an argument in another encoding, without the argument."""
    try:
        secret.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{option}: must be UTF-8") from None


def _has_password(url: str | None) -> bool:
    return ":" in (url or "").partition("://")[2].rpartition("@")[0]


@proxy.command()
@click.argument("file", metavar="FILE")
def check(file: str) -> None:
    """Check whether a configuration can be used, and report every mistake in it: exit status 2."""
    made = make_proxy(read_config(file))
    made.handler.server_stopped()
    click.echo(f"{file} is good: it listens on {', '.join(map(str, made.addresses))}")


@proxy.command("import")
@click.argument("file", metavar="FILE")
@click.option("--from", "program", type=click.Choice(PROGRAMS), help="Whose file it is.  [default: by its name]")
@click.pass_context
def import_command(context: click.Context, /, file: str, program: Program | None) -> None:
    """Print the configuration of danted, 3proxy, squid or tinyproxy as one of ours.

    Exit status 3: there are differences in who may do what. They are printed to standard error, and are comments in the
    configuration.
    """
    program = program or program_of(file)
    if program is None:
        raise click.UsageError(f"--from: must be one of {', '.join(PROGRAMS)}: the name of the file does not say")
    draft = import_file(file, program)
    text = draft.text(file)
    make_proxy(parse_config(text, f"what {file} becomes")).handler.server_stopped()
    click.echo(text, nl=False)
    for difference in draft.differs:
        complain(difference)
    if draft.differs:
        context.exit(EXIT_DIFFERS)


@proxy.command("hash-password")
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True, help="Prompted for, if not given.")
@click.pass_context
def hash_password_command(context: click.Context, /, password: str) -> None:
    """Hash a password, for a configuration."""
    if was_given(context, "password"):
        click.echo("gtcpserver: --password is visible to every user of this host (ps): leave it out", err=True)
    if not password:
        raise ConfigError("the password must not be empty")
    _check_utf8("--password", password)
    click.echo(hash_password(password.encode()))
