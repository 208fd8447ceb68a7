"""Convert the ssl arguments of gevent's StreamServer to credentials, if our own TLS can do the same."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import gevent.ssl

from gtcpserver.tls import Credentials

#: Arguments of ``gevent.ssl.wrap_socket`` that describe the context to make.
_CONTEXT_ARGUMENTS = {"server_side", "certfile", "keyfile", "cert_reqs", "ssl_version", "ca_certs", "ciphers"}

_WRAP_SOCKET = (gevent.ssl.SSLContext.wrap_socket, gevent.ssl.orig_SSLContext.wrap_socket)
_SSL_SOCKETS = (gevent.ssl.SSLSocket, gevent.ssl.orig_SSLContext.sslsocket_class)


class StreamServerTLS:
    """Finds the credentials for each new connection."""

    def __init__(self) -> None:
        self._made_from: Any = None
        self._made: Credentials | None = None

    def find(self, wrap_socket: Callable[..., Any], arguments: Mapping[str, Any]) -> Credentials | None:
        """Return credentials equivalent to ``wrap_socket(sock, **arguments)``; None if only that call can do it.

        Raises:
            OSError, ValueError: as ``gevent.ssl.wrap_socket``: missing files, or files that do not match.
        """
        if arguments.get("server_side") is not True:
            return None
        if wrap_socket is gevent.ssl.wrap_socket:
            if not arguments.get("certfile") or not _CONTEXT_ARGUMENTS.issuperset(arguments):
                return None
            # gevent reads the files for each connection, so new ones are used at once. Checking for changes is enough.
            return self._keep(_states(arguments), lambda: _make_context(arguments))
        context: Any = getattr(wrap_socket, "__self__", None)
        if getattr(wrap_socket, "__func__", None) not in _WRAP_SOCKET or len(arguments) > 1:
            return None
        if context.sslsocket_class not in _SSL_SOCKETS or _wants_ssl_socket(context):
            return None
        return self._keep(context, lambda: context)

    def _keep(self, made_from: Any, make_context: Callable[[], Any]) -> Credentials:
        if self._made is None or self._made_from != made_from:
            self._made = Credentials(make_context())
            self._made_from = made_from
        return self._made


def _wants_ssl_socket(context: Any) -> bool:
    # The program's own callback may use all of SSLSocket on its socket argument.
    callback = context.sni_callback
    ours = isinstance(getattr(callback, "__self__", None), Credentials)
    observed = context._msg_callback is not None  # noqa: SLF001 - the standard library's
    return observed or not (callback is None or ours)


def _states(arguments: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    found = [os.stat(arguments[name]) for name in ("certfile", "keyfile", "ca_certs") if arguments.get(name)]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in found]


def _make_context(arguments: Mapping[str, Any]) -> Any:
    context = gevent.ssl.SSLContext(arguments.get("ssl_version", ssl.PROTOCOL_TLS_SERVER))
    context.verify_mode = arguments.get("cert_reqs", ssl.CERT_NONE)
    if arguments.get("ca_certs"):
        context.load_verify_locations(arguments["ca_certs"])
    context.load_cert_chain(arguments["certfile"], arguments.get("keyfile") or arguments["certfile"])
    if arguments.get("ciphers"):
        context.set_ciphers(arguments["ciphers"])
    return context
