"""BackOff: how long to leave a peer alone that cannot be reached, and dialling it, over TLS if wanted."""

from __future__ import annotations

import random
import ssl
from time import monotonic
from typing import Any

import gevent
import gevent.ssl

from gtcpserver.address import parse_address
from gtcpserver.checks import check_number
from gtcpserver.errors import ConfigError

from .connect import connect
from .connection import Connection, check_connection_class

#: Seconds to the second attempt. Each further pause is twice the last one.
FIRST_PAUSE = 0.1


class BackOff:
    """The pauses between failed attempts: 0.1 s, then twice as long each time.

    Half of each pause is random, so that many clients of a peer that is up again do not come at once.

    Args:
        longest: seconds of the longest pause.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._pause = 0.0
        self._until = 0.0
        self.failures = 0
        self.error: OSError | EOFError | None = None

    def left(self) -> float:
        """Return the seconds until the next attempt."""
        return max(0.0, self._until - monotonic())

    def failed(self, error: OSError | EOFError | None, failures: int | None = None) -> None:
        """Note a failed attempt.

        Args:
            error: why.
            failures: ``self.failures`` at its beginning: if others have failed since, it does not lengthen the pause.
        """
        self.error = error.with_traceback(None) if error is not None else None
        if failures is None or failures == self.failures:
            self._pause = min(self._longest, 2 * self._pause or FIRST_PAUSE)
            self._until = monotonic() + self._pause * random.uniform(0.5, 1)
            self.failures += 1

    def worked(self) -> None:
        self._pause = self._until = 0.0
        self.failures = 0
        self.error = None


class Dial:
    """How to reach a peer; the arguments are those of :class:`ConnectionPool`."""

    def __init__(
        self,
        address: str | tuple[Any, ...],
        connect_timeout: float,
        timeout: float | None,
        tls: Any,
        server_hostname: str | None,
        connection_class: type[Connection],
    ) -> None:
        parsed = parse_address(address)
        if parsed.kind == "fd" or parsed.host == "*" or (parsed.kind == "tcp" and not parsed.port):
            raise ConfigError(f'address to connect to must be "host:port" or "unix:/path", got {address!r}')
        check_number("connect_timeout", connect_timeout, above=0)
        check_number("timeout", timeout, above=0, none="to wait forever")
        if tls is True:
            # gevent's create_default_context makes a blocking one in a program that is not monkey-patched.
            tls = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.load_default_certs()
        elif tls is not None and not isinstance(tls, gevent.ssl.SSLContext):
            raise ConfigError(f"tls must be True or a gevent.ssl.SSLContext, got {tls!r}")
        if not (server_hostname is None or (isinstance(server_hostname, str) and server_hostname)):
            raise ConfigError(
                f"server_hostname must be a name, or None for that of the address, got {server_hostname!r}"
            )
        check_connection_class(connection_class)
        if server_hostname is None and parsed.kind == "tcp":
            server_hostname = parsed.host
        if tls is not None and tls.check_hostname and server_hostname is None:
            raise ConfigError(f"server_hostname is needed to check the certificate of {parsed}, which has no host name")
        self.address = str(parsed)
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._tls = tls
        self._server_hostname = server_hostname
        self._connection_class = connection_class

    def __call__(self) -> Any:
        """Connect. Raise OSError, TimeoutError among them."""
        late = TimeoutError(f"not connected to {self.address} within {self._connect_timeout} seconds")
        with gevent.Timeout(self._connect_timeout, late):
            sock: Any = connect(self.address, connection_class=self._connection_class)
            try:
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_hostname=self._server_hostname)
                self.set_timeout(sock)
            except BaseException:
                sock.close()
                raise
        return sock

    def set_timeout(self, sock: Any) -> None:
        """Give a connection the timeout that a new one has."""
        sock.settimeout(self._timeout)
