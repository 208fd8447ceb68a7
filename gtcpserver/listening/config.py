"""ListenConfig: the options of a listening socket, checked when it is created, and applied to a socket."""

from __future__ import annotations

import _socket
import errno
import functools
import grp
import math
import pwd
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from gevent import monkey

from gtcpserver.checks import shown
from gtcpserver.errors import ConfigError
from gtcpserver.linux import (
    IP_FREEBIND,
    IP_TRANSPARENT,
    IS_LINUX,
    NO_OPTION,
    SO_BINDTODEVICE,
    TCP_CONGESTION,
    TCP_DEFER_ACCEPT,
    TCP_FASTOPEN,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_USER_TIMEOUT,
)

# The real class: in a monkey-patched program socket.socket is gevent's, which creates an event loop, even in a master.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

# linux/in.h: missing in the socket module of Python 3.10. The number is the same on every architecture.
IPPROTO_MPTCP = 262

NO_ID = 2**32 - 1  # (uid_t)-1, which is not a valid ID: chown(2)

MAX_KEEPALIVE_SECONDS = 32767  # MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL, linux/tcp.h
MAX_KEEPALIVE_COUNT = 127  # MAX_TCP_KEEPCNT
MAX_BUFFER = 1 << 30  # the kernel doubles the value and keeps it in a signed 32-bit number
MAX_USER_TIMEOUT = 2_147_483.0  # seconds: milliseconds in a signed 32-bit number
MAX_DEFER_ACCEPT = 3600.0  # the kernel counts retransmissions of the SYN-ACK, at most 255
DEFAULT_FAST_OPEN = 256


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """The options of listening sockets. Accepted connections inherit theirs from the listener.

    TCP options are not applied to Unix sockets. Creating one checks the ranges, and tries the options on a throw-away
    socket, so that an option missing on this system is an error here and not at the first start.
    Attributes:
        reuse_port: several listening sockets on one port, over which the kernel spreads the connections (SO_REUSEPORT,
            socket(7)). A second server on the port is still an error, unless `shared`.
        reuse_address: bind even if connections of the last server are still in TIME-WAIT (SO_REUSEADDR, socket(7)).
        shared: other processes of the same user may also listen on the port, and get a share of its connections.
        fast_open: how many pending connections may carry data in their SYN (TCP_FASTOPEN, RFC 7413); 0 turns it off.
            It needs bit 2 of the sysctl net.ipv4.tcp_fastopen. The default is left out on a system without the option.
        defer_accept: seconds (up to 3600; rounded up to whole ones, and by the kernel to retransmissions of its SYN-ACK
            at 1, 3, 7, 15 ... seconds) for which a connection without data is not accepted yet (TCP_DEFER_ACCEPT,
            tcp(7)). None turns it off. Not for protocols in which the server speaks first.
        backlog: how many connections may wait to be accepted (listen(2)). None: as many as the kernel allows
            (/proc/sys/net/core/somaxconn, 4096 since Linux 5.4): with a short queue, connections of a burst are
            dropped, and each dropped client waits a second before it tries again.
        no_delay: send small writes at once (TCP_NODELAY, tcp(7)).
        keepalive: probe idle connections (SO_KEEPALIVE, tcp(7)), so that one whose client vanished without a FIN ends.
        keepalive_idle: seconds of silence before the first probe, 1 to 32767. 60: NAT and load balancers forget a
            silent flow after 4 to 6 minutes, some sooner, and a probe a minute keeps it in their tables.
        keepalive_interval: seconds between unanswered probes, 1 to 32767.
        keepalive_count: unanswered probes until the connection fails with ETIMEDOUT, 1 to 127. With the defaults a
            vanished client is noticed after 60 + 4 * 15 = 120 seconds, with the kernel's after 2 hours 11 minutes.
        user_timeout: seconds that sent data may stay unacknowledged before the connection fails with ETIMEDOUT
            (TCP_USER_TIMEOUT, tcp(7), RFC 5482; the kernel counts milliseconds). None: the kernel's, about 15 minutes.
        receive_buffer: bytes (SO_RCVBUF, socket(7): the kernel doubles it, and silently caps it at net.core.rmem_max).
            None, usually best: the kernel tunes it for each connection (tcp_rmem).
        send_buffer: bytes (SO_SNDBUF, likewise, net.core.wmem_max, tcp_wmem).
        ipv6_only: an IPv6 socket accepts no IPv4 connections (IPV6_V6ONLY, ipv6(7)). None: "*" accepts both, and "[::]"
            what net.ipv6.bindv6only says.
        device: only accept connections on this network interface (SO_BINDTODEVICE, socket(7)).
        transparent: accept connections to addresses that are not this host's (IP_TRANSPARENT, ip(7)); for proxies.
        free_bind: bind to an address that the host does not have, or not yet (IP_FREEBIND, ip(7)).
        multipath: multipath TCP (RFC 8684); clients that speak plain TCP are served as usual.
        congestion: name of the congestion control (TCP_CONGESTION, tcp(7)), such as "bbr" or "cubic".
        unix_mode: permission bits of a Unix socket's path, such as 0o660. None: 0o777 less the umask.
        unix_owner: owner of the path, by name or number; only root may give it away. None: this process's user.
        unix_group: group of the path, by name or number; users other than root must belong to it. None: this process's.
        extra: more socket options, as tuples (level, option, value: int or bytes). Options of a level that a socket
            does not have (TCP options on a Unix socket) are not applied to it.

    Raises:
        ConfigError: a value out of range or of the wrong type, two that exclude each other, or one this system lacks.

    Example::

        from gtcpserver import ListenConfig, Server

        listen = ListenConfig(backlog=4096, defer_accept=2, user_timeout=30)
        server = Server("127.0.0.1:5000", handle, listen=listen)
    """

    reuse_port: bool = True
    reuse_address: bool = True
    shared: bool = False
    fast_open: int = DEFAULT_FAST_OPEN
    defer_accept: float | None = None
    backlog: int | None = None
    no_delay: bool = True
    keepalive: bool = True
    keepalive_idle: int = 60
    keepalive_interval: int = 15
    keepalive_count: int = 4
    user_timeout: float | None = None
    receive_buffer: int | None = None
    send_buffer: int | None = None
    ipv6_only: bool | None = None
    device: str | None = None
    transparent: bool = False
    free_bind: bool = False
    multipath: bool = False
    congestion: str | None = None
    unix_mode: int | None = None
    unix_owner: str | int | None = None
    unix_group: str | int | None = None
    extra: tuple[tuple[int, int, int | bytes], ...] = ()

    def __post_init__(self) -> None:
        for name in ("reuse_port", "reuse_address", "shared", "no_delay", "keepalive"):
            self._check_bool(name)
        for name in ("transparent", "free_bind", "multipath"):
            self._check_bool(name)
        self._check_bool("ipv6_only", optional=True)
        self._check_int("fast_open", 0, 65535)
        self._check_int("keepalive_idle", 1, MAX_KEEPALIVE_SECONDS)
        self._check_int("keepalive_interval", 1, MAX_KEEPALIVE_SECONDS)
        self._check_int("keepalive_count", 1, MAX_KEEPALIVE_COUNT)
        self._check_int("backlog", 1, 0x7FFFFFFF, optional=True)
        self._check_int("receive_buffer", 1, MAX_BUFFER, optional=True)
        self._check_int("send_buffer", 1, MAX_BUFFER, optional=True)
        self._check_seconds("defer_accept", MAX_DEFER_ACCEPT)
        self._check_seconds("user_timeout", MAX_USER_TIMEOUT)
        if self.unix_mode is not None and (type(self.unix_mode) is not int or not 0 <= self.unix_mode <= 0o777):
            raise ConfigError(f"unix_mode must be permission bits from 0 to 0o777, or None, got {self.unix_mode!r}")
        unix_ids(self)
        # IFNAMSIZ and TCP_CA_NAME_MAX: both are 16 bytes with the closing NUL.
        self._check_name("device", "the name of a network interface")
        self._check_name("congestion", "the name of a congestion control")
        self._check_extra()
        if self.shared and not self.reuse_port:
            raise ConfigError("shared=True needs reuse_port=True, got reuse_port=False")
        if any(getattr(self, field.name) != field.default for field in fields(self)):
            _try_options(self)

    def _check_bool(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if type(value) is not bool and not (optional and value is None):
            raise ConfigError(f"{name} must be True or False{' or None' * optional}, got {value!r}")

    def _check_int(self, name: str, lowest: int, highest: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        # bool is an int in Python: fast_open=True would be a queue of one.
        if type(value) is not int or not lowest <= value <= highest:
            raise ConfigError(
                f"{name} must be a whole number from {lowest} to {highest}{' or None' * optional}, got {shown(value)}"
            )

    def _check_seconds(self, name: str, highest: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= highest:
            raise ConfigError(f"{name} must be seconds, more than 0 and up to {highest:g}, or None, got {value!r}")

    def _check_name(self, name: str, meaning: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value.isascii() or not value.isprintable() or not 0 < len(value) < 16:
            raise ConfigError(f"{name} must be {meaning}, 1 to 15 ASCII characters, or None, got {value!r}")

    def _check_extra(self) -> None:
        expected = "extra must be a tuple of tuples (level, option, value: int or bytes)"
        if not isinstance(self.extra, tuple):
            raise ConfigError(f"{expected}, got {self.extra!r}")
        for entry in self.extra:
            if not isinstance(entry, tuple) or len(entry) != 3:
                raise ConfigError(f"{expected}, got {entry!r}")
            level, option, value = entry
            if type(level) is not int or type(option) is not int or type(value) not in (int, bytes):
                raise ConfigError(f"{expected}, got {entry!r}")


def unix_ids(config: ListenConfig) -> tuple[int, int]:
    """Return user and group for a Unix socket's path; -1: unchanged (chown(2)). Raise ConfigError."""
    return (
        _id("unix_owner", config.unix_owner, lambda name: pwd.getpwnam(name).pw_uid),
        _id("unix_group", config.unix_group, lambda name: grp.getgrnam(name).gr_gid),
    )


def _id(field: str, value: Any, find: Callable[[str], int]) -> int:
    if value is None:
        return -1
    if type(value) is int or (isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10):
        if 0 <= int(value) < NO_ID:
            return int(value)
    elif isinstance(value, str):
        try:
            return find(value)
        except (KeyError, ValueError):  # ValueError: a NUL in it
            pass
    raise ConfigError(f"{field} must be a {'user' if field == 'unix_owner' else 'group'} of this host, got {value!r}")


def create_socket(
    config: ListenConfig, family: int, socket_class: type[socket.socket] = _socket_class
) -> socket.socket:
    """Create a non-blocking socket of the configured protocol.

    Raises:
        ConfigError: `multipath` is set, and the system has no multipath TCP.
    """
    multipath = config.multipath and family != socket.AF_UNIX
    try:
        sock = socket_class(family, socket.SOCK_STREAM, IPPROTO_MPTCP if multipath else 0)
    except OSError as exc:
        if multipath and exc.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL):
            raise ConfigError(
                f"multipath=True: this system has no multipath TCP ({exc.strerror}); expected Linux 5.6 or newer "
                "with sysctl net.mptcp.enabled=1"
            ) from exc
        raise
    sock.setblocking(False)
    return sock


def set_reuse_port(sock: socket.socket, config: ListenConfig) -> None:
    """Let other sockets listen on the same port. The caller decides when: before bind or after it."""
    if config.reuse_port:
        option = getattr(socket, "SO_REUSEPORT", NO_OPTION)
        _apply(sock, config, iter([("shared" if config.shared else "reuse_port", socket.SOL_SOCKET, option, 1)]))


@functools.cache
def has_reuse_port() -> bool:
    """Return whether this system spreads connections by SO_REUSEPORT.

    Sandboxes such as older gVisor versions do not have it. On BSD and macOS one of the sockets gets all connections.
    """
    if not IS_LINUX:
        return False
    try:
        # Not socket.socket, which creates an event loop in a monkey-patched program; a master must not have one.
        sock = _socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        finally:
            sock.close()
    except AttributeError:
        return False
    except OSError as exc:
        # Other errors, such as EMFILE, say nothing about the option.
        return exc.errno not in (errno.ENOPROTOOPT, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
    return True


def apply_address_options(sock: socket.socket, config: ListenConfig) -> None:
    """Set the options that matter at bind (address and port), except SO_REUSEPORT, see `set_reuse_port`."""
    _apply(sock, config, _address_options(config, sock.family))


def apply_connection_options(sock: socket.socket, config: ListenConfig) -> None:
    """Set what accepted connections inherit. Call before listen: the buffers decide the SYN-ACK's window scale."""
    _apply(sock, config, _connection_options(config, sock.family))


def apply_accept_options(sock: socket.socket, config: ListenConfig) -> None:
    """Set how connections are accepted, and `extra`."""
    _apply(sock, config, _accept_options(config, sock.family))


#: Field of ListenConfig, level, option (NO_OPTION: this system, or its Python, does not know it), value.
_Option = tuple[str, int, int, int | bytes]


def _address_options(config: ListenConfig, family: int) -> Iterator[_Option]:
    if family == socket.AF_UNIX:
        return
    if config.reuse_address:
        yield "reuse_address", socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    if config.ipv6_only is not None and family == socket.AF_INET6:
        yield "ipv6_only", socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(config.ipv6_only)
    if config.device is not None:
        yield "device", socket.SOL_SOCKET, SO_BINDTODEVICE, config.device.encode() + b"\0"
    # The IPv4 options also work on IPv6 sockets: the kernel keeps one flag for both.
    if config.transparent:
        yield "transparent", socket.IPPROTO_IP, IP_TRANSPARENT, 1
    if config.free_bind:
        yield "free_bind", socket.IPPROTO_IP, IP_FREEBIND, 1


def _connection_options(config: ListenConfig, family: int) -> Iterator[_Option]:
    if config.receive_buffer is not None:
        yield "receive_buffer", socket.SOL_SOCKET, socket.SO_RCVBUF, config.receive_buffer
    if config.send_buffer is not None:
        yield "send_buffer", socket.SOL_SOCKET, socket.SO_SNDBUF, config.send_buffer
    if family == socket.AF_UNIX:
        return
    tcp = socket.IPPROTO_TCP
    yield "no_delay", tcp, socket.TCP_NODELAY, int(config.no_delay)
    yield "keepalive", socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(config.keepalive)
    if config.keepalive:
        yield "keepalive_idle", tcp, TCP_KEEPIDLE, config.keepalive_idle
        yield "keepalive_interval", tcp, TCP_KEEPINTVL, config.keepalive_interval
        yield "keepalive_count", tcp, TCP_KEEPCNT, config.keepalive_count
    if config.user_timeout is not None:
        milliseconds = max(1, round(config.user_timeout * 1000))
        yield "user_timeout", tcp, TCP_USER_TIMEOUT, milliseconds
    if config.congestion is not None:
        yield "congestion", tcp, TCP_CONGESTION, config.congestion.encode()


def _accept_options(config: ListenConfig, family: int) -> Iterator[_Option]:
    if family != socket.AF_UNIX:
        if config.fast_open:
            yield "fast_open", socket.IPPROTO_TCP, TCP_FASTOPEN, config.fast_open
        if config.defer_accept is not None:
            seconds = math.ceil(config.defer_accept)
            yield "defer_accept", socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, seconds
    levels = {
        socket.AF_UNIX: (socket.SOL_SOCKET,),
        socket.AF_INET: (socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_TCP),
    }.get(socket.AddressFamily(family))
    for level, option, value in config.extra:
        if levels is None or level in levels:
            yield "extra", level, option, value


def _apply(sock: socket.socket, config: ListenConfig, options: Iterator[_Option]) -> None:
    for field, level, option, value in options:
        try:
            sock.setsockopt(level, option, value)
        except OSError as exc:
            if getattr(config, field) == getattr(ListenConfig, field):
                # It was not requested: a system without fast open, say, is served without.
                continue
            raise ConfigError(_explain(config, field, (level, option, value), exc)) from exc


def _explain(config: ListenConfig, field: str, option: tuple[Any, ...], exc: OSError) -> str:
    expected = {
        "device": "the name of an existing network interface",
        "congestion": f"one of: {_read('/proc/sys/net/ipv4/tcp_available_congestion_control')}",
        "transparent": "Linux, and the privilege CAP_NET_ADMIN or CAP_NET_RAW",
        "free_bind": "Linux",
        "extra": "options that this system's sockets have",
    }.get(field, "a system whose sockets have this option")
    if exc.errno == errno.ENOPROTOOPT and config.multipath:
        expected += "; with multipath=True fewer are there"
    value = getattr(config, field)
    what = f"{field}={value!r}" if field != "extra" else f"extra {option!r}"
    return f"{what}: the system refuses it ({exc.strerror}); expected {expected}"


@functools.lru_cache(maxsize=64)
def _try_options(config: ListenConfig) -> None:
    # The cache keeps successes; failures are tried again. An IPv6 socket has the options of IPv4, too.
    try:
        sock = create_socket(config, socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)
    except OSError as exc:
        if exc.errno != errno.EAFNOSUPPORT:
            return  # out of descriptors, say: not the fault of this configuration
        sock = create_socket(config, socket.AF_INET)
    with sock:
        set_reuse_port(sock, config)
        apply_address_options(sock, config)
        apply_connection_options(sock, config)
        apply_accept_options(sock, config)


def accepted_backlog(config: ListenConfig) -> int:
    """Return the backlog for listen(2): the requested one, or what the kernel allows."""
    if config.backlog is not None:
        return config.backlog
    text = _read("/proc/sys/net/core/somaxconn")
    return int(text) if text.isdigit() else socket.SOMAXCONN


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
