"""TCP servers as plain blocking Python, at the cost of an event-loop callback server."""

from ._compiled import compiled, why_pure  # first: it chooses the form of the modules below
from ._version import __version__
from .adapters import from_socketserver, from_wsgi
from .adapters.stream_server import StreamServer
from .address import Address, parse_address
from .admission.client_limits import ClientLimits
from .connection.connect import connect
from .connection.connection import Connection
from .connection.connection_pool import ConnectionPool, stay_connected
from .connection.frames import Frames
from .coroutines import run_coroutine
from .diagnostics.block_detector import BlockDetector
from .errors import (
    ClientRefused,
    ConfigError,
    DeadlineExceeded,
    EarlyEOF,
    FramingError,
    GtcpServerError,
    HandedOver,
    LimitExceeded,
    StartTLSError,
    TLSFlood,
    TruncatedStream,
)
from .framing import LengthPrefix, Lines, Netstrings
from .listening.listener import ListenConfig
from .pool.pool import HandlerPool
from .proxy_protocol.trust import ProxyProtocol
from .run import run
from .server.acceptor import Acceptor
from .server.access_log import AccessLog
from .server.outcome import is_client_error
from .server.server import Server, State
from .server.stats import CutConnection, ServerStats, StopReport
from .tls import ConnectionTLS, TLSConfig
from .transfer import RelayResult, pipe, relay

__all__ = [
    "Acceptor",
    "AccessLog",
    "Address",
    "BlockDetector",
    "ClientLimits",
    "ClientRefused",
    "ConfigError",
    "Connection",
    "ConnectionPool",
    "ConnectionTLS",
    "CutConnection",
    "DeadlineExceeded",
    "EarlyEOF",
    "Frames",
    "FramingError",
    "GtcpServerError",
    "HandedOver",
    "HandlerPool",
    "LengthPrefix",
    "LimitExceeded",
    "Lines",
    "ListenConfig",
    "Netstrings",
    "ProxyProtocol",
    "RelayResult",
    "Server",
    "ServerStats",
    "StartTLSError",
    "State",
    "StopReport",
    "StreamServer",
    "TLSConfig",
    "TLSFlood",
    "TruncatedStream",
    "__version__",
    "compiled",
    "connect",
    "from_socketserver",
    "from_wsgi",
    "is_client_error",
    "parse_address",
    "pipe",
    "relay",
    "run",
    "run_coroutine",
    "stay_connected",
    "why_pure",
]
