"""The options that serve and echo share: every parameter of Server and ListenConfig, under the same name."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import socket
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from gtcpserver.address import Address, check_none_twice, parse_address
from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.callables import HOOKS
from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import ConfigError
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.server.access_log import AccessLog
from gtcpserver.server.server import Server
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.tls import CertificateFiles, TLSConfig, self_signed
from gtcpserver.tls.config import DEFAULT_ACME_WATCH

from .loading import load_hook, load_object

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic before click 8.2

log = own_logger("gtcpserver.tls")

Command = TypeVar("Command", bound=Callable[..., Any])


class AddressType(ParamType):
    name = "address"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Address:
        if isinstance(value, Address):
            return value
        try:
            return parse_address(value)
        except ConfigError as error:
            self.fail(str(error), parameter, context)


class OrNone(ParamType):
    """A number, or the word "none" for no limit. `least`, if given, is checked here instead of in the library."""

    def __init__(self, number: type[int] | type[float], least: float | None = None) -> None:
        self.name = "integer|none" if number is int else "number|none"
        self.number = number
        self.least = least

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, str) and value.lower() == "none":
            return None
        try:
            number = self.number(value)
        except ValueError:
            kind = "a whole number" if self.number is int else "a number"
            self.fail(f'must be {kind} or "none", got {value!r}', parameter, context)
        if self.least is not None and not self.least <= number < math.inf:
            self.fail(f'must be {self.least:g} or more or "none", got {value!r}', parameter, context)
        return number


class OctalType(ParamType):
    name = "octal"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            return int(str(value), 8)
        except ValueError:
            self.fail(f"must be permission bits in octal, such as 660, got {value!r}", parameter, context)


class SocketOptionType(ParamType):
    """LEVEL:OPTION:VALUE: names from the socket module or numbers, such as SOL_SOCKET:SO_MARK:7."""

    name = "level:option:value"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        if len(parts) != 3:
            self.fail(f"must be LEVEL:OPTION:VALUE, such as SOL_SOCKET:SO_MARK:7, got {value!r}", parameter, context)
        numbers = []
        for part in parts:
            number = getattr(socket, part, None) if part.isidentifier() else None
            if number is None:
                try:
                    number = int(part, 0)
                except ValueError:
                    self.fail(f"{part!r} in {value!r} is neither a number nor in Python's socket module")
            numbers.append(int(number))
        return numbers[0], numbers[1], numbers[2]


class RepeatedType(ParamType):
    """Text of an option that may be repeated."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        return str(value)


class ServerNameType(ParamType):
    """NAME=CERTFILE or NAME=CERTFILE:KEYFILE (or with a comma, for paths with colons)."""

    name = "name=certfile[:keyfile]"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, str, str | None]:
        if isinstance(value, tuple):
            return value
        server_name, _, files = str(value).partition("=")
        certfile, _, keyfile = files.partition("," if "," in files else ":")
        if not (server_name and certfile):
            self.fail(f"must be NAME=CERTFILE or NAME=CERTFILE:KEYFILE, got {value!r}", parameter, context)
        return server_name, certfile, keyfile or None


#: OpenSSL takes 1,024 bytes (PEM_BUFSIZE); a longer line is some other file's, or endless.
LONGEST_PASSWORD = 1024


class PasswordFileType(ParamType):
    name = "file"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> str:
        try:
            with open(value) as file:
                line = file.readline(LONGEST_PASSWORD + 1).rstrip("\n")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with NUL
            self.fail(f"cannot read {value!r}: {getattr(error, 'strerror', None) or error}", parameter, context)
        if len(line) > LONGEST_PASSWORD:
            message = f"cannot read {value!r}: its first line has more than {LONGEST_PASSWORD} characters"
            self.fail(message, parameter, context)
        return line


class WorkersType(ParamType):
    name = "integer|auto"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            self.fail(f'must be a whole number or "auto", got {value!r}', parameter, context)


REPEATED = (SocketOptionType, RepeatedType, ServerNameType)
NUMBER = OrNone(float)
WHOLE = OrNone(int)

# Parameter, type, help. bool means --name/--no-name; str is passed on unchanged.
SERVER_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("accept_loops", int, "Listening sockets with an accept loop each, for every TCP address."),
    ("pool", WHOLE, "Handlers that may run at once."),
    (
        "on_full",
        click.Choice(["wait", "reject", "close_idle"]),
        "When the pool is full: leave new connections in the kernel's queue, close them, or close an idle one.",
    ),
    ("max_connections", WHOLE, "Connections open at once, idle ones included, in all workers."),
    ("max_accepts", WHOLE, "Stop after serving this many connections, in all workers."),
    ("timeout", NUMBER, "Fail a read or write after this many seconds without progress."),
    ("handler_timeout", NUMBER, "Seconds a handler may take in total."),
    ("min_rate", NUMBER, "Bytes per second; a handler that waits for a slower client is ended."),
    ("min_rate_window", float, "Seconds over which --min-rate is measured."),
    ("linger", float, "Seconds to wait for the client to close after we have."),
    ("shared_limits", str, "URL of a Redis in which several machines count their limits together."),
    (
        "on_store_failure",
        click.Choice(["local", "allow", "refuse"]),
        "While that Redis is away: the limits of this machine hold, no limits hold, or clients are refused.",
    ),
    ("store_timeout", float, "Seconds for an answer of that Redis."),
    ("handover", bool, "Move idle connections of a worker that leaves to another; conn.resumed tells the handler."),
)

#: Options for handlers that can begin anew, which commands add themselves.
OF_MOVABLE = frozenset({"handover", "relieve_lagging"})

# Fields of ProxyProtocol: --proxy-protocol is the first; the others append their name to it.
BALANCER_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "trusted",
        RepeatedType(),
        "Network or address of load balancers that send client addresses in a PROXY header; may be repeated.",
    ),
    ("timeout", float, "Seconds within which the PROXY header must arrive."),
)

# Arguments of ClientLimits: the option is --client- followed by the name.
CLIENT_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("allow", RepeatedType(), "Network or address of clients that may connect; may be repeated.  [default: all]"),
    ("deny", RepeatedType(), "Network or address of clients that may not connect; may be repeated."),
    ("connections", WHOLE, "Connections that one client may have at once (IPv6: one /64)."),
    ("new_per_second", NUMBER, "Connections that one client may open per second."),
    ("burst", WHOLE, "Burst size: how many it may open at once; none: as many as in one second."),
)

# Names of objects in the user's program.
OBJECT_OPTIONS: tuple[tuple[str, str], ...] = (
    ("connection_class", "Subclass of Connection that is passed to the handler."),
    ("context", "Object that becomes the context of each connection."),
    ("on_connect", "Called first with each connection; it is closed unserved if this returns False."),
    ("on_disconnect", "Called with each connection when its handler has ended."),
    ("on_error", "Called with connection and exception when a handler fails, instead of logging the error."),
    ("on_start", "Called with the Server when it listens, before the first connection is accepted."),
    ("on_stop", "Called with the Server during a stop, when its last connection has ended."),
)

LISTEN_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("reuse_port", bool, "Several listening sockets on one port (SO_REUSEPORT)."),
    ("reuse_address", bool, "Bind even if old connections are in TIME-WAIT (SO_REUSEADDR)."),
    ("shared", bool, "Share the port with other processes of the same user."),
    ("fast_open", int, "Pending connections with data in their SYN (TCP_FASTOPEN); 0 turns it off."),
    ("defer_accept", NUMBER, "Seconds to wait for a client's first bytes before accepting it (TCP_DEFER_ACCEPT)."),
    ("backlog", WHOLE, "Connections that may wait to be accepted; none: as many as the kernel allows."),
    ("no_delay", bool, "Send small writes at once (TCP_NODELAY)."),
    ("keepalive", bool, "Probe idle connections (SO_KEEPALIVE)."),
    ("keepalive_idle", int, "Seconds of silence before the first probe."),
    ("keepalive_interval", int, "Seconds between unanswered probes."),
    ("keepalive_count", int, "Unanswered probes until the connection fails."),
    ("user_timeout", NUMBER, "Seconds that sent data may stay unacknowledged (TCP_USER_TIMEOUT)."),
    ("receive_buffer", WHOLE, "Bytes (SO_RCVBUF); none, usually best: the kernel tunes it."),
    ("send_buffer", WHOLE, "Bytes (SO_SNDBUF); none, usually best: the kernel tunes it."),
    ("ipv6_only", bool, "Refuse IPv4 connections on an IPv6 socket; not given: * accepts both."),
    ("device", str, "Only accept connections on this network interface (SO_BINDTODEVICE)."),
    ("transparent", bool, "Accept connections to addresses that are not this host's (IP_TRANSPARENT)."),
    ("free_bind", bool, "Bind to an address that the host does not have yet (IP_FREEBIND)."),
    ("multipath", bool, "Multipath TCP."),
    ("congestion", str, "Congestion control, such as bbr or cubic (TCP_CONGESTION)."),
    ("unix_mode", OctalType(), "Permission bits of a Unix socket's path, such as 660."),
    ("unix_owner", str, "Owner of a Unix socket's path, by name or number."),
    ("unix_group", str, "Group of a Unix socket's path, by name or number."),
    ("extra", SocketOptionType(), "One more socket option, such as SOL_SOCKET:SO_MARK:7; may be repeated."),
)

FIELDS = frozenset(option[0] for option in (*SERVER_OPTIONS, *OBJECT_OPTIONS, *LISTEN_OPTIONS))

# Fields of TLSConfig: the option is --tls- followed by the name. The password comes from a file, since every user of
# the machine can read the command line (proc(5)).
TLS_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("certfile", str, "PEM file with the server's certificate and its chain: every connection is encrypted."),
    ("keyfile", str, "PEM file with the private key; not given: it is in --tls-certfile."),
    ("password", PasswordFileType(), "File whose first line is the password of the private keys."),
    ("sni", ServerNameType(), "Another certificate, for clients that ask for this name; may be repeated."),
    ("strict_sni", bool, "Refuse clients that ask for any other name, or for none."),
    ("client_auth", click.Choice(["none", "optional", "required"]), "Whether clients must have a certificate."),
    ("client_ca", str, "PEM file or folder with the CAs that issue client certificates."),
    ("crl", str, "PEM file with revocation lists for client certificates."),
    ("alpn", RepeatedType(), "Protocol to negotiate, such as h2; may be repeated, best first."),
    ("minimum_version", click.Choice(["TLSv1.2", "TLSv1.3"]), "The oldest version."),
    ("maximum_version", click.Choice(["TLSv1.2", "TLSv1.3"]), "The newest version."),
    ("ciphers", str, "TLS 1.2 cipher suites in OpenSSL's notation."),
    ("handshake_timeout", float, "Seconds a handshake may take."),
    ("max_handshakes", int, "Handshakes that may be in progress at once."),
    ("session_tickets", int, "Tickets a client gets to resume its session."),
    ("key_log_file", str, "Append the connections' secrets to this file, for Wireshark."),
    ("report_truncation", bool, "Treat an end without close_notify as an error in the handler."),
    (
        "watch",
        NUMBER,
        "Check every N seconds whether a file has changed, and reload the files if so. With --acme, "
        f"{DEFAULT_ACME_WATCH:g} if it is not given.",
    ),
)

# Arguments of TLSConfig.acme, by parameter: the option is --acme, or --acme- followed by the name.
ACME_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    (
        "acme",
        "names",
        RepeatedType(),
        "Order a certificate for this host name by ACME (Let's Encrypt), and renew it; may be repeated. The authority "
        "connects to port 443 of the name, which must lead here.",
    ),
    ("acme_email", "email", str, "Address for messages of the authority."),
    (
        "acme_directory",
        "directory",
        str,
        "staging (Let's Encrypt's, for tests: no browser trusts its certificates), production, or the https URL of "
        "another authority's directory.",
    ),
    (
        "acme_folder",
        "folder",
        str,
        "Folder for account, keys and certificates.  [default: acme in systemd's STATE_DIRECTORY, or "
        "~/.local/state/gtcpserver/acme]",
    ),
    ("acme_ca_file", "ca_file", str, "PEM file with the CAs of the authority's own certificate."),
)


# Fields of SupervisorConfig, except graceful_timeout, which is --stop-timeout, as with one process.
SUPERVISOR_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("workers", WorkersType(), "Worker processes; auto: one per CPU. Not given: a single process."),
    ("preload", bool, "Import the program once, in the master: less memory, but a reload does not import it again."),
    ("worker_timeout", NUMBER, "Seconds a worker's event loop may be blocked before the worker is replaced."),
    ("retire_timeout", NUMBER, "Seconds connections get when their worker was replaced (reload, upgrade, recycling)."),
    ("max_retired", WHOLE, "Replaced workers that may remain; beyond that, the oldest get --stop-timeout to finish."),
    ("probation", float, "Seconds a new worker must live before the one it replaces leaves."),
    ("reload_one_by_one", bool, "Replace one worker after the other on a reload: needs memory for only one more."),
    ("drain_delay", float, "Seconds between 'not ready' and the end of accepting in a stop, for load balancers."),
    ("recycle_after", WHOLE, "Replace a worker after it has accepted this many connections."),
    ("recycle_jitter", WHOLE, "Add up to this many, at random; none: a tenth of --recycle-after."),
    ("recycle_memory", NUMBER, "Replace a worker when it uses more than this many MiB of memory."),
    (
        "relieve_lagging",
        bool,
        "With --handover: a worker whose event loop stays late gives idle connections and tunnels to the others.",
    ),
    ("pin_cpus", bool, "Run worker i on CPU i and give it the connections that this CPU receives."),
    ("pid_file", str, "Write the master's process ID to this file."),
    ("user", str, "Run the workers as this user (name or number)."),
    ("group", str, "Run the workers as this group."),
    ("rotate_tickets", NUMBER, "Seconds between new keys for TLS session tickets, which all workers share."),
    ("agent_check", str, "Answer haproxy's agent checks; a port without a host is on 127.0.0.1."),
    ("umask", OctalType(), "Mode bits that new files do not get, such as 027."),
    ("control", str, "Path of the control socket for gtcpserver ctl."),
    ("log_file", str, "Write standard error to this file; SIGUSR1 reopens it."),
)

# Functions of the user's program that workers call.
HOOK_OPTIONS: tuple[tuple[str, str], ...] = (
    ("worker_start", "Called in each worker, with the Worker, before it is ready."),
    ("worker_stop", "Called in each worker, with the Worker, when its last connection has ended."),
    ("worker_error", "Called with a Worker and a message when a worker has failed."),
)


# Short names, and the names that other servers' commands use for these options.
SHORTER = {
    "workers": ("-w",),
    "recycle_after": ("--max-connections-per-worker",),
    "tls_certfile": ("--tls-cert",),
    "tls_keyfile": ("--tls-key",),
    "tls_minimum_version": ("--tls-min-version",),
    "tls_maximum_version": ("--tls-max-version",),
}


def server_options(command: Command) -> Command:
    """Add --bind and an option for every parameter of Server, ListenConfig and TLSConfig to a command."""
    command = handover_options()(command)
    return click.option(
        "--bind",
        "-b",
        "bind",
        type=AddressType(),
        multiple=True,
        default=("127.0.0.1:5000",),
        show_default=True,
        metavar="ADDRESS",
        help="Where to listen: host:port, [IPv6]:port, *:port (every address), port (on 127.0.0.1), unix:/path, "
        "unix:@name or fd:number; may be repeated.",
    )(server_options_but_bind(command))


def handover_options(explanation: str = "") -> Callable[[Command], Command]:
    """Return a decorator that adds the options of OF_MOVABLE.

    Args:
        explanation: of --handover, for handlers of ours; "": the one for handlers of the program.
    """

    def decorate(command: Command) -> Command:
        for name, kind, text in (*SERVER_OPTIONS, *SUPERVISOR_OPTIONS):
            if name in OF_MOVABLE:
                told = explanation if explanation and name == "handover" else text
                command = _option(name, kind, told, False)(command)
        return command

    return decorate


def server_options_but_bind(command: Command) -> Command:
    """:func:`server_options` for a command that takes the addresses as its argument ``bind``."""
    defaults: dict[str, Any] = {name: given.default for name, given in inspect.signature(Server).parameters.items()}
    defaults |= {field.name: field.default for field in dataclasses.fields(ListenConfig)}
    tls_defaults = {field.name: field.default for field in dataclasses.fields(TLSConfig)}
    command = click.option(
        "--tls-self-signed",
        is_flag=True,
        help="For testing: encrypt with a new self-signed certificate for localhost. Clients cannot trust it.",
    )(command)
    # The last decorator comes first in --help.
    command = acme_options(command)
    for name, kind, text in reversed(TLS_OPTIONS):
        command = _option(f"tls_{name}", kind, text, tls_defaults[name])(command)
    limits = {name: given.default for name, given in inspect.signature(ClientLimits).parameters.items()}
    for name, kind, text in reversed(CLIENT_OPTIONS):
        command = _option(f"client_{name}", kind, text, limits[name])(command)
    balancers = {field.name: field.default for field in dataclasses.fields(ProxyProtocol)}
    for name, kind, text in reversed(BALANCER_OPTIONS):
        command = _option(of_balancers(name), kind, text, balancers[name])(command)
    for name, kind, text in reversed((*SERVER_OPTIONS, *LISTEN_OPTIONS)):
        if name in OF_MOVABLE:
            continue
        command = _option(name, kind, text, defaults[name])(command)
    for name, text in reversed(OBJECT_OPTIONS):
        command = click.option(flag(name), name, metavar="MODULE:NAME", help=text)(command)
    return command


def acme_options(command: Command) -> Command:
    """Add an option for every argument of `TLSConfig.acme` to a command."""
    arguments = inspect.signature(TLSConfig.acme).parameters
    for name, argument, kind, text in reversed(ACME_OPTIONS):
        default = arguments[argument].default
        command = _option(name, kind, text, None if default is inspect.Parameter.empty else default)(command)
    return command


def supervisor_options(command: Command) -> Command:
    """Add the options of worker processes to a command."""
    defaults = {field.name: field.default for field in dataclasses.fields(SupervisorConfig)}
    defaults["workers"] = None  # a single process
    for name, text in reversed(HOOK_OPTIONS):
        command = click.option(flag(name), name, metavar="MODULE:NAME", help=text)(command)
    for name, kind, text in reversed(SUPERVISOR_OPTIONS):
        if name in OF_MOVABLE:
            continue
        command = _option(name, kind, text, defaults[name])(command)
    return command


def check_addresses(context: click.Context) -> None:
    """Raise click.UsageError if two of the addresses to listen on are the same."""
    addresses = list(context.params["bind"])
    _check_none_twice("--bind", addresses)
    for name in ("metrics", "agent_check"):
        address = context.params.get(name)
        if address is not None:
            try:
                parse_address(address)
            except ConfigError:  # reported when it is used
                continue
            addresses.append(address)
            _check_none_twice(flag(name), addresses)


def _check_none_twice(option: str, addresses: list[Any]) -> None:
    try:
        check_none_twice(addresses)
    except ConfigError as error:
        raise click.UsageError(f"{option}: {error}") from None


def make_supervisor_config(context: click.Context) -> SupervisorConfig | None:
    """Make the requested SupervisorConfig; None without --workers. Raise click.UsageError."""
    names = [option[0] for option in (*SUPERVISOR_OPTIONS, *HOOK_OPTIONS) if was_given(context, option[0])]
    if context.get_parameter_source("control") is ParameterSource.ENVIRONMENT and "workers" not in names:
        names.remove("control")  # GTCPSERVER_CONTROL is also for gtcpserver ctl
    if "workers" not in names:
        if names:
            option = _flag_in(context, names[0])
            raise click.UsageError(f"{option}: needs --workers; --workers 1 is a master with one worker")
        return None
    if was_given(context, "accept_loops"):
        instead = "each worker has one listening socket for every TCP address"
        raise click.UsageError(f"--accept-loops: cannot be used together with --workers: {instead}")
    options = {name: context.params[name] for name, _, _ in SUPERVISOR_OPTIONS if name in names}
    if options.get("relieve_lagging") and not context.params.get("handover"):
        raise click.UsageError(f"{flag('relieve_lagging')}: needs {flag('handover')}")
    options["graceful_timeout"] = context.params["stop_timeout"]
    options["metrics"] = context.params["metrics"]
    fields = {"metrics", *(name for name, _, _ in SUPERVISOR_OPTIONS)}
    return explained(lambda: SupervisorConfig(**options), fields=fields, named=partial(_flag_in, context))


def _flag_in(context: click.Context, name: str) -> str:
    """Return the option of this command for a setting: the proxy has another one for the workers' user."""
    return next((option.opts[0] for option in context.command.params if option.name == name), flag(name))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Two parameters of AccessLog, which are options of the server on the command line.
ACCESS_LOG_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "access_log",
        click.Choice(["text", "json"]),
        "Write a line when a connection ends.  [default: none, or text with --access-log-file]",
    ),
    (
        "access_log_file",
        str,
        "Append these lines to this file, which is reopened after a rename.  [default: the log]",
    ),
)


def access_log_options(command: Command) -> Command:
    """Add the options of the access log to a command that has no access log of its own."""
    for name, kind, text in reversed(ACCESS_LOG_OPTIONS):
        command = _option(name, kind, text, None)(command)
    return command


def _make_access_log(context: click.Context) -> AccessLog | None:
    style, path = context.params.get("access_log"), context.params.get("access_log_file")
    if style is None and path is None:
        return None
    try:
        return AccessLog(style or "text", path)
    except ConfigError as error:
        raise click.UsageError(f"--access-log-file: {error}") from None


def make_listen_config(context: click.Context) -> ListenConfig:
    """Make the requested ListenConfig. Raise click.UsageError."""
    options = {name: context.params[name] for name, _, _ in LISTEN_OPTIONS if was_given(context, name)}
    return explained(lambda: ListenConfig(**options))


def make_server(
    context: click.Context, handler: Callable[[Any], Any], listen: ListenConfig, *, load: bool = True
) -> Server:
    """Make the requested Server. Raise click.UsageError and RunError.

    Args:
        load: load the user's objects and open the access log; otherwise only check the other options.
    """
    options = {name: context.params[name] for name, _, _ in SERVER_OPTIONS if was_given(context, name)}
    for name, _ in OBJECT_OPTIONS:
        if load and was_given(context, name):
            reference, option = context.params[name], flag(name)
            options[name] = load_hook(name, reference, option) if name in HOOKS else load_object(reference, option)
    tls = {name: context.params[f"tls_{name}"] for name, _, _ in TLS_OPTIONS if was_given(context, f"tls_{name}")}
    if context.params["tls_self_signed"]:
        made = make_self_signed(context)
        tls |= {"certfile": made.certfile, "keyfile": made.keyfile}
    acme = given_for_acme(context)
    if acme:
        options["tls"] = make_acme_config(acme, tls)
    elif tls:
        options["tls"] = make_tls_config(tls)
    if (balancers := _make_proxy_protocol(context)) is not None:
        options["proxy_protocol"] = balancers
    limits = {
        name: context.params[f"client_{name}"] for name, _, _ in CLIENT_OPTIONS if was_given(context, f"client_{name}")
    }
    if limits:
        options["client_limits"] = explained(
            lambda: ClientLimits(**limits), "client_", {name for name, _, _ in CLIENT_OPTIONS}
        )
    options["freeze_gc"] = bool(context.params.get("freeze_gc"))
    if load and (access_log := _make_access_log(context)) is not None:
        options["access_log"] = access_log
    asked = context.params["bind"]
    bind = list(asked) if isinstance(asked, tuple) else [asked]
    return explained(lambda: Server(bind, handler, listen=listen, **options))


def of_balancers(name: str) -> str:
    return "proxy_protocol" if name == "trusted" else f"proxy_protocol_{name}"


def _make_proxy_protocol(context: click.Context) -> ProxyProtocol | None:
    names = [name for name, _, _ in BALANCER_OPTIONS if was_given(context, of_balancers(name))]
    if not names:
        return None
    if "trusted" not in names:
        raise click.UsageError(f"{flag(of_balancers(names[0]))}: needs --proxy-protocol")
    options = {name: context.params[of_balancers(name)] for name in names}
    try:
        return ProxyProtocol(**options)
    except ConfigError as error:
        name, _, message = str(error).partition(" ")
        raise click.UsageError(f"{flag(of_balancers(name))}: {message}") from None


def make_tls_config(options: dict[str, Any]) -> TLSConfig:
    if "certfile" not in options:
        raise click.UsageError(f"{flag('tls_' + next(iter(options)))}: needs --tls-certfile")
    return explained(lambda: tls_config(**options), "tls_", {name for name, _, _ in TLS_OPTIONS})


def given_for_acme(context: click.Context) -> dict[str, Any]:
    """Return the options of `acme_options` that were given, by parameter."""
    return {name: context.params[name] for name, _, _, _ in ACME_OPTIONS if was_given(context, name)}


def make_acme_config(acme: dict[str, Any], tls: dict[str, Any]) -> TLSConfig:
    """Make the TLSConfig of --acme, with the other options of TLS. Raise click.UsageError."""
    if "acme" not in acme:
        raise click.UsageError(f"{flag(next(iter(acme)))}: needs --acme")
    for name in ("certfile", "keyfile", "password"):
        if name in tls:
            raise click.UsageError(f"--acme: cannot be used together with --tls-{name}")
    arguments = {argument: acme[name] for name, argument, _, _ in ACME_OPTIONS if name in acme}
    try:
        return acme_config(**arguments, **_with_sni(tls))
    except ConfigError as error:
        name, _, message = str(error).partition(" ")
        option = next((option for option, argument, _, _ in ACME_OPTIONS if argument == name), None)
        if option is not None:
            raise click.UsageError(f"{flag(option)}: {message}") from None
        raise click.UsageError(name_option(str(error), "tls_", {name for name, _, _ in TLS_OPTIONS})) from None


def make_self_signed(context: click.Context) -> CertificateFiles:
    """Make the certificate of --tls-self-signed, and warn about it. Raise click.UsageError."""
    for name in ("tls_certfile", "acme"):
        if was_given(context, name):
            raise click.UsageError(f"--tls-self-signed: cannot be used together with {flag(name)}")
    made = explained(self_signed)
    log.warning("made a self-signed certificate for localhost; clients cannot trust it: use it only for testing")
    return made


def tls_config(**options: Any) -> TLSConfig:
    """Make a TLSConfig from the options, which give certificates as (name, certfile, keyfile)."""
    return TLSConfig(**_with_sni(options))


def acme_config(names: Any, **options: Any) -> TLSConfig:
    """Make a TLSConfig whose certificate is ordered, from the arguments of `TLSConfig.acme`."""
    return TLSConfig.acme(list(names), **options)


def _with_sni(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "sni": {name: (certfile, keyfile) for name, certfile, keyfile in options.get("sni", ())}}


def was_given(context: click.Context, name: str) -> bool:
    # Only options that were given are passed on: Server and ListenConfig own the defaults. DEFAULT_MAP is the file.
    return context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)


Made = TypeVar("Made")


def explained(
    make: Callable[[], Made],
    prefix: str = "",
    fields: Collection[str] = FIELDS,
    named: Callable[[str], str] | None = None,
) -> Made:
    """Turn a ConfigError, which names the field, into a usage error that names the option."""
    try:
        return make()
    except ConfigError as error:
        raise click.UsageError(name_option(str(error), prefix, fields, named or flag)) from None


def name_option(
    message: str, prefix: str = "", fields: Collection[str] = FIELDS, named: Callable[[str], str] = flag
) -> str:
    """Turn `fast_open must be ...` into `--fast-open: must be ...`, and `ListenConfig(shared=True)` into `--shared`."""
    message = re.sub(r"ListenConfig\((\w+)=True\)", lambda match: flag(match[1]), message)
    match = re.match(r"(\w+)( must\b)?", message)
    if match is None or match[1] not in fields:
        return message
    return f"{named(prefix + match[1])}: {message[match.end(1) :].strip() if match[2] else message}"


def _option(name: str, kind: Any, text: str, default: Any) -> Callable[[Command], Command]:
    if kind is bool:
        on = flag(name)
        off = f"--{on[5:]}" if on.startswith("--no-") else f"--no-{on[2:]}"
        shown = None if default is None else (on if default else off)[2:]
        return click.option(f"{on}/{off}", name, default=None, help=_with_default(text, shown))
    multiple = isinstance(kind, REPEATED)
    shown = "none" if default is None and isinstance(kind, OrNone) else default
    if not multiple:
        text = _with_default(text, shown)
    option = flag(name) + ("-file" if isinstance(kind, PasswordFileType) else "")
    return click.option(option, *SHORTER.get(name, ()), name, type=kind, multiple=multiple, default=None, help=text)


def _with_default(text: str, default: object) -> str:
    return text if default in (None, dataclasses.MISSING) else f"{text}  [default: {default}]"
