"""Turn a TLSConfig's files into OpenSSL contexts, and OpenSSL's errors into helpful ones."""

from __future__ import annotations

import _ssl
import hashlib
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import gevent.ssl

from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import files_in, is_folder, openable, read_file
from gtcpserver.files.trusted_path import UntrustedPath, open_file
from gtcpserver.process.descriptors import close_descriptor

if TYPE_CHECKING:
    from .config import TLSConfig

# The first call of cert_time_to_seconds() imports a module, which a worker may no longer be able to read.
ssl.cert_time_to_seconds("Jan  1 00:00:00 2026 GMT")

# Always gevent's class: once a program is monkey-patched, the standard library's own class has setters that recurse
# forever (it looks itself up by the name that gevent has taken over). gevent's class works before and after.
SSLContext = cast("type[ssl.SSLContext]", gevent.ssl.SSLContext)

VERSIONS: Mapping[str, ssl.TLSVersion] = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}

CLIENT_AUTH = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

_CERTIFICATE = re.compile(rb"-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----")
_PRIVATE_KEY = re.compile(rb"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----")
_CRL = re.compile(rb"-----BEGIN X509 CRL-----")

# The key belongs to another certificate. The last one: a certificate of another kind (RSA, EC).
_MISMATCH = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
_TOO_WEAK = {
    "EE_KEY_TOO_SMALL": "its key is too small",
    "CA_KEY_TOO_SMALL": "the key of a CA certificate in it is too small",
    "CA_MD_TOO_WEAK": "it is signed with a digest that is too weak",
}


class CertificatePair(NamedTuple):
    """A certificate and its key.

    Attributes:
        where: prefix for the names of the files in error messages.
    """

    where: str
    certfile: str
    keyfile: str


@dataclass(frozen=True)
class ServerContexts:
    """The result of loading the files once.

    Attributes:
        default: for clients that ask for no name, or an unknown one.
        has_default: it has a certificate; False: the first one has yet to be issued (`TLSConfig.acme`).
        by_name: by server name, or wildcard such as "*.example.com".
        strict: there is no default.
        client_trust: digest of everything that client certificates are checked against.
        certificates: number of certificates.
        expires_at: when the first of them expires, seconds since the epoch; None: there is none yet.
        complaints: problems that do not keep the server from starting.
    """

    default: ssl.SSLContext
    has_default: bool
    by_name: Mapping[str, ssl.SSLContext]
    strict: bool
    client_trust: bytes
    certificates: int
    expires_at: float | None
    complaints: tuple[str, ...]

    def find(self, name: str | None) -> ssl.SSLContext | None:
        """Return the context for a client that asks for ``name``, in lower case; None: refuse it."""
        if name is not None and self.by_name:
            found = self.by_name.get(name)
            if found is None:
                _, _, parent = name.partition(".")
                found = self.by_name.get("*." + parent)
            if found is not None:
                return found
        return None if self.strict or not self.has_default else self.default


def load_contexts(config: TLSConfig) -> ServerContexts:
    """Read all the files of a configuration.

    Raises:
        ConfigError: a file cannot be read, or has the wrong content.
    """
    contexts: dict[tuple[str, str], ssl.SSLContext] = {}
    by_name: dict[str | None, ssl.SSLContext] = {}
    complaints = []
    expiries = []
    names_in_default: list[str] = []
    is_waiting = False
    for name, pair in config.pairs().items():
        files = (pair.certfile, pair.keyfile)
        if name is None and config.managed is not None and not os.path.lexists(pair.certfile):
            by_name[None] = _make_context(config, None)
            is_waiting = True
            continue
        if files not in contexts:
            contexts[files] = _make_context(config, pair)
            certificate = _decode(pair)
            starts, ends = (ssl.cert_time_to_seconds(str(certificate[key])) for key in ("notBefore", "notAfter"))
            expiries.append(ends)
            if ends <= time.time():
                complaints.append(f'{pair.where}certfile "{pair.certfile}" expired on {certificate["notAfter"]}')
            elif starts > time.time():
                complaints.append(f'{pair.where}certfile "{pair.certfile}" begins on {certificate["notBefore"]}')
            if name is None:
                names_in_default = [
                    value.lower() for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"
                ]
        by_name[name] = contexts[files]
    default = by_name.pop(None)
    named = {name: context for name, context in by_name.items() if name is not None}
    if config.strict_sni and not is_waiting:
        for name in names_in_default:
            named.setdefault(name, default)
    return ServerContexts(
        default=default,
        has_default=not is_waiting,
        by_name=named,
        strict=config.strict_sni,
        client_trust=_client_trust(config),
        certificates=len(expiries),
        expires_at=min(expiries, default=None),
        complaints=tuple(complaints),
    )


def make_front(config: TLSConfig, has_default: bool) -> ssl.SSLContext:
    """Make another context like the default one.

    Args:
        has_default: as in `ServerContexts`.

    Raises:
        ConfigError: as `load_contexts`.
    """
    return _make_context(config, config.pairs()[None] if has_default else None)


def watched_files(config: TLSConfig) -> Iterator[str]:
    """Yield all the files that ``load_contexts`` reads, and the folder they are looked up in."""
    for pair in config.pairs().values():
        yield pair.certfile
        yield pair.keyfile
    if config.client_ca is not None:
        client_ca = str(config.client_ca)
        yield client_ca
        if is_folder(client_ca):
            yield from _files_in(client_ca)
    if config.crl is not None:
        yield str(config.crl)


def _make_context(config: TLSConfig, pair: CertificatePair | None) -> ssl.SSLContext:
    # The constructor, not ssl.create_default_context, which would write secrets to the file named by SSLKEYLOGFILE.
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    options = context.options | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    # With it, an end without close_notify counts as a normal end; without it, it is an error after which OpenSSL does
    # not send anything either. (New in OpenSSL 3.0: older versions lack it, and behave as if it were set.)
    ignore_unexpected_eof = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    options = options & ~ignore_unexpected_eof if config.report_truncation else options | ignore_unexpected_eof
    if not config.session_tickets:
        options |= ssl.OP_NO_TICKET
    context.options = options
    context.num_tickets = config.session_tickets
    context.minimum_version = VERSIONS[config.minimum_version]
    if config.maximum_version is not None:
        context.maximum_version = VERSIONS[config.maximum_version]
    if config.ciphers is not None:
        try:
            context.set_ciphers(config.ciphers)
        except ssl.SSLError as error:
            raise ConfigError(
                f"ciphers must name at least one cipher suite of TLS 1.2 that OpenSSL has (`openssl ciphers -v` lists "
                f"them; those of TLS 1.3 cannot be chosen), got {config.ciphers!r}"
            ) from error
    if config.alpn:
        context.set_alpn_protocols(list(config.alpn))
    if pair is not None:
        _load_pair(context, pair, config.password)
    _trust_clients(context, config)
    if config.key_log_file is not None:
        _log_keys(context, str(config.key_log_file))
    return context


def _load_pair(context: ssl.SSLContext, pair: CertificatePair, password: str | Callable[[], str] | None) -> None:
    certificate = f'{pair.where}certfile "{pair.certfile}"'
    key = f'{pair.where}keyfile "{pair.keyfile}"'
    if pair.keyfile == pair.certfile:
        key = f"{certificate} (no keyfile is given)"
    certificate_content = _read(certificate, pair.certfile)
    _expect(_CERTIFICATE, certificate_content, certificate, "certificate")
    key_content = _read(key, pair.keyfile)
    _expect(_PRIVATE_KEY, key_content, key, "private key")
    encrypted = False

    def ask() -> str:
        # Always passed: without a function, OpenSSL asks on the terminal.
        nonlocal encrypted
        encrypted = True
        answer = password() if callable(password) else password
        if answer is None or isinstance(answer, str):
            return answer or ""
        raise ConfigError(f"password must be a function that returns text, but returned {type(answer).__name__}")

    try:
        with openable(pair.certfile, certificate_content) as certfile, openable(pair.keyfile, key_content) as keyfile:
            context.load_cert_chain(certfile, keyfile, ask)
    except ssl.SSLError as error:
        if error.reason in _MISMATCH:
            message = f"{key} does not belong to {certificate}"
            if pair.keyfile == pair.certfile:
                message = f"{certificate}: the private key in it does not belong to the first certificate in it"
        elif error.reason in _TOO_WEAK:
            message = (
                f"{certificate}: {_TOO_WEAK[error.reason]} for OpenSSL's security level {context.security_level}; "
                f"expected RSA of 2048 bits or more, or an elliptic curve, and SHA-256"
            )
        elif encrypted and password is None:
            message = f"{key} is encrypted; expected a password with it"
        elif encrypted:
            message = f"{key}: the password does not open it"
        elif _are_certificates_good(pair.certfile, certificate_content):
            message = f"{key} cannot be read: it is damaged"
        else:
            message = f"{certificate} cannot be read: a certificate in it is damaged"
        raise ConfigError(f"{message} (OpenSSL: {error})") from error
    except OSError as error:
        raise ConfigError(f"{certificate} or {key} cannot be read: {error.strerror}") from error


def _trust_clients(context: ssl.SSLContext, config: TLSConfig) -> None:
    if config.client_ca is None:
        return
    path = str(config.client_ca)
    # Read each of a folder's files now: OpenSSL's own way looks for names created by c_rehash, during handshakes, and
    # says nothing when there are none.
    for name in _files_in(path) if is_folder(path) else [path]:
        _load_trust(context, f'client_ca "{name}"', name, _CERTIFICATE, "certificate")
    if not context.cert_store_stats()["x509_ca"]:
        raise ConfigError(f'client_ca "{path}" has no certificate of a CA in it')
    if config.crl is not None:
        _load_trust(context, f'crl "{config.crl}"', str(config.crl), _CRL, "certificate revocation list")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = CLIENT_AUTH[config.client_auth]


def _load_trust(context: ssl.SSLContext, label: str, path: str, wanted: re.Pattern[bytes], meaning: str) -> None:
    content = _read(label, path)
    _expect(wanted, content, label, meaning)
    try:
        with openable(path, content) as name:
            context.load_verify_locations(cafile=name)
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: it is damaged, or not PEM (OpenSSL: {error})") from error


def _log_keys(context: ssl.SSLContext, path: str) -> None:
    try:
        # Created here, since OpenSSL would make it readable for others.
        close_descriptor(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        context.keylog_filename = path
    except UntrustedPath as error:
        raise ConfigError(f"key_log_file {error}") from error
    except OSError as error:
        raise ConfigError(f'key_log_file "{path}" cannot be written: {error.strerror}') from error


def _client_trust(config: TLSConfig) -> bytes:
    digest = hashlib.sha256()
    if config.client_ca is not None:
        path = str(config.client_ca)
        for name in _files_in(path) if is_folder(path) else [path]:
            digest.update(_read(f'client_ca "{name}"', name))
    if config.crl is not None:
        digest.update(_read(f'crl "{config.crl}"', str(config.crl)))
    return digest.digest()


def _files_in(folder: str) -> list[str]:
    try:
        return files_in(folder)  # without the hidden files of editors and Kubernetes
    except OSError as error:
        raise ConfigError(f'client_ca "{folder}" cannot be read: {error.strerror}') from error


def _read(label: str, path: str) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ConfigError(f"{label} cannot be read: {error.strerror}; expected a PEM file") from error


def _expect(wanted: re.Pattern[bytes], content: bytes, label: str, meaning: str) -> None:
    if wanted.search(content):
        return
    if content.startswith(b"\x30\x82"):
        hint = "; it looks like DER, which openssl(1) turns into PEM"
    elif _PRIVATE_KEY.search(content):
        hint = "; it holds a private key"
    elif _CERTIFICATE.search(content):
        hint = "; it holds a certificate"
    else:
        hint = ""
    raise ConfigError(f"{label} must hold a {meaning} in PEM form{hint}")


def _decode(pair: CertificatePair) -> dict[str, tuple[tuple[str, str], ...]]:
    # Private to the standard library, whose tests rely on it since Python 2.6; the other way is another dependency.
    try:
        with openable(pair.certfile, _read(f'{pair.where}certfile "{pair.certfile}"', pair.certfile)) as name:
            decoded = _ssl._test_decode_cert(name)  # type: ignore[attr-defined]  # noqa: SLF001
            return cast("dict[str, tuple[tuple[str, str], ...]]", decoded)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f'{pair.where}certfile "{pair.certfile}" cannot be read: {error}') from error


def _are_certificates_good(certfile: str, content: bytes) -> bool:
    try:
        with openable(certfile, content) as name:
            SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=name)
    except OSError:
        return False
    return True
