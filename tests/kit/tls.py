"""TLS: certificates of a CA of the test, and clients."""

from __future__ import annotations

import contextlib
import datetime
import ssl
import subprocess

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from kit.patience import SOON

#: (options of TLSConfig, options of openssl s_client, how the failed handshake is counted)
FAILURES = [
    ({}, ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], "version"),
    ({"minimum_version": "TLSv1.3"}, ["-tls1_2"], "version"),
    ({"maximum_version": "TLSv1.2"}, ["-tls1_3"], "version"),
    ({}, ["-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"], "no_shared_cipher"),
    # OpenSSL 3.6 does not offer this suite at its level of security, 1.
    ({}, ["-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_8_SHA256", "-cipher", "ALL@SECLEVEL=0"], "no_shared_cipher"),
    ({}, ["-tls1_3", "-sigalgs", "rsa_pss_rsae_sha256"], "no_shared_cipher"),
    ({"client_auth": "required"}, ["-tls1_2"], "client_certificate"),
    ({"client_auth": "required"}, ["-tls1_3"], "client_certificate"),
    ({"strict_sni": True}, ["-servername", "unknown"], "unknown_name"),
    ({"strict_sni": True}, ["-noservername"], "unknown_name"),
    ({}, ["-tls1_2", "-verify_return_error"], "server_certificate"),
    ({}, ["-tls1_3", "-verify_return_error"], "server_certificate"),
]


def read(path):
    with open(path, "rb") as file:
        return file.read()


class Files:
    """Certificates of one CA, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)

    def path(self, name):
        return str(self.folder / name)

    def write(self, name, *content):
        path = self.path(name)
        with open(path, "wb") as file:
            file.write(b"".join(content))
        return path

    def issue(self, name, *identities, **options):
        """Write name.pem (chain) and name.key; returns the pair of paths."""
        return self.save(name, self.ca.issue_cert(*identities or [f"{name}.example.com"], **options))

    def save(self, name, leaf):
        chain = [blob.bytes() for blob in leaf.cert_chain_pems]
        return self.write(f"{name}.pem", *chain), self.write(f"{name}.key", leaf.private_key_pem.bytes())

    def encrypt(self, name, keyfile, password):
        key = serialization.load_pem_private_key(read(keyfile), None)
        encrypted = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password.encode()),
        )
        return self.write(name, encrypted)

    def revoke(self, name, *certfiles):
        """Write a certificate revocation list of the CA."""
        ca_key = serialization.load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        ca_certificate = x509.load_pem_x509_certificate(self.ca.cert_pem.bytes())
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateRevocationListBuilder(
            ca_certificate.subject, now - datetime.timedelta(days=1), now + datetime.timedelta(days=1)
        )
        for certfile in certfiles:
            serial = x509.load_pem_x509_certificate(read(certfile)).serial_number
            revoked = x509.RevokedCertificateBuilder(serial, now - datetime.timedelta(days=1)).build()
            builder = builder.add_revoked_certificate(revoked)
        crl = builder.sign(ca_key, hashes.SHA256())
        return self.write(name, crl.public_bytes(serialization.Encoding.PEM))


def client_context(ca_file=None, version=None, client=None, alpn=()):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if ca_file is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(ca_file)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if client is not None:
        context.load_cert_chain(*client)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def s_client(server, *options):
    """Run the openssl command until the server closes; returns its exit status and what it printed."""
    command = ["openssl", "s_client", "-connect", server.address, "-ign_eof", *options]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SOON, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


def read_all(client):
    return b"".join(iter(lambda: client.recv(65536), b""))


def read_exactly(client, size):
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, f"{len(data)} of {size} bytes"
        data += more
    return data


def memory_shutdown(client):
    """Send close_notify and do not wait for the answer."""
    client.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.unwrap()
    client.settimeout(SOON)


def strict_context():
    """A client to which an end without close_notify is an error."""
    context = client_context()
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


class MemoryClient:
    """A TLS client whose bytes the test moves."""

    def __init__(self, sock, context):
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def handshake(self, send=None):
        """Blocking: run it in a thread."""
        while True:
            try:
                self.tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            data = self.outgoing.read()
            (send or self.sock.sendall)(data)
            if done:
                return
            received = self.sock.recv(65536)
            assert received
            self.incoming.write(received)

    def records(self, *messages):
        """Each in a record of its own, together."""
        for message in messages:
            self.tls.write(message)
        return self.outgoing.read()
