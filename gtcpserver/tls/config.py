"""TLSConfig: the options of TLS, checked when it is created."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import ConfigError

from .acme import ACMESettings, certificate_of
from .contexts import VERSIONS, CertificatePair, load_contexts
from .names import check_server_name

Path = str | os.PathLike[str]

#: Seconds a handshake may take. Two round trips and the computation take less than one on a poor mobile network; one
#: lost packet costs one more, two in a row three. nginx allows 60, haproxy what `timeout client` says.
DEFAULT_HANDSHAKE_TIMEOUT = 10.0

#: Handshakes that may be in progress. Each holds 47 KiB, so 46 MiB at most. Since the oldest makes room for the newest,
#: a flood of N silent clients a second leaves everybody 1000 / N seconds: half a second at 2,000 a second.
DEFAULT_MAX_HANDSHAKES = 1000

#: Seconds until all workers have a certificate that one of them has ordered: one stat(2) each.
DEFAULT_ACME_WATCH = 10.0

MAX_ALPN_NAME = 255  # RFC 7301 section 3.1: the length of a name is one byte
MAX_ALPN_LIST = 65535  # and the length of the list two
MAX_PASSWORD = 1024  # OpenSSL's PEM_BUFSIZE
MAX_TICKETS = 16  # more connections than any client opens; OpenSSL sends each ticket in a record of its own


@dataclass(frozen=True)
class TLSConfig:
    """The options of TLS. Creating one reads all the files, so that a mistake is an error here, not at a handshake.

    Attributes:
        certfile: PEM file with the server's certificate, followed by the intermediate CA certificates, in this order.
        keyfile: PEM file with the private key. None: it is in `certfile`.
        password: password of encrypted private keys, or a function that returns it. It is called each time keys are
            read: here, when the server starts, and when files are reloaded. Without one, an encrypted key is an error;
            OpenSSL never asks on the terminal.
        sni: more certificates, by the name a client asks for (SNI, RFC 6066 section 3):
            {"a.example.com": (certfile, keyfile or None), "*.example.com": ...}. "*" stands for one whole label, as
            in certificates (RFC 9525 section 6.3); an exact name takes precedence. Other clients, and those that ask
            for no name, get `certfile`.
        strict_sni: refuse clients that ask for a name which is neither in `sni` nor in `certfile` itself (alert
            unrecognized_name), and those that ask for none (missing_extension, RFC 8446 section 9.2), as clients do
            that connect to an IP address. A session is only resumed for the name that it began with.
        client_auth: whether clients need a certificate: "none", "optional" (a certificate that is sent must be valid)
            or "required".
        client_ca: PEM file with the CA certificates that issue client certificates, or a folder of such files.
        crl: PEM file with certificate revocation lists: one of each CA that issues client certificates, and none past
            its next update, since OpenSSL then refuses every client of that CA. (RFC 5280 section 5.)
        alpn: protocols to negotiate, best first, such as ("h2", "http/1.1") (RFC 7301). A client that supports none of
            them is served without (`conn.tls.alpn` is None): the ssl module cannot refuse it.
        minimum_version: "TLSv1.2" or "TLSv1.3". RFC 8996 has deprecated the older ones.
        maximum_version: likewise; None is the newest that OpenSSL has.
        ciphers: TLS 1.2 cipher suites in OpenSSL's notation (openssl-ciphers(1)); None: Python's choice, which only has
            suites with forward secrecy. (The ssl module cannot choose the suites of TLS 1.3, all of which are good.)
        handshake_timeout: seconds a handshake may take.
        max_handshakes: how many handshakes may be in progress.
        session_tickets: how many tickets a TLS 1.3 client gets, each to resume its session once (RFC 8446 section
            4.6.1), 0 to 16; with 0 a TLS 1.2 client gets none either. All workers of a master have the same keys, so
            that a ticket of one is valid in the others, and after a reload or an upgrade, unless the certificates'
            names or the check of client certificates have changed. They are replaced every 12 hours
            (``rotate_tickets``), and those before them read for as long. A ticket is valid for 2 hours, without another
            check of the client certificate.
        key_log_file: append the secrets of each connection to this file, for Wireshark. Anyone who can read it can read
            the traffic. None: never; the environment variable SSLKEYLOGFILE has no effect on a server.
        report_truncation: an end of the stream without close_notify (RFC 8446 section 6.1) raises TruncatedStream.
            False: treat it as a normal end: many clients never send close_notify, and the server may still respond to
            a client that has shut down its side of the connection.
        watch: seconds between checks whether a file has changed; if so, all files are reloaded. None: never.
        managed: made by :meth:`acme`, which orders and renews `certfile`.

    Raises:
        ConfigError: an invalid value, or a file that cannot be read or has the wrong content.

    Example::

        from gtcpserver import Server, TLSConfig

        tls = TLSConfig("cert.pem", "key.pem", alpn=["http/1.1"], watch=10)
        server = Server("127.0.0.1:8443", handle, tls=tls)
    """

    certfile: Path
    keyfile: Path | None = None
    _: KW_ONLY
    password: str | Callable[[], str] | None = field(default=None, repr=False)
    sni: Mapping[str, tuple[Path, Path | None]] = field(default_factory=dict, hash=False)
    strict_sni: bool = False
    client_auth: Literal["none", "optional", "required"] = "none"
    client_ca: Path | None = None
    crl: Path | None = None
    alpn: Sequence[str] = ()
    minimum_version: Literal["TLSv1.2", "TLSv1.3"] = "TLSv1.2"
    maximum_version: Literal["TLSv1.2", "TLSv1.3"] | None = None
    ciphers: str | None = None
    handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT
    max_handshakes: int = DEFAULT_MAX_HANDSHAKES
    session_tickets: int = 2
    key_log_file: Path | None = None
    report_truncation: bool = False
    watch: float | None = None
    managed: ACMESettings | None = None

    @classmethod
    def acme(
        cls,
        names: Sequence[str],
        *,
        email: str | None = None,
        directory: str = "staging",
        folder: Path | None = None,
        ca_file: Path | None = None,
        watch: float = DEFAULT_ACME_WATCH,
        **options: Any,
    ) -> TLSConfig:
        """Return options with a certificate that the server orders and renews by itself, from an authority that speaks
        ACME (RFC 8555), such as Let's Encrypt.

        The authority connects to port 443 of each name, and the server answers there (tls-alpn-01, RFC 8737). Using it
        means agreeing with the authority's terms of service. Until the first certificate has come, handshakes are
        refused (alert internal_error).

        Args:
            names: host names that the certificate is for. No wildcards. The first one names the certificate's folder:
                servers that share it need the same list.
            email: address for messages of the authority; None: none.
            directory: "staging", Let's Encrypt's test environment, whose certificates no browser trusts;
                "production"; or the URL of another authority's directory.
            folder: folder with account, keys and certificates, for the server's user alone; workers and servers may
                share it. None: acme in the folder that systemd names in STATE_DIRECTORY, or
                ~/.local/state/gtcpserver/acme.
            ca_file: PEM file with the CAs that the authority's own certificate comes from; None: the usual ones.
            watch: seconds between checks whether another worker has got a new certificate.
            options: the other attributes of TLSConfig, except certfile, keyfile and password.

        Raises:
            ConfigError: an invalid value, an existing certificate that cannot be used, or a missing package:
                ``pip install 'gtcpserver[acme]'``.
        """
        for name in ("certfile", "keyfile", "password", "managed"):
            if name in options:
                raise ConfigError(f"{name} cannot be used together with acme, which has its own")
        check_number("watch", watch, above=0)
        settings = ACMESettings.checked(names, email, directory, folder, ca_file)
        return cls(certificate_of(settings), watch=watch, managed=settings, **options)

    def __post_init__(self) -> None:
        for name in ("certfile", "keyfile", "client_ca", "crl", "key_log_file"):
            value = _path(name, getattr(self, name), optional=name != "certfile")
            object.__setattr__(self, name, value)
        for name in ("strict_sni", "report_truncation"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_number("handshake_timeout", self.handshake_timeout, above=0)
        check_whole_number("max_handshakes", self.max_handshakes, least=1)
        check_number("watch", self.watch, above=0, none="to read the files once")
        if self.managed is not None and not isinstance(self.managed, ACMESettings):
            raise ConfigError(f"managed must be what TLSConfig.acme makes, or None, got {self.managed!r}")
        check_whole_number("session_tickets", self.session_tickets, least=0)
        if self.session_tickets > MAX_TICKETS:
            raise ConfigError(f"session_tickets must be at most {MAX_TICKETS}, got {self.session_tickets}")
        self._check_password()
        self._check_versions()
        self._check_client_auth()
        if self.ciphers is not None and not isinstance(self.ciphers, str):
            raise ConfigError(f"ciphers must be text such as 'ECDHE+AESGCM', or None, got {self.ciphers!r}")
        object.__setattr__(self, "alpn", _alpn(self.alpn))
        object.__setattr__(self, "sni", _sni(self.sni))
        load_contexts(self)

    def pairs(self) -> dict[str | None, CertificatePair]:
        """Return certificate and key by server name; None is the key of the default, for all other clients."""
        pairs: dict[str | None, CertificatePair] = {
            None: CertificatePair("", str(self.certfile), str(self.keyfile or self.certfile))
        }
        for name, (certfile, keyfile) in self.sni.items():
            pairs[name] = CertificatePair(f"sni[{name!r}] ", str(certfile), str(keyfile or certfile))
        return pairs

    def _check_password(self) -> None:
        password = self.password
        if password is None or callable(password):
            return
        if not isinstance(password, str):
            raise ConfigError(f"password must be text, a function or None, got {type(password).__name__}")
        if len(password.encode()) > MAX_PASSWORD:
            raise ConfigError(f"password must be at most {MAX_PASSWORD} bytes, got {len(password.encode())}")

    def _check_versions(self) -> None:
        expected = " or ".join(f'"{name}"' for name in VERSIONS)
        if self.minimum_version not in VERSIONS:
            raise ConfigError(f"minimum_version must be {expected}, got {self.minimum_version!r}")
        if self.maximum_version is None:
            return
        if self.maximum_version not in VERSIONS:
            raise ConfigError(f"maximum_version must be {expected}, or None, got {self.maximum_version!r}")
        if VERSIONS[self.maximum_version] < VERSIONS[self.minimum_version]:
            raise ConfigError(
                f"maximum_version must not be below minimum_version {self.minimum_version!r}, "
                f"got {self.maximum_version!r}"
            )

    def _check_client_auth(self) -> None:
        if self.client_auth not in ("none", "optional", "required"):
            raise ConfigError(f'client_auth must be "none", "optional" or "required", got {self.client_auth!r}')
        if self.client_auth != "none" and self.client_ca is None:
            raise ConfigError(f"client_auth={self.client_auth!r} needs client_ca: the CAs that clients must come from")
        if self.client_auth == "none" and self.client_ca is not None:
            raise ConfigError(
                f'client_ca "{self.client_ca}" has no effect with client_auth="none"; expected "optional" or "required"'
            )
        if self.crl is not None and self.client_ca is None:
            raise ConfigError(f'crl "{self.crl}" revokes client certificates, and needs client_auth and client_ca')


def _path(name: str, value: Any, *, optional: bool = False) -> str | None:
    if value is None and optional:
        return None
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{name} must be the path of a file{', or None' * optional}, got {value!r}")
    return path


def _alpn(protocols: Any) -> tuple[str, ...]:
    # A string is a sequence too: alpn="h2" would offer "h" and "2".
    if isinstance(protocols, (str, bytes)) or not isinstance(protocols, Sequence):
        raise ConfigError(f'alpn must be a sequence of protocol names, such as ("h2", "http/1.1"), got {protocols!r}')
    for protocol in protocols:
        if not isinstance(protocol, str) or not protocol.isascii() or not 1 <= len(protocol) <= MAX_ALPN_NAME:
            raise ConfigError(f"alpn: each name must be 1 to {MAX_ALPN_NAME} ASCII characters, got {protocol!r}")
    if sum(len(protocol) + 1 for protocol in protocols) > MAX_ALPN_LIST:
        raise ConfigError(f"alpn: the names must take at most {MAX_ALPN_LIST} bytes together")
    return tuple(protocols)


def _sni(certificates: Any) -> dict[str, tuple[str, str | None]]:
    if not isinstance(certificates, Mapping):
        raise ConfigError(
            f'sni must be a mapping, such as {{"a.example.com": (certfile, keyfile)}}, got {certificates!r}'
        )
    checked: dict[str, tuple[str, str | None]] = {}
    for given, files in certificates.items():
        name = check_server_name(given, 'sni: each name must be a host name such as "a.example.com" or "*.example.com"')
        if name in checked:
            raise ConfigError(f"sni: {name!r} is there twice")
        if not isinstance(files, tuple) or len(files) != 2:
            raise ConfigError(f"sni[{given!r}] must be a tuple (certfile, keyfile or None), got {files!r}")
        certfile = _path(f"sni[{given!r}] certfile", files[0])
        assert certfile is not None
        checked[name] = (certfile, _path(f"sni[{given!r}] keyfile", files[1], optional=True))
    return checked
