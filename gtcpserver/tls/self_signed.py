"""A self-signed certificate for development."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple

from gtcpserver.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

#: Begins a day early for clocks that are behind, and lasts less than the 398 days beyond which browsers refuse one.
VALID = timedelta(days=365)
CLOCK_SKEW = timedelta(days=1)


class CertificateFiles(NamedTuple):
    """Paths: ``TLSConfig(*self_signed())``.

    Example::

        from gtcpserver import TLSConfig
        from gtcpserver.tls import self_signed

        certfile, keyfile = self_signed()
        tls = TLSConfig(certfile, keyfile)
    """

    certfile: str
    keyfile: str


def self_signed(names: Sequence[str] = ("localhost", "127.0.0.1", "::1")) -> CertificateFiles:
    """Create a certificate (EC, P-256, valid for a year) and its key, in a private folder that is removed at exit.

    For development and tests. Clients must be told to trust the file: ``curl --cacert``,
    ``ssl.create_default_context(cafile=...)``.

    Args:
        names: host names and IP addresses that it is valid for.

    Raises:
        ConfigError: an invalid name, or the cryptography package is missing.

    Example::

        from gtcpserver import Server, TLSConfig
        from gtcpserver.tls import self_signed

        files = self_signed(["localhost"])
        server = Server("127.0.0.1:8443", handle, tls=TLSConfig(*files))
        print("curl --cacert", files.certfile)
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise ConfigError("self_signed needs the package cryptography: pip install 'gtcpserver[tls]'") from error
    if isinstance(names, str) or not names:
        raise ConfigError(
            f'names must be a sequence of host names and addresses, such as ("localhost",), got {names!r}'
        )
    alternatives = [_general_name(name) for name in names]
    key = ec.generate_private_key(ec.SECP256R1())
    # The names are in the extension (RFC 9525 section 2); this one is for people, with 64 characters at most.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gtcpserver self-signed certificate")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tempfile.mkdtemp(prefix="gtcpserver-tls-")  # mode 0o700
    atexit.register(_remove, folder, os.getpid())
    files = CertificateFiles(os.path.join(folder, "certificate.pem"), os.path.join(folder, "key.pem"))
    _write(files.certfile, certificate.public_bytes(serialization.Encoding.PEM))
    _write(
        files.keyfile,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    return files


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    if not isinstance(name, str) or not name.isascii():
        raise ConfigError(f"names: each must be an ASCII host name or an IP address, got {name!r}")
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: str, content: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def _remove(folder: str, process: int) -> None:
    # Worker processes forked since then end before this one, and must leave it the files.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
