"""Connect to Redis, by redis-py over gevent's sockets: they wait in the event loop also where nothing is patched."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from gevent import socket, ssl

from gtcpserver.process.forked import close_in_children

from .settings import StoreSettings

#: Seconds for each step of connecting: the TCP connection, the TLS handshake, the login. Nobody waits for them.
STEP_SECONDS = 0.5

#: Bytes of an answer without an end. Ours have some dozen, those of ROLE and of sentinels some hundred.
LONGEST_ANSWER = 256 * 1024


class StoreError(Exception):
    """Redis does not answer as it should; the message says what is wrong."""


def connect(settings: StoreSettings) -> Any:
    """Return a `redis.Connection` to the master, which is logged in. The caller calls its `disconnect`.

    Raises:
        StoreError, OSError, redis.RedisError: it cannot be reached, or does not let us in.
    """
    if settings.path:
        return _connected(settings, settings.path, 0)
    if not settings.service:
        return _connected(settings, *settings.hosts[0])
    connection = _connected(settings, *_master(settings))
    try:
        connection.send_command("ROLE")
        if connection.read_response()[0] != b"master":  # sentinels learn of a failover some seconds later
            raise StoreError("sentinels name a server that is no master")
    except BaseException:
        connection.disconnect()
        raise
    return connection


def _master(settings: StoreSettings) -> tuple[str, int]:
    """Return the address of the master, from the first sentinel that knows it."""
    why = "no sentinel"
    for host, port in settings.hosts:
        try:
            sentinel = _connected(settings, host, port, of_sentinel=True)
            try:
                sentinel.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", settings.service)
                found = sentinel.read_response()
            finally:
                sentinel.disconnect()
            if found is not None:
                return found[0].decode(), int(found[1])
            why = f"unknown to {host}:{port}"
        except Exception as error:
            why = f"{host}:{port}: {error}"
    raise StoreError(f"no sentinel names a master of {settings.service} ({why})")


def _connected(settings: StoreSettings, host: str, port: int, of_sentinel: bool = False) -> Any:
    options = settings.options
    connection = _connection_class()(
        host=host,
        port=port,
        db=0 if of_sentinel else settings.db,
        username=options.get("sentinel_username") if of_sentinel else settings.username,
        password=options.get("sentinel_password") if of_sentinel else settings.password,
        socket_timeout=STEP_SECONDS,
        socket_connect_timeout=STEP_SECONDS,
        protocol=2,
    )
    connection.store_settings = settings
    try:
        connection.connect()
    except BaseException:
        connection.disconnect()
        raise
    return connection


_classes: list[Any] = []


def load_library() -> None:
    """Import redis-py, which takes 0.1 s of CPU: not while a connection waits."""
    _connection_class()


def _connection_class() -> Any:
    """Return the class of connections, made when it is first needed: redis-py is an extra."""
    if not _classes:
        import redis

        base: Any = redis.Connection

        class Connection(base):  # type: ignore[misc]
            """A connection of redis-py whose socket is gevent's. It is used by one reader and one writer at a time."""

            store_settings: StoreSettings
            own_socket: Any = None

            def _connect(self) -> Any:
                self.own_socket = _Bounded(_open_socket(self.store_settings, self.host, self.port))
                return self.own_socket

        _classes.append(Connection)
    return _classes[0]


class _Bounded:
    """A socket that fails when an answer has no end: a parser that always finds input would keep the event loop.

    Attributes:
        left: bytes until then; set again after each answer.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.left = LONGEST_ANSWER

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, size: int) -> Any:
        data = self._sock.recv(size)
        self._took(len(data))
        return data

    def recv_into(self, *arguments: Any) -> int:
        """As hiredis reads, where it is installed."""
        size: int = self._sock.recv_into(*arguments)
        self._took(size)
        return size

    def _took(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise StoreError("an answer has no end")


def _open_socket(settings: StoreSettings, host: str, port: int) -> Any:
    if settings.path:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(STEP_SECONDS)
        try:
            sock.connect(settings.path)
        except BaseException:
            sock.close()
            raise
    else:
        sock = socket.create_connection((host, port), STEP_SECONDS)
    try:
        if not settings.path:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if settings.tls:
            sock = _context(settings).wrap_socket(sock, server_hostname=host)
        close_in_children(sock)
    except BaseException:
        with suppress(OSError):
            sock.close()
        raise
    return sock


def _context(settings: StoreSettings) -> Any:
    """Make a context for each connection: renewed files count for the next one."""
    options = settings.options
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if options.get("ssl_check_hostname") == "false" or options.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
    if options.get("ssl_cert_reqs") == "none":
        context.verify_mode = ssl.CERT_NONE
    elif "ssl_ca_certs" in options:
        context.load_verify_locations(options["ssl_ca_certs"])
    else:
        context.load_default_certs()
    if "ssl_certfile" in options:
        # With a function: without one, OpenSSL asks for a password on the terminal.
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), lambda: "")
    return context
