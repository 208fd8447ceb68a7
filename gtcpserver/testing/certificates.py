"""Certificates for tests: a server certificate, and a client context that trusts it."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gtcpserver.errors import ConfigError
from gtcpserver.tls import TLSConfig


@dataclass(frozen=True)
class Certificates:
    """A certificate authority for one test, and the certificates it signed.

    Attributes:
        server: for ``Server(tls=...)``.
        client: for ``connect(tls=...)``, http.client and others: trusts only this authority.
        ca_file: the authority's certificate (PEM), for ``curl --cacert`` and ``TLSConfig(client_ca=...)``.
        certfile, keyfile: files of the server's certificate, for a TLSConfig with other options.

    Example::

        from gtcpserver import Server, TLSConfig
        from gtcpserver.testing import certificates

        with certificates(["example.com"]) as made:
            tls = TLSConfig(made.certfile, made.keyfile, client_auth="required", client_ca=made.ca_file)
            server = Server("127.0.0.1:8443", handle, tls=tls)
    """

    server: TLSConfig
    client: ssl.SSLContext
    ca_file: Path
    certfile: Path
    keyfile: Path
    _ca: Any = field(repr=False)

    def client_with_certificate(self, name: str) -> ssl.SSLContext:
        """Return a context for a client that sends a certificate: for ``TLSConfig(client_auth="required")``.

        Args:
            name: common name in the certificate.
        """
        context = ssl.create_default_context(cafile=str(self.ca_file))
        self._ca.issue_cert(common_name=name).configure_cert(context)
        return context


@contextmanager
def certificates(names: Sequence[str] = ("localhost", "127.0.0.1", "::1")) -> Iterator[Certificates]:
    """Make certificates (0.01 s); the files are removed at the end of the ``with`` block.

    Args:
        names: host names and IP addresses in the server's certificate.

    Raises:
        ConfigError: the package trustme is missing.

    Example::

        from gtcpserver.testing import certificates, connect, serving

        with certificates() as made:
            with serving(echo, tls=made.server) as server, connect(server, tls=made.client) as client:
                print(client.tls.version())  # TLSv1.3
    """
    try:
        import trustme
    except ImportError as error:
        raise ConfigError("certificates need the package trustme: pip install 'gtcpserver[testing]'") from error
    ca = trustme.CA()
    certificate = ca.issue_cert(*names)
    with tempfile.TemporaryDirectory(prefix="gtcpserver-testing-") as folder:
        ca_file, certfile, keyfile = (Path(folder, name) for name in ("ca.pem", "server.pem", "server.key"))
        ca.cert_pem.write_to_path(ca_file)
        certfile.write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        keyfile.touch(0o600)
        certificate.private_key_pem.write_to_path(keyfile)
        client = ssl.create_default_context(cafile=str(ca_file))
        yield Certificates(TLSConfig(certfile, keyfile), client, ca_file, certfile, keyfile, ca)
