"""Monitor: metrics, health checks and the status page beside one server, in its process."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gtcpserver._version import __version__
from gtcpserver.adapters import from_wsgi
from gtcpserver.address import Address, parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.listening.config import ListenConfig
from gtcpserver.networks import as_ip
from gtcpserver.server.server import Server

from .source import FromServer, Source
from .watch import Watch

if TYPE_CHECKING:
    import socket

log = logging.getLogger("gtcpserver")

#: Enough for some scrapers, probes and browsers; whoever opens more has the oldest silent one closed.
MOST_CONNECTIONS = 64
MOST_REQUESTS = 16

#: Seconds in which nothing moves, and that a whole connection (one request) may take. Prometheus gives up after 10.
TIMEOUT = 5.0
REQUEST_TIMEOUT = 10.0

#: Seconds that answers under way get at the end.
STOP_TIMEOUT = 2.0


class Monitor:
    """Serves metrics and more of a server over HTTP: /metrics, /healthz, /readyz, /stats, /connections and a page at /.

    It has a listening socket, a pool and limits of its own. Without one a server measures nothing.

    Args:
        server: which is watched. Best before its start: /readyz then says "starting".
        address: where to listen, as :class:`Server`; a port alone is on 127.0.0.1. The page shows the addresses of
            clients and asks for no password: think before you name another address than a loopback one.

    Raises:
        ConfigError: the address cannot work, or prometheus_client is missing.
    """

    def __init__(self, server: Server, address: str | int | tuple[Any, ...] | Address) -> None:
        self._address = check_metrics_address(address)
        self._watch = Watch(server)
        self._pages = make_pages(FromServer(server, self._watch), self._address)

    def start(self) -> None:
        """Listens and answers. Raises OSError: the address cannot be had; the message names it."""
        try:
            self._pages.start()
        except OSError as error:
            raise OSError(error.errno, f"metrics: {error.strerror or error}") from None
        log.info("metrics and status page on %s", url_of(self.address))

    def stop(self) -> None:
        """Finishes the answers under way, for two seconds at most, and closes."""
        self._watch.close()
        self._pages.stop(STOP_TIMEOUT)

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where it listens, with the real port. Raises GtcpServerError before the start."""
        return self._pages.address


def make_pages(source: Source, address: Address, sockets: list[socket.socket] | None = None) -> Server:
    """The server of the pages, not started.

    Args:
        sockets: that listen already; otherwise it opens its own.
    """
    web = importlib.import_module("gtcpserver.monitoring.web")
    application = web.Web(source, __version__, for_this_host=is_loopback(address))
    return Server(
        sockets if sockets is not None else str(address),
        from_wsgi(application),
        # One process has the port, and a second that is given the same by mistake is told so.
        listen=ListenConfig(reuse_port=False),
        pool=MOST_REQUESTS,
        max_connections=MOST_CONNECTIONS,
        on_full="close_idle",
        timeout=TIMEOUT,
        handler_timeout=REQUEST_TIMEOUT,
    )


def check_metrics_address(address: Any) -> Address:
    """Reads where metrics are to be served.

    Raises:
        ConfigError: it is no address, or prometheus_client is missing.
    """
    if isinstance(address, Address):
        checked = address
    else:
        try:
            checked = parse_address(address)
        except ConfigError as error:
            raise ConfigError(f"metrics must be an address: {error}") from None
    if importlib.util.find_spec("prometheus_client") is None:
        raise ConfigError("metrics need prometheus_client: pip install 'gtcpserver[metrics]'")
    return checked


def is_loopback(address: Address) -> bool:
    if address.kind != "tcp":
        return False
    if address.host == "localhost":
        return True
    try:
        return as_ip(address.host).is_loopback
    except ValueError:
        return False


def url_of(address: str) -> str:
    """For people: what they may open."""
    if address.startswith("unix:"):
        return address
    return f"http://{address.replace('*', '127.0.0.1').replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')}/"
