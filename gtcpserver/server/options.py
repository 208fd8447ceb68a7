"""The options of a server: checked once, in one place. :class:`Server` says what each means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gtcpserver.address import check_none_twice
from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.callables import check_handler, check_hook
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.connection.connection import Connection, check_connection_class
from gtcpserver.errors import ConfigError
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.pool.places import check_size
from gtcpserver.pool.pool import HandlerPool
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.signatures import Handler, OnFull
from gtcpserver.store.settings import OnStoreFailure, StoreSettings, check_store_options
from gtcpserver.tls import Credentials

from .access_log import AccessLog

if TYPE_CHECKING:
    import ssl

    from gtcpserver.tls import TLSConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a server, checked and completed by :meth:`checked`."""

    addresses: list[Any]
    handler: Handler[Any]
    listen: ListenConfig
    accept_loops: int
    pool: HandlerPool
    on_full: OnFull
    max_connections: int | None
    max_accepts: int | None
    timeout: float | None
    handler_timeout: float | None
    min_rate: float | None
    min_rate_window: float
    linger: float
    handover: bool
    tls: Credentials | None
    proxy_protocol: ProxyProtocol | None
    client_limits: ClientLimits | None
    store: StoreSettings | None
    connection_class: type[Connection]
    context: Any
    access_log: AccessLog | None
    freeze_gc: bool
    on_connect: Callable[[Any], bool | None] | None
    on_disconnect: Callable[[Any], None] | None
    on_error: Callable[[Any, BaseException], None] | None
    on_start: Callable[[Any], None] | None
    on_stop: Callable[[Any], None] | None

    @classmethod
    def checked(
        cls,
        address: Any,
        *,
        listen: ListenConfig | None,
        pool: HandlerPool | int | None,
        tls: TLSConfig | ssl.SSLContext | Credentials | None,
        access_log: AccessLog | Literal["text", "json"] | None,
        **others: Any,
    ) -> Options:
        """Check the arguments of a server, and make its pool, credentials and access log from their short forms.

        Raises:
            ConfigError: an invalid option; the message names it.
        """
        check_handler(others["handler"])
        for name in ("on_connect", "on_disconnect", "on_error", "on_start", "on_stop"):
            check_hook(name, others[name])
        _check_numbers(others)
        if isinstance(address, list) and not address:
            raise ConfigError("address must name at least one place to listen, got []")
        addresses = list(address) if isinstance(address, list) else [address]
        _check_kinds(listen, others)
        checked_pool = pool if isinstance(pool, HandlerPool) else _make_pool(pool)
        if access_log is not None and not isinstance(access_log, AccessLog):
            access_log = AccessLog(access_log)
        store = _make_store(others.pop("shared_limits"), others.pop("on_store_failure"), others.pop("store_timeout"))
        credentials = tls if tls is None or isinstance(tls, Credentials) else Credentials(tls)
        if len(addresses) > 1:
            check_none_twice(addresses)
        return cls(
            addresses=addresses,
            listen=listen if listen is not None else ListenConfig(),
            pool=checked_pool,
            tls=credentials,
            access_log=access_log,
            store=store,
            **others,
        )


def _check_numbers(options: dict[str, Any]) -> None:
    check_whole_number("accept_loops", options["accept_loops"], least=1)
    check_whole_number("max_connections", options["max_connections"], least=1, none="for no limit")
    check_whole_number("max_accepts", options["max_accepts"], least=1, none="for no limit")
    check_number("timeout", options["timeout"], above=0, none="to wait forever")
    check_number("handler_timeout", options["handler_timeout"], above=0, none="for no limit")
    check_number("min_rate", options["min_rate"], above=0, none="for no limit")
    check_number("min_rate_window", options["min_rate_window"], above=0)
    check_number("linger", options["linger"], least=0)


def _check_kinds(listen: Any, options: dict[str, Any]) -> None:
    on_full = options["on_full"]
    if not isinstance(options["handover"], bool):
        raise ConfigError(f"handover must be True or False, got {options['handover']!r}")
    if on_full not in ("wait", "reject", "close_idle"):
        raise ConfigError(f'on_full must be "wait", "reject" or "close_idle", got {on_full!r}')
    check_connection_class(options["connection_class"])
    if options["proxy_protocol"] is not None and not isinstance(options["proxy_protocol"], ProxyProtocol):
        raise ConfigError(f"proxy_protocol must be a ProxyProtocol, got {options['proxy_protocol']!r}")
    if options["client_limits"] is not None and not isinstance(options["client_limits"], ClientLimits):
        raise ConfigError(f"client_limits must be a ClientLimits, got {options['client_limits']!r}")
    if listen is not None and not isinstance(listen, ListenConfig):
        raise ConfigError(f"listen must be a ListenConfig, got {listen!r}")


def _make_store(url: str | None, on_failure: OnStoreFailure, timeout: float) -> StoreSettings | None:
    check_store_options(on_failure, timeout)
    return None if url is None else StoreSettings(url=url, on_failure=on_failure, timeout=timeout)


def _make_pool(size: int | None) -> HandlerPool:
    check_size(size)
    if size == 0:
        raise ConfigError("pool must have at least 1 place, or None for no limit, got 0")
    return HandlerPool(size)
