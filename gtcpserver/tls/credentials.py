"""Credentials: the certificates and keys of new handshakes, replaced while the server runs.

A session ticket is encrypted with keys of the context that the handshake began on, and the ssl module cannot copy these
from one context to the next. So a server has one front context for life; each handshake begins on it, and its
server-name callback, which OpenSSL calls whether or not the client asked for a name, moves the handshake on to the
context with the current certificate. Tickets issued before a reload stay valid, and the certificates are replaced in
one assignment, or not at all. Worker processes give their front contexts the same keys (`ticket_keys`). After a change
of keys, a second front context has those from before, for handshakes whose client has an older ticket.

(Loading the new certificate into the old context keeps the tickets too, but is not safe: when the key does not match,
the context is left with half of each; and after a change from an RSA to an EC certificate it goes on serving both.)
"""

from __future__ import annotations

import _ssl
import hashlib
import ssl
import sys
import time
from typing import Any, cast

import gevent
from gevent.hub import get_hub

from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import stat_file

from . import ticket_keys
from .acme import Answers
from .config import DEFAULT_HANDSHAKE_TIMEOUT, DEFAULT_MAX_HANDSHAKES, TLSConfig
from .contexts import ServerContexts, load_contexts, make_front, watched_files

log = own_logger("gtcpserver.tls")

#: Seconds until changed files that do not fit are read once more, before a warning: a renewal replaces the certificate
#: and its key one after the other.
SECOND_LOOK = 1.0

#: Base class of the standard library's SSLContext, and of gevent's.
_PlainContext = _ssl._SSLContext  # noqa: SLF001 - Python's name for it

MISSING_EXTENSION = 109  # RFC 8446 section 6.2; ssl.AlertDescription lacks it

_FileState = tuple[int, int, int, int] | None


class Credentials:
    """A server's certificates and keys: get :attr:`context` again for every handshake.

    Args:
        tls: options, or a ready ssl.SSLContext for a server, which is used as it is and cannot be reloaded.

    Attributes:
        config: the options; None with a ready context.
        older: the name of the ticket keys before the present ones, and the front context that accepts those tickets;
            None: there is none. A handshake begins on it if the name is in the client's first message.
        answers: finds the contexts of handshakes with which an authority asks for a proof; None without
            `TLSConfig.acme`.
        context: for ``context._wrap_socket(raw_socket, server_side=True, owner=owner)``. The owner's attribute
            ``server_name`` is set to the name that the client asks for, in lower case (None for none), and its
            attribute ``context`` to the context with the right certificate: a property, whose setter passes it to the
            _ssl._SSLSocket. The owner is referenced weakly.

    Raises:
        ConfigError: a file that has changed since ``tls`` was created, and is now unusable; or not a server context.

    Example::

        from gtcpserver import Server, TLSConfig
        from gtcpserver.tls import Credentials

        credentials = Credentials(TLSConfig("cert.pem", "key.pem"))
        server = Server(["127.0.0.1:8443", "127.0.0.1:9443"], handle, tls=credentials)
        credentials.reload()  # the files have changed
    """

    def __init__(self, tls: TLSConfig | ssl.SSLContext) -> None:
        self.config = tls if isinstance(tls, TLSConfig) else None
        self._contexts: ServerContexts | None = None
        self._states: dict[str, _FileState] = {}
        self._timer: Any = None
        self._reloading = False
        self._complaint = ""
        self._front: ssl.SSLContext
        self._front_of_older: ssl.SSLContext | None = None
        self._identity = b""
        self._version = -1  # of the secrets that the ticket keys were derived from
        self.older: tuple[bytes, ssl.SSLContext] | None = None
        managed = self.config.managed if self.config is not None else None
        self.answers = Answers(managed) if managed is not None else None
        if self.config is not None:
            self._load(self.config)
        elif not isinstance(tls, _PlainContext):
            raise ConfigError(f"tls must be a TLSConfig or an ssl.SSLContext, got {tls!r}")
        elif tls.protocol == ssl.PROTOCOL_TLS_CLIENT:
            raise ConfigError("tls must be a context for a server (ssl.PROTOCOL_TLS_SERVER), got one for a client")
        else:
            self._front = tls

    @property
    def context(self) -> ssl.SSLContext:
        secrets = ticket_keys.shared_secrets()
        if secrets is not None and self._identity and secrets.ticket_version() != self._version:
            self._take_ticket_keys(secrets)
        return self._front

    @property
    def handshake_timeout(self) -> float:
        """Seconds a handshake may take."""
        return self.config.handshake_timeout if self.config is not None else DEFAULT_HANDSHAKE_TIMEOUT

    @property
    def max_handshakes(self) -> int:
        """How many handshakes may be in progress."""
        return self.config.max_handshakes if self.config is not None else DEFAULT_MAX_HANDSHAKES

    @property
    def report_truncation(self) -> bool:
        """Whether an end without close_notify raises TruncatedStream."""
        return self.config is not None and self.config.report_truncation

    @property
    def certificates(self) -> int:
        """Number of certificates; 0 with a ready context, which does not tell."""
        return self._contexts.certificates if self._contexts is not None else 0

    @property
    def expires_at(self) -> float | None:
        """When the first of the certificates expires, seconds since the epoch; None: none is known."""
        return self._contexts.expires_at if self._contexts is not None else None

    def reload(self) -> None:
        """Read all the files again for new handshakes. Existing connections do not change.

        Clients resume their sessions as before, unless client_ca or crl has changed: then all tickets are void, since
        a session is resumed without another check of the client certificate.

        Raises:
            ConfigError: a file is unusable, or there are none to read. Nothing has changed.
        """
        if self.config is None:
            raise ConfigError(
                "tls cannot be reloaded: it was given as an ssl.SSLContext, which does not know its files; "
                "expected a TLSConfig"
            )
        self._load(self.config)
        self._complaint = ""
        log.info("TLS certificates reloaded; the first expires on %s", _date(self._contexts))

    def watch(self, seconds: float) -> None:
        """Check every ``seconds`` whether a file was changed, replaced or removed, and reload if so.

        Unusable files, such as a certificate whose key has not arrived a second later, are logged once, and tried again
        at every check. Does not keep the event loop alive.

        Raises:
            ConfigError: there are no files to check.
        """
        if self.config is None:
            raise ConfigError("watch needs a TLSConfig: an ssl.SSLContext does not know its files")
        self.stop_watching()
        self._timer = get_hub().loop.timer(seconds, seconds, ref=False)
        self._timer.start(self._look)

    def stop_watching(self) -> None:
        """Undo :meth:`watch`."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def left_in_child(self) -> None:
        """Forget the timer in a forked child, which has another event loop."""
        self._timer = None

    def _look(self) -> None:
        # Runs in the event loop, where nothing may wait: a password function might, and so might a borrowed file.
        if not self._reloading:
            self._reloading = True
            gevent.spawn(self._reload_changed)

    def _reload_changed(self) -> None:
        try:
            if self._load_changed() and self._timer is not None:
                gevent.sleep(SECOND_LOOK)
                complaint = self._load_changed()
                if complaint and complaint != self._complaint:
                    self._complaint = complaint
                    log.warning("TLS certificates have changed and cannot be used, the old ones stay: %s", complaint)
        finally:
            self._reloading = False

    def _load_changed(self) -> str:
        """Reload files that were changed; return why they cannot be used, or an empty string."""
        try:
            if self.config is not None and _states(self.config) != self._states:
                self.reload()
        except Exception as error:
            # An exception of a password function is no reason to stop checking.
            return str(error) if isinstance(error, ConfigError) else repr(error)
        return ""

    def _load(self, config: TLSConfig) -> None:
        # Before reading: a change in the meantime is noticed at the next check.
        states = _states(config)
        new = load_contexts(config)
        old = self._contexts
        if old is not None and old.has_default and not new.has_default:
            raise ConfigError(f'certfile "{config.certfile}" is gone')
        for complaint in new.complaints:
            log.warning("TLS: %s", complaint)
        if old is None or new.client_trust != old.client_trust:
            if config.key_log_file is not None and old is None:
                log.warning('TLS: the secrets of all connections are written to "%s"', config.key_log_file)
            # Both first: if the second one cannot be made, nothing has changed.
            older = (
                make_front(config, new.has_default)
                if config.session_tickets and ticket_keys.shared_secrets() is not None
                else None
            )
            for front in filter(None, (new.default, older)):
                # Not through gevent's property, which assumes that the owner is a gevent.ssl.SSLSocket.
                cast(Any, _PlainContext.sni_callback).__set__(front, self._choose)
            _keep_quiet_about_bad_names()
            self._front, self._front_of_older = new.default, older
            self._identity = _identity(config, new) if config.session_tickets else b""
            self._version, self.older = -1, None
        self._contexts = new
        self._states = states

    def _take_ticket_keys(self, secrets: ticket_keys.Secrets) -> None:
        """Derive the keys of tickets from the secrets that the workers share now."""
        version = secrets.ticket_version()
        current, previous = secrets.ticket_secrets()
        try:
            ticket_keys.set_ticket_keys(self._front, ticket_keys.derive(current, self._identity))
            if previous is not None and self._front_of_older is not None:
                keys = ticket_keys.derive(previous, self._identity)
                ticket_keys.set_ticket_keys(self._front_of_older, keys)
                self.older = keys[: ticket_keys.NAME_BYTES], self._front_of_older
        except ticket_keys.CannotSetKeys as error:
            ticket_keys.give_up(error)
        self._version = version

    def _choose(self, owner: Any, name: str | None, context: ssl.SSLContext) -> int | None:
        contexts = self._contexts
        assert contexts is not None
        # The owner of a gevent.ssl.SSLSocket is the bare socket in it.
        to_wrapper = getattr(owner, "_sslsock", None)
        if to_wrapper is not None:
            owner = to_wrapper()
        name = _readable(name)
        for_another_name = False
        if getattr(getattr(owner, "object", None), "session_reused", False) and hasattr(owner, "take_requested_name"):
            # For a resumed session of TLS 1.2, OpenSSL reports the name that it began with, whatever is requested now.
            began_with, name = name, _readable(owner.take_requested_name())
            for_another_name = began_with != name
        try:
            owner.server_name = name
        except AttributeError:
            pass  # a bare _ssl._SSLSocket without an owner
        chosen = contexts.find(name)
        if chosen is None and not contexts.has_default and not contexts.strict:
            return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)  # the first certificate has yet to be issued
        if for_another_name and contexts.strict:
            chosen = None  # RFC 6066 section 3: a session must not be resumed for another name
        if chosen is None:
            return MISSING_EXTENSION if name is None else int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        if chosen is not context:
            owner.context = chosen
        return None


def _readable(name: str | None) -> str | None:
    """Return a server name for comparisons and for the log: it may hold any character from 1 to 127."""
    return name if name is None else name.lower().rstrip(".") if name.isprintable() else ""


def _identity(config: TLSConfig, contexts: ServerContexts) -> bytes:
    """Return a digest of what a resumed session must not get around: who is admitted, and as which server."""
    names = sorted((name or "", pair.certfile) for name, pair in config.pairs().items())
    told = repr((config.client_auth, config.strict_sni, names)).encode()
    return hashlib.sha256(contexts.client_trust + told).digest()


def build_context(config: TLSConfig) -> ssl.SSLContext:
    """Return a context with everything in the configuration, for use without this library's server.

    Raises:
        ConfigError: as :class:`TLSConfig`.

    Example::

        from gtcpserver import TLSConfig
        from gtcpserver.tls import build_context

        context = build_context(TLSConfig("cert.pem", "key.pem", minimum_version="TLSv1.3"))
        print(context.minimum_version.name)  # TLSv1_3
    """
    return Credentials(config).context


def _states(config: TLSConfig) -> dict[str, _FileState]:
    try:
        return {path: _state(path) for path in watched_files(config)}
    except ConfigError:
        return {}  # the folder is gone: reading it again will report that


def _state(path: str) -> _FileState:
    try:
        found = stat_file(path)
    except OSError:
        return None
    # The inode for files replaced within one tick of the clock, ctime for permissions and for cp --preserve.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _date(contexts: ServerContexts | None) -> str:
    expires_at = contexts.expires_at if contexts is not None else None
    return time.strftime("%Y-%m-%d", time.gmtime(expires_at)) if expires_at is not None else "(none yet)"


def _keep_quiet_about_bad_names() -> None:
    """Keep clients that ask for a non-ASCII name from writing to our stderr.

    CPython decodes the name before it calls our callback, and hands the failure to sys.unraisablehook, which prints six
    lines for each such connection. The handshake fails anyway, and is counted.
    """
    hook = sys.unraisablehook
    if getattr(hook, "quiet_about_bad_names", False):
        return

    def filtered(unraisable: Any) -> None:
        error = unraisable.exc_value
        # Reported by _servername_callback in Modules/_ssl.c: the bytes, or, in newer versions, a message about them.
        if isinstance(error, UnicodeDecodeError) and (
            type(unraisable.object) is bytes or "ssl servername callback" in (unraisable.err_msg or "")
        ):
            return
        hook(unraisable)

    filtered.quiet_about_bad_names = True  # type: ignore[attr-defined]
    sys.unraisablehook = filtered
