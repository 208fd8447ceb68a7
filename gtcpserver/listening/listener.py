"""Open, adopt and close listening sockets."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from typing import Any

from gevent import monkey

from gtcpserver.address import Address, format_sockaddr, parse_address
from gtcpserver.errors import ConfigError

from .config import (
    ListenConfig,
    accepted_backlog,
    apply_accept_options,
    apply_address_options,
    apply_connection_options,
    create_socket,
    has_reuse_port,
    set_reuse_port,
    unix_ids,
)
from .draining import (
    HANDSHAKE_SECONDS,
    drop_new_connections,
    forget_member,
    handshakes_under_way,
    hear_new_connections,
    steer,
    unsteer,
)
from .port_holder import THIS_PROCESS, describe_holder
from .unix_path import bind_unix, remove_if_ours

__all__ = [
    "HANDSHAKE_SECONDS",
    "ListenConfig",
    "Listener",
    "forget_member",
    "handshakes_under_way",
    "open_listeners",
    "steer",
    "unsteer",
]

log = logging.getLogger("gtcpserver")

# The real ones, even in a program patched by gevent.monkey: a listening socket waits in an accept loop's watcher and
# never in a call of its own, and names are resolved before anything is served.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")
_getaddrinfo: Any = monkey.get_original("socket", "getaddrinfo")

#: How often to draw a port that must be free on each of a host name's addresses.
SAME_PORT_ATTEMPTS = 16


class Listener:
    """One listening socket, non-blocking and close-on-exec.

    Attributes:
        socket: the socket, of the standard library's own class even in a monkey-patched program.
        address: where it listens, with the real port, in the form that `parse_address` reads. "*:5000" stays "*:5000"
            if it accepts IPv4 and IPv6, otherwise it is "0.0.0.0:5000" or "[::]:5000".
        sockaddr: the result of getsockname().
        path_identity: device and inode of a Unix socket's path that this process made; None: another keeps the path.
        family: socket.AF_INET, AF_INET6 or AF_UNIX.
        owned: False for a socket or descriptor that was passed to us, which another process may hold as well. Set it to
            False when the socket is passed to another process.
        muted_by_ttl: `mute` had to require a TTL: connections accepted since then need `draining.accept_any_ttl`, or
            their clients are not heard. `Acceptor.mute` sees to it.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        address: str | None = None,
        owned: bool = True,
        path_identity: tuple[int, int] | None = None,
        given: Any = None,
    ) -> None:
        self.socket = sock
        self.sockaddr: Any = sock.getsockname()
        self.family: int = sock.family
        self.address = address if address is not None else format_sockaddr(self.sockaddr, self.family)
        self.owned = owned
        self.muted_by_ttl = False
        self.path_identity = path_identity
        self._given = given
        # A forked child has this object too, but the path and the filter belong to the process that opened it.
        self._process = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self.socket.fileno()}"
        return f"<Listener {self.address} {state}{'' if self.owned else ' not owned'}>"

    @property
    def closed(self) -> bool:
        return bool(self.socket.fileno() < 0)

    def fileno(self) -> int:
        return self.socket.fileno()

    def mute(self) -> bool:
        """Start no new connections; handshakes in progress still reach the accept queue.

        This is how to close without resetting any connection: mute, accept until EAGAIN, wait `HANDSHAKE_SECONDS` (or
        while `handshakes_under_way` reports some), accept until EAGAIN, close. A client that connects meanwhile gets no
        answer, and its kernel tries again after a second. A Unix socket's path is removed instead: connect() fails with
        ENOENT. See `draining`.

        Returns:
            False if it is not possible: the socket is not ours alone (not `owned`, or this is a forked child of the
            process that opened it), is an abstract Unix socket or multipath TCP, or the system does not support it.
        """
        if self.closed or not self._is_ours():
            return False
        if self.family == socket.AF_UNIX:
            return self._remove_path()
        way = drop_new_connections(self.socket)
        self.muted_by_ttl = way == "ttl"
        return way is not None

    def unmute(self) -> None:
        """Start new connections again after `mute`; a Unix socket's path stays removed."""
        if not self.closed and self.family != socket.AF_UNIX:
            hear_new_connections(self.socket)

    def close(self, *, keep_path: bool = False) -> None:
        """Close the socket; remove a Unix socket's path if this process made it and no other has replaced it since.

        A socket object that was passed to `open_listeners` is closed as well. Closing twice does nothing.

        Args:
            keep_path: leave a Unix socket's path, because another process keeps using the same socket.
        """
        # The accept loop closes the socket too, so a closed one says nothing about the rest.
        if keep_path:
            self.path_identity = None
        elif self._is_ours():
            self._remove_path()
        self.socket.close()
        if self._given is not None:
            self._given.close()

    def _is_ours(self) -> bool:
        return self.owned and self._process == os.getpid()

    def _remove_path(self) -> bool:
        if self.path_identity is None:
            return False
        identity, self.path_identity = self.path_identity, None
        return remove_if_ours(self.sockaddr, identity)


def open_listeners(
    address: str | int | tuple[Any, ...] | Address | socket.socket,
    config: ListenConfig | None = None,
    count: int = 1,
) -> list[Listener]:
    """Open the listening sockets of an address, or adopt an open one.

    Args:
        address: anything that `parse_address` reads, or a bound stream socket. A host name is resolved, and the sockets
            listen on every address it has. "*" is every address of the host: one IPv6 socket that also accepts IPv4
            connections, or an IPv4 one if the kernel has no IPv6. Port 0 becomes one free port for all the sockets.
            "fd:3" adopts a listening descriptor, as does a socket object: they only get the options of `config` that
            connections inherit, are not `owned`, and are closed with the `Listener`.
        config: the sockets' options.
        count: TCP sockets for each address, which form a SO_REUSEPORT group (in the order of the result), over which
            the kernel spreads the connections. Unix sockets and adopted ones are always single, and so are all if the
            system has no SO_REUSEPORT.

    Raises:
        ConfigError: the address or the options are wrong.
        OSError: the system refuses; the message names the address and, for EADDRINUSE, the process that listens there,
            if it can be found. Nothing stays open.
    """
    config = config if config is not None else ListenConfig()
    if type(count) is not int or count < 1:
        raise ConfigError(f"count must be 1 or more, got {count!r}")
    if count > 1 and not config.reuse_port:
        raise ConfigError(f"reuse_port must be True for several sockets on one port, got False with count={count}")
    if hasattr(address, "getsockname"):
        return [_adopt_socket(address, config)]
    if not isinstance(address, Address):
        address = parse_address(address)
    if address.kind == "fd":
        return [_adopt_descriptor(address.fd, config)]
    if address.kind == "unix":
        return [_open_unix(address.path, config)]
    if count > 1 and not has_reuse_port():
        log.warning("this system has no SO_REUSEPORT: %s has one listening socket instead of %d", address, count)
        count = 1
    return _open_tcp(address, config, count)


def _open_tcp(address: Address, config: ListenConfig, count: int) -> list[Listener]:
    endpoints = [_wildcard(address.port)] if address.host == "*" else _resolve(address)
    attempts = SAME_PORT_ATTEMPTS if address.port == 0 else 1
    while True:
        listeners: list[Listener] = []
        port = address.port
        try:
            for family, sockaddr in endpoints:
                sockaddr = (sockaddr[0], port, *sockaddr[2:])
                listeners += _open_group(family, sockaddr, config, count, wildcard=address.host == "*")
                port = listeners[0].sockaddr[1]
            return listeners
        except BaseException as exc:
            for listener in listeners:
                listener.close()
            # The port that was free on the first address is taken on another one: draw again.
            attempts -= 1
            if not (isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE and attempts):
                raise


def _open_group(
    family: int, sockaddr: tuple[Any, ...], config: ListenConfig, count: int, *, wildcard: bool
) -> list[Listener]:
    listeners: list[Listener] = []
    try:
        for number in range(count):
            sock = _bind(family, sockaddr, config, first=number == 0, wildcard=wildcard)
            address = f"*:{sock.getsockname()[1]}" if wildcard and _takes_both(sock) else None
            listeners.append(Listener(sock, address=address))
            sockaddr = listeners[0].sockaddr
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _bind(
    family: int, sockaddr: tuple[Any, ...], config: ListenConfig, *, first: bool, wildcard: bool
) -> socket.socket:
    """Bind and listen.

    SO_REUSEPORT would let a second server, started by mistake, bind the port and take half of the connections. So the
    first socket of a group binds *and listens* without the option, which the kernel refuses if another process listens
    there (binding is not enough: SO_REUSEADDR lets two sockets bind that do not listen yet), and gets it afterwards.
    The kernel makes it a group when the second socket, which has the option from the start, listens.
    """
    try:
        sock = create_socket(config, family)
    except OSError as exc:
        raise _explain(exc, family, sockaddr, config) from exc
    try:
        apply_address_options(sock, config)
        if wildcard and family == socket.AF_INET6 and config.ipv6_only is None:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        apply_connection_options(sock, config)
        apply_accept_options(sock, config)
        joins = config.shared or not first
        if joins:
            set_reuse_port(sock, config)
        try:
            sock.bind(sockaddr)
            sock.listen(accepted_backlog(config))
        except OSError as exc:
            raise _explain(exc, family, sockaddr, config) from exc
        if not joins:
            set_reuse_port(sock, config)
    except BaseException:
        sock.close()
        raise
    return sock


def _wildcard(port: int) -> tuple[int, tuple[Any, ...]]:
    # Do not ask whether the host has an IPv6 address: it may get one later, and a socket on :: accepts IPv4 without
    # one.
    if _can_bind("::"):
        return socket.AF_INET6, ("::", port, 0, 0)
    return socket.AF_INET, ("0.0.0.0", port)


def _takes_both(sock: socket.socket) -> bool:
    return sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def _can_bind(address: str) -> bool:
    """Return whether the kernel has IPv6, and the host this address."""
    if not socket.has_ipv6:
        return False
    try:
        with _socket_class(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
    except OSError as exc:
        # Out of descriptors, say: opening the real socket will fail as well, and report the reason.
        return exc.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
    return True


def _has_ipv6_addresses() -> bool:
    # A kernel with the family may have none (sysctl net.ipv6.conf.all.disable_ipv6=1, containers).
    try:
        with open("/proc/net/if_inet6") as file:
            return bool(file.read(1))
    except OSError:
        return _can_bind("::1")


def _resolve(address: Address) -> list[tuple[int, tuple[Any, ...]]]:
    try:
        found = _getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise socket.gaierror(exc.errno, f"{address}: {exc.strerror}") from exc
    endpoints = list(dict.fromkeys((int(family), sockaddr) for family, _, _, _, sockaddr in found))
    if len(endpoints) > 1:
        endpoints = [one for one in endpoints if not _is_of_no_use(*one)] or endpoints
    return endpoints


def _is_of_no_use(family: int, sockaddr: tuple[Any, ...]) -> bool:
    """Return whether a name has this address among others although the system lacks it: /etc/hosts gives "localhost"
    its ::1 everywhere, and other names a host's IPv6 address even if IPv6 is switched off."""
    return (
        family == socket.AF_INET6 and not _can_bind(sockaddr[0]) and (sockaddr[0] == "::1" or not _has_ipv6_addresses())
    )


def _explain(exc: OSError, family: int, sockaddr: tuple[Any, ...], config: ListenConfig) -> OSError:
    where = format_sockaddr(sockaddr, family)
    number = exc.errno or 0
    if number == errno.EADDRINUSE:
        holder = describe_holder(sockaddr)
        message = f"{where} is already in use {holder}"
        if holder == THIS_PROCESS:
            message += ": given twice, by another name, or as a part of *?"
        elif config.shared:
            message += "; to share a port, every server on it needs SO_REUSEPORT and the same user"
        else:
            message += "; to share the port on purpose use ListenConfig(shared=True)"
    elif number == errno.EACCES and 0 < sockaddr[1] < 1024:
        message = f"{where}: {exc.strerror}; ports below 1024 need CAP_NET_BIND_SERVICE"
    elif number == errno.EADDRNOTAVAIL:
        message = f"{where}: {exc.strerror}; no network interface has this address (ListenConfig(free_bind=True))"
    else:
        message = f"{where}: {exc.strerror}"
    return OSError(number, message)


def _open_unix(path: str, config: ListenConfig) -> Listener:
    sock = create_socket(config, socket.AF_UNIX)
    try:
        apply_connection_options(sock, config)
        apply_accept_options(sock, config)
        identity = bind_unix(sock, path, config.unix_mode, accepted_backlog(config), unix_ids(config))
        return Listener(sock, path_identity=identity)
    except BaseException:
        sock.close()
        raise


def _adopt_descriptor(fd: int, config: ListenConfig) -> Listener:
    try:
        mode = os.fstat(fd).st_mode
    except OSError as exc:
        raise ConfigError(f'address "fd:{fd}" must be an open file descriptor ({exc.strerror})') from exc
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f'address "fd:{fd}" must be a listening stream socket, and is no socket')
    sock = _socket_class(fileno=fd)
    try:
        _check_stream(sock, f'address "fd:{fd}"')
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError(f'address "fd:{fd}" must be a listening stream socket, and does not listen')
    except BaseException:
        sock.detach()  # its owner keeps it
        raise
    return _adopt(sock, config, None)


def _adopt_socket(given: Any, config: ListenConfig) -> Listener:
    _check_stream(given, f"address {given!r}")
    if not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        name = given.getsockname()
        if not (name[1] if isinstance(name, tuple) else name):
            raise ConfigError(f"address must be a socket that is bound, got {given!r}")
        given.listen(accepted_backlog(config))
    if isinstance(given, _socket_class):
        return _adopt(given, config, None)
    # A gevent socket: its accept would wait in a greenlet. Use another descriptor of the same socket.
    return _adopt(_socket_class(fileno=os.dup(given.fileno())), config, given)


def _adopt(sock: socket.socket, config: ListenConfig, given: Any) -> Listener:
    sock.setblocking(False)
    sock.set_inheritable(False)
    apply_connection_options(sock, config)
    return Listener(sock, owned=False, given=given)


def _check_stream(sock: Any, name: str) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        raise ConfigError(f"{name} must be a TCP or unix socket, got the address family {sock.family}")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
        raise ConfigError(f"{name} must be a stream socket, got type {sock.type}")
