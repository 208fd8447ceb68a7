"""TCP servers as plain blocking Python, at the cost of an event-loop callback server."""

from .acceptor import Acceptor
from .access_log import AccessLog
from .adapters import from_socketserver, from_wsgi
from .adapters.stream_server import StreamServer
from .address import Address, parse_address
from .balancer import ProxyProtocol
from .block_detector import BlockDetector
from .client_limits import ClientLimits
from .connect import connect
from .connection import Connection
from .coroutines import run_coroutine
from .errors import (
    ClientRefused,
    ConfigError,
    DeadlineExceeded,
    EarlyEOF,
    GtcpServerError,
    LimitExceeded,
    StartTLSError,
    TLSFlood,
    TruncatedStream,
)
from .listener import ListenConfig
from .outcome import is_client_error
from .pool import HandlerPool
from .run import run
from .server import Server, State
from .stats import CutConnection, ServerStats, StopReport
from .tls import ConnectionTLS, TLSConfig
from .transfer import RelayResult, pipe, relay

__version__ = "0.1.0"

__all__ = [
    "Acceptor",
    "AccessLog",
    "Address",
    "BlockDetector",
    "ClientLimits",
    "ClientRefused",
    "ConfigError",
    "Connection",
    "ConnectionTLS",
    "CutConnection",
    "DeadlineExceeded",
    "EarlyEOF",
    "GtcpServerError",
    "HandlerPool",
    "LimitExceeded",
    "ListenConfig",
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
    "connect",
    "from_socketserver",
    "from_wsgi",
    "is_client_error",
    "parse_address",
    "pipe",
    "relay",
    "run",
    "run_coroutine",
]
