"""Types of the arguments of Server and run, for type checkers.

``typing.Unpack`` and generic TypedDicts need Python 3.11: only type checkers read them, which have typing_extensions.
Each option is repeated here; tests/typed/test_typing.py compares both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import ssl
    from typing import Any, Generic, TypedDict

    from typing_extensions import TypeVar

    from .admission.client_limits import ClientLimits
    from .connection.connection import Connection
    from .listening.listener import ListenConfig
    from .pool.pool import HandlerPool
    from .proxy_protocol.trust import ProxyProtocol
    from .server.access_log import AccessLog
    from .server.server import Server
    from .store.settings import OnStoreFailure
    from .supervisor import Worker
    from .tls import Credentials, TLSConfig

    ConnectionT = TypeVar("ConnectionT", bound=Connection, default=Connection)
else:
    from typing import TypeVar

    ConnectionT = TypeVar("ConnectionT")

#: A handler's result is ignored; None excludes async functions and generators, which would not even begin. Handlers
#: typed for any socket are accepted, too.
Handler = Callable[[ConnectionT], None]
OnFull = Literal["wait", "reject", "close_idle"]

if TYPE_CHECKING:

    class ServerOptions(TypedDict, Generic[ConnectionT], total=False):
        """The keyword arguments of Server except ``connection_class``."""

        listen: ListenConfig | None
        accept_loops: int
        pool: HandlerPool | int | None
        on_full: OnFull
        max_connections: int | None
        max_accepts: int | None
        timeout: float | None
        handler_timeout: float | None
        min_rate: float | None
        min_rate_window: float
        linger: float
        handover: bool
        tls: TLSConfig | ssl.SSLContext | Credentials | None
        proxy_protocol: ProxyProtocol | None
        client_limits: ClientLimits | None
        shared_limits: str | None
        on_store_failure: OnStoreFailure
        store_timeout: float
        context: Any
        access_log: AccessLog | Literal["text", "json"] | None
        freeze_gc: bool
        on_connect: Callable[[ConnectionT], bool | None] | None
        on_disconnect: Callable[[ConnectionT], None] | None
        on_error: Callable[[ConnectionT, BaseException], None] | None
        on_start: Callable[[Server], None] | None
        on_stop: Callable[[Server], None] | None

    class RunOptions(ServerOptions[ConnectionT], total=False):
        """The same, and the fields of SupervisorConfig and Hooks, which need ``workers``."""

        preload: bool
        worker_timeout: float | None
        graceful_timeout: float | None
        retire_timeout: float | None
        max_retired: int | None
        probation: float
        reload_one_by_one: bool
        drain_delay: float
        recycle_after: int | None
        recycle_jitter: int | None
        recycle_memory: float | None
        relieve_lagging: bool
        pin_cpus: bool
        pid_file: str | None
        user: str | int | None
        group: str | int | None
        rotate_tickets: float | None
        agent_check: str | int | None
        umask: int | None
        control: str | None
        log_file: str | None
        worker_start: Callable[[Worker], None] | str | None
        worker_stop: Callable[[Worker], None] | str | None
        worker_error: Callable[[Worker, str], None] | str | None
