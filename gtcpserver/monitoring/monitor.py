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

from .history import History
from .recorder import Recorder
from .source import FromServer, Source
from .watch import Watch

if TYPE_CHECKING:
    import socket

log = logging.getLogger("gtcpserver")

#: Enough for several scrapers, probes and browsers; a further connection closes the oldest silent one.
MOST_CONNECTIONS = 64
MOST_REQUESTS = 16

#: Seconds without any transfer, and seconds for a whole connection (one request). Prometheus gives up after 10.
TIMEOUT = 5.0
REQUEST_TIMEOUT = 10.0

#: Seconds for answers in progress at a stop.
STOP_TIMEOUT = 2.0


class Monitor:
    """Serve metrics and more of a server over HTTP: /metrics, /healthz, /readyz, /stats, /connections and a page at /.

    The monitor has its own listening socket, pool and limits. A server without a monitor measures nothing.

    What it has seen of the last day is shown by the page, and is lost when it ends.

    Args:
        server: the server to watch. Create the monitor before the server starts: /readyz then says "starting".
        address: listening address, as for :class:`Server`; a port without a host is on 127.0.0.1. The page shows
            clients' addresses and requires no password: think before you choose an address other than a loopback one.
        name: what the page calls the server; by default, the name of its handler.

    Raises:
        ConfigError: the address is invalid, or prometheus_client is missing.

    Example::

        from gtcpserver import Server
        from gtcpserver.monitoring import Monitor

        server = Server("127.0.0.1:5000", handle)
        monitor = Monitor(server, "127.0.0.1:9100", name="app")
        monitor.start()
        server.start()
    """

    def __init__(self, server: Server, address: str | int | tuple[Any, ...] | Address, *, name: str = "") -> None:
        self._address = check_metrics_address(address)
        self._watch = Watch(server)
        source, history = FromServer(server, self._watch, name), History()
        self._recorder = Recorder(source, history)
        self._pages = make_pages(source, history, self._address)

    def start(self) -> None:
        """Listen and answer. Raises OSError if the address is unavailable; the message names it."""
        try:
            self._pages.start()
        except OSError as error:
            raise OSError(error.errno, f"metrics: {error.strerror or error}") from None
        self._recorder.start()
        log.info("metrics and status page on %s", url_of(self.address))

    def stop(self) -> None:
        """Finish the answers in progress, within two seconds, and close."""
        self._recorder.stop()
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
        """The listening address, with the real port. Raises GtcpServerError before the start."""
        return self._pages.address


def make_pages(
    source: Source, history: History, address: Address, sockets: list[socket.socket] | None = None
) -> Server:
    """Return the server of the pages, not started.

    Args:
        history: what a `Recorder` keeps of the source.
        sockets: sockets that are listening already; by default, the server opens its own.
    """
    web = importlib.import_module("gtcpserver.monitoring.web")
    application = web.Web(source, history, __version__, for_this_host=is_loopback(address))
    return Server(
        sockets if sockets is not None else str(address),
        from_wsgi(application),
        # Only one process has the port; a second one configured with it by mistake gets an error.
        listen=ListenConfig(reuse_port=False),
        pool=MOST_REQUESTS,
        max_connections=MOST_CONNECTIONS,
        on_full="close_idle",
        timeout=TIMEOUT,
        handler_timeout=REQUEST_TIMEOUT,
    )


def check_metrics_address(address: Any) -> Address:
    """Parse the address of the metrics.

    Raises:
        ConfigError: the address is invalid, or prometheus_client is missing.
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
    """Return the URL that a person can open."""
    if address.startswith("unix:"):
        return address
    return f"http://{address.replace('*', '127.0.0.1').replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')}/"
