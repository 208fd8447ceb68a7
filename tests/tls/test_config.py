"""TLS options, certificates chosen by name and replaced while a server runs, sessions, and why handshakes fail."""

import _socket
import contextlib
import datetime
import gc
import ipaddress
import logging
import os
import socket
import ssl
import stat
import struct
import subprocess
import sys

import gevent.socket
import gevent.ssl
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gtcpserver.errors import ConfigError
from gtcpserver.tls import (
    CertificateFiles,
    ConnectionTLS,
    Credentials,
    TLSConfig,
    build_context,
    classify_handshake_error,
    self_signed,
)
from kit.patience import SOON
from kit.programs import needs
from kit.tls import FAILURES, Files, client_context, read
from kit.waiting import wait_until

UNRECOGNIZED_NAME = 112
MISSING_EXTENSION = 109

# What `context._wrap_socket` takes: a `_socket.socket` that can be referred to weakly.
RawSocket = gevent.socket.socket._gevent_sock_class


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Certificates that no test changes."""
    files = Files(tmp_path_factory.mktemp("tls"))
    files.server = files.issue("server", "server.example.com", "localhost", "127.0.0.1")
    files.other = files.issue("other")
    files.client = files.issue("client", "client@example.com")
    return files


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


class Owner:
    """What OpenSSL's callbacks get, as a connection's TLS layer is."""

    def __init__(self):
        self.server_name = "not asked yet"

    def wrap_socket(self, context, sock):
        self.object = context._wrap_socket(sock, server_side=True, owner=self)
        return self.object

    def wrap_memory(self, context, incoming, outgoing):
        self.object = context._wrap_bio(incoming, outgoing, server_side=True, owner=self)
        return self.object

    @property
    def context(self):
        return self.object.context

    @context.setter
    def context(self, context):
        self.object.context = context


class Handshake:
    """A handshake in memory. `error`: what the server's side failed with; `client_error` likewise."""

    def __init__(self, context, name=None, client=None, session=None):
        self.owner = Owner()
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = self.owner.wrap_memory(context, to_server, to_client)
        client = client or client_context()
        self.client = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
        self.error = self.client_error = None
        for _ in range(4):
            # A client of TLS 1.3 hears of a refused certificate, and gets its tickets, when it next reads.
            for do in (self.client.do_handshake, lambda: self.client.read(1)):
                try:
                    do()
                except ssl.SSLWantReadError:
                    break
                except ssl.SSLError as error:
                    self.client_error = self.client_error or error
                    break
            try:
                self.server.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except OSError as error:
                self.error = self.error or error

    @property
    def done(self):
        return self.error is None and self.client_error is None and self.server.version() is not None

    @property
    def names(self):
        """The names in the server's certificate."""
        der = self.client.getpeercert(binary_form=True)
        extension = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return extension.value.get_values_for_type(x509.DNSName)

    @property
    def served(self):
        """The first of them."""
        return self.names[0]

    @property
    def info(self):
        return ConnectionTLS(self.server, self.owner.server_name)


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(SOON)
        yield sock


@contextlib.contextmanager
def accept(listening):
    """The next connection, blocking with a timeout."""
    descriptor, _ = listening._accept()
    sock = RawSocket(fileno=descriptor)
    sock.settimeout(SOON)
    try:
        yield sock
    finally:
        sock.close()


def s_client(listening, *options):
    port = listening.getsockname()[1]
    return subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def serve_once(context, listening):
    """Accept one connection and do the handshake; returns the owner."""
    owner = Owner()
    with accept(listening) as sock:
        tls = owner.wrap_socket(context, sock)
        tls.do_handshake()
        tls.write(b"hello\n")
        owner.info = ConnectionTLS(tls, owner.server_name)
        owner.reused = tls.session_reused
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.shutdown()
        # Until the client has read all of it: a close with unread input would reset the connection.
        sock.settimeout(SOON)
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
    return owner


# -- options ----------------------------------------------------------------------------------------------------------


def test_a_certificate_and_its_key_are_enough(shared):
    config = TLSConfig(*shared.server)
    assert (config.certfile, config.keyfile) == shared.server
    assert Handshake(build_context(config)).done


def test_the_key_may_be_in_the_file_of_the_certificate(files):
    certfile, keyfile = files.issue("server")
    both = files.write("both.pem", read(certfile), read(keyfile))
    assert Handshake(build_context(TLSConfig(both))).done


def test_paths_may_be_path_objects(tmp_path, files):
    files.issue("server")
    assert Handshake(build_context(TLSConfig(tmp_path / "server.pem", tmp_path / "server.key"))).done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"certfile": None}, "certfile must be the path of a file, got None"),
        ({"certfile": b"x"}, "certfile must be the path of a file"),
        ({"keyfile": 5}, "keyfile must be the path of a file, or None, got 5"),
        ({"password": b"x"}, "password must be text"),
        ({"password": "x" * 1025}, "password must be at most 1024 bytes, got 1025"),
        ({"strict_sni": 1}, "strict_sni must be True or False, got 1"),
        ({"report_truncation": None}, "report_truncation must be True or False"),
        ({"sni": [("a", "b")]}, "sni must be a mapping"),
        ({"sni": {"a.example.com": "cert.pem"}}, r"sni\['a.example.com'\] must be a tuple"),
        ({"sni": {"a.example.com": (None, None)}}, r"sni\['a.example.com'\] certfile must be the path"),
        ({"sni": {5: ("a", "b")}}, "sni: each name must be a host name .* got 5"),
        ({"sni": {"": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"*": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"a*.example.com": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"a.*.example.com": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"-a.example.com": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"a..com": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"a" * 64 + ".com": ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {".".join(["a" * 60] * 5): ("a", "b")}}, "sni: each name must be a host name"),
        ({"sni": {"bücher.example": ("a", "b")}}, r'write it as clients send it \("xn--'),
        ({"sni": {"127.0.0.1": ("a", "b")}}, "never ask for an IP address"),
        ({"sni": {"a.com": ("a", "b"), "A.com.": ("a", "b")}}, "'a.com' is there twice"),
        ({"client_auth": "yes"}, 'client_auth must be "none", "optional" or "required", got \'yes\''),
        ({"client_auth": "required"}, "client_auth='required' needs client_ca"),
        ({"client_ca": "ca.pem"}, 'client_ca "ca.pem" has no effect with client_auth="none"'),
        ({"crl": "crl.pem"}, 'crl "crl.pem" .* needs client_auth and client_ca'),
        ({"alpn": "h2"}, "alpn must be a sequence"),
        ({"alpn": ["h2", ""]}, "alpn: each name must be 1 to 255 ASCII characters, got ''"),
        ({"alpn": ["x" * 256]}, "alpn: each name must be 1 to 255"),
        ({"alpn": ["hé"]}, "alpn: each name must be 1 to 255 ASCII"),
        ({"alpn": ["x" * 255] * 257}, "at most 65535 bytes together"),
        ({"minimum_version": "TLSv1.1"}, "minimum_version must be .* got 'TLSv1.1'"),
        ({"maximum_version": 3}, "maximum_version must be .* got 3"),
        ({"minimum_version": "TLSv1.3", "maximum_version": "TLSv1.2"}, "maximum_version must not be below"),
        ({"ciphers": ["a"]}, "ciphers must be text"),
        ({"ciphers": "NONSENSE"}, "ciphers must name at least one .* got 'NONSENSE'"),
        ({"handshake_timeout": 0}, "handshake_timeout must be a number, more than 0, got 0"),
        ({"max_handshakes": 0}, "max_handshakes must be a whole number from 1, got 0"),
        ({"session_tickets": -1}, "session_tickets must be a whole number from 0"),
        ({"session_tickets": 17}, "session_tickets must be at most 16, got 17"),
        ({"watch": 0}, "watch must be a number, more than 0"),
        ({"key_log_file": "/nonexistent/keys"}, 'key_log_file "/nonexistent/keys" cannot be written: No such file'),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(shared, options, message):
    certfile, keyfile = shared.server
    with pytest.raises(ConfigError, match=message):
        TLSConfig(**{"certfile": certfile, "keyfile": keyfile, **options})


def test_the_password_is_not_printed(shared):
    assert "secret" not in repr(TLSConfig(*shared.server, password="secret"))


# -- files ------------------------------------------------------------------------------------------------------------


def refused(certfile, keyfile=None, **options):
    with pytest.raises(ConfigError) as caught:
        TLSConfig(certfile, keyfile, **options)
    return str(caught.value)


def test_a_file_that_is_missing_is_named(shared):
    certfile, keyfile = shared.server
    assert 'certfile "/no/cert.pem" cannot be read: No such file' in refused("/no/cert.pem", keyfile)
    assert 'keyfile "/no/key.pem" cannot be read: No such file' in refused(certfile, "/no/key.pem")
    message = refused(certfile, keyfile, sni={"a.example.com": ("/no/a.pem", None)})
    assert "sni['a.example.com'] certfile \"/no/a.pem\" cannot be read: No such file" in message
    auth = {"client_auth": "required"}
    assert 'client_ca "/no/ca.pem" cannot be read: No such' in refused(*shared.server, client_ca="/no/ca.pem", **auth)
    message = refused(*shared.server, client_ca=shared.ca_file, crl="/no/crl.pem", **auth)
    assert 'crl "/no/crl.pem" cannot be read: No such file' in message


def test_a_folder_in_place_of_a_file_is_refused(shared, tmp_path):
    assert f'certfile "{tmp_path}" cannot be read: Is a directory' in refused(tmp_path, shared.server[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(files):
    certfile, keyfile = files.issue("server")
    os.chmod(keyfile, 0)
    assert f'keyfile "{keyfile}" cannot be read: Permission denied' in refused(certfile, keyfile)


def test_files_in_each_others_place_are_told(shared):
    certfile, keyfile = shared.server
    message = refused(keyfile, certfile)
    assert f'certfile "{keyfile}" must hold a certificate in PEM form; it holds a private key' in message


def test_a_certificate_without_key_is_told(shared):
    certfile, _ = shared.server
    message = refused(certfile)
    assert f'certfile "{certfile}" (no keyfile is given) must hold a private key in PEM form' in message


def test_der_is_told_from_pem(files):
    certfile, keyfile = files.issue("server")
    der = files.write("server.der", ssl.PEM_cert_to_DER_cert(read(certfile).decode()))
    assert "must hold a certificate in PEM form; it looks like DER" in refused(der, keyfile)


def test_a_key_of_another_certificate_is_told(shared):
    (certfile, _), (_, keyfile) = shared.server, shared.other
    assert f'keyfile "{keyfile}" does not belong to certfile "{certfile}"' in refused(certfile, keyfile)


def test_a_key_of_another_kind_is_told(shared, files):
    rsa_key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    keyfile = files.write("rsa.key", rsa_key)
    certfile, _ = shared.server
    assert f'keyfile "{keyfile}" does not belong to certfile "{certfile}"' in refused(certfile, keyfile)


def test_a_key_of_another_certificate_in_the_same_file_is_told(files):
    (certfile, _), (_, keyfile) = files.issue("server"), files.issue("other")
    both = files.write("both.pem", read(certfile), read(keyfile))
    assert "the private key in it does not belong to the first certificate in it" in refused(both)


def test_a_damaged_key_is_told(shared, files):
    lines = read(shared.server[1]).splitlines(keepends=True)
    keyfile = files.write("damaged.key", lines[0], lines[1][:20] + b"\n", lines[-1])
    assert f'keyfile "{keyfile}" cannot be read: it is damaged' in refused(shared.server[0], keyfile)


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_certificate_in_the_chain_is_told(shared, files, which):
    good = read(shared.server[0])
    damaged = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    certfile = files.write("damaged.pem", *[(damaged, good), (good, damaged)][which])
    message = refused(certfile, shared.server[1])
    assert f'certfile "{certfile}" cannot be read: a certificate in it is damaged' in message


def test_a_weak_key_is_told(files):
    key = rsa.generate_private_key(65537, 1024)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "weak")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    ).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    message = refused(files.write("weak.pem", certificate.public_bytes(pem)), files.write("weak.key", key_pem))
    assert "its key is too small for OpenSSL's security level" in message
    assert "expected RSA of 2048 bits or more" in message


@pytest.mark.slow
def test_an_encrypted_key_without_password_is_told_and_nothing_is_asked(shared, files, python):
    encrypted = files.encrypt("encrypted.key", shared.server[1], "secret")
    assert f'keyfile "{encrypted}" is encrypted; expected a password' in refused(shared.server[0], encrypted)
    # With a terminal, OpenSSL by itself would ask there and wait.
    process = python(
        """
        import pty, os, sys
        child, terminal = pty.fork()
        if child == 0:
            from gtcpserver.tls import TLSConfig
            try:
                TLSConfig(sys.argv[1], sys.argv[2])
            except ValueError as error:
                print("refused:", error)
            os._exit(0)
        output = b""
        try:
            while data := os.read(terminal, 1000):
                output += data
        except OSError:
            pass
        print(output.decode())
        """,
        shared.server[0],
        encrypted,
    )
    output, errors = process.communicate(timeout=SOON)
    assert b"refused:" in output, errors
    assert b"Enter" not in output


def test_a_wrong_password_is_told(shared, files):
    encrypted = files.encrypt("encrypted.key", shared.server[1], "secret")
    message = refused(shared.server[0], encrypted, password="guess")
    assert f'keyfile "{encrypted}": the password does not open it' in message
    assert "guess" not in message


@pytest.mark.parametrize("password", ["secret", lambda: "secret"])
def test_a_password_opens_the_key(shared, files, password):
    encrypted = files.encrypt("encrypted.key", shared.server[1], "secret")
    assert Handshake(build_context(TLSConfig(shared.server[0], encrypted, password=password))).done


def test_a_password_function_that_fails_is_told(shared, files):
    encrypted = files.encrypt("encrypted.key", shared.server[1], "secret")
    assert "password must be a function that returns text" in refused(shared.server[0], encrypted, password=lambda: 5)


def test_a_client_ca_without_a_ca_is_refused(shared):
    certfile, keyfile = shared.server
    leaf = read(certfile).partition(b"-----END CERTIFICATE-----\n")
    path = os.path.join(shared.folder, "leaf.pem")
    with open(path, "wb") as file:
        file.write(leaf[0] + leaf[1])
    message = refused(certfile, keyfile, client_auth="required", client_ca=path)
    assert f'client_ca "{path}" has no certificate of a CA in it' in message


def test_a_file_that_is_no_revocation_list_is_refused(shared):
    message = refused(*shared.server, client_auth="required", client_ca=shared.ca_file, crl=shared.ca_file)
    assert "must hold a certificate revocation list in PEM form; it holds a certificate" in message


def test_an_expired_certificate_is_served_with_a_warning(files, caplog):
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    certfile, keyfile = files.issue("server", not_after=yesterday)
    credentials = Credentials(TLSConfig(certfile, keyfile))
    assert [record.message for record in caplog.records if "expired" in record.message]
    assert credentials.expires_at == pytest.approx(yesterday.timestamp(), abs=1)
    assert Handshake(credentials.context).done


# -- what a context does ----------------------------------------------------------------------------------------------


def test_options_of_a_context(shared):
    context = build_context(TLSConfig(*shared.server))
    assert isinstance(context, ssl.SSLContext)
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize(
    ("options", "client_version"),
    [
        ({"minimum_version": "TLSv1.3"}, ssl.TLSVersion.TLSv1_2),
        ({"maximum_version": "TLSv1.2"}, ssl.TLSVersion.TLSv1_3),
    ],
)
def test_versions_out_of_range_are_refused(shared, options, client_version):
    handshake = Handshake(
        build_context(TLSConfig(*shared.server, **options)), client=client_context(version=client_version)
    )
    assert classify_handshake_error(handshake.error) == "version"


def test_ciphers_are_chosen(shared):
    context = build_context(TLSConfig(*shared.server, maximum_version="TLSv1.2", ciphers="ECDHE+CHACHA20"))
    cipher = Handshake(context).info.cipher
    assert cipher.name == "ECDHE-ECDSA-CHACHA20-POLY1305"
    assert cipher.bits == 256


def test_alpn_follows_the_servers_order(shared):
    context = build_context(TLSConfig(*shared.server, alpn=["h2", "http/1.1"]))
    assert Handshake(context, client=client_context(alpn=["http/1.1", "h2"])).info.alpn == "h2"
    assert Handshake(context, client=client_context(alpn=["spdy"])).info.alpn is None
    assert Handshake(context).info.alpn is None


def test_the_environment_does_not_make_the_server_write_secrets(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert Handshake(build_context(TLSConfig(*shared.server))).done
    assert not (tmp_path / "keys").exists()


def test_a_key_log_file_is_private_and_written_also_for_other_names(shared, tmp_path, caplog):
    path = tmp_path / "keys"
    config = TLSConfig(*shared.server, key_log_file=path, sni={"other.example.com": shared.other})
    credentials = Credentials(config)
    assert "secrets of all connections are written" in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Handshake(credentials.context).done
    first = path.read_text().count("CLIENT_TRAFFIC_SECRET_0")
    assert Handshake(credentials.context, "other.example.com").served == "other.example.com"
    assert (first, path.read_text().count("CLIENT_TRAFFIC_SECRET_0")) == (1, 2)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("report", [False, True])
def test_a_client_that_only_shuts_down_its_side_gets_its_answer_unless_truncation_is_reported(
    shared, listening, spawn_thread, version, report
):
    context = build_context(TLSConfig(*shared.server, report_truncation=report))
    connection = socket.create_connection(listening.getsockname(), timeout=SOON)
    with (
        client_context(version=version).wrap_socket(connection, do_handshake_on_connect=False) as client,
        accept(listening) as accepted,
    ):
        owner = Owner()
        server = owner.wrap_socket(context, accepted)
        handshake = spawn_thread(server.do_handshake)
        client.do_handshake()
        handshake.get(timeout=SOON)
        client.sendall(b"question")
        _socket.socket.shutdown(client, socket.SHUT_WR)  # the standard library's class would drop TLS
        assert server.read(100) == b"question"
        if report:
            with pytest.raises(ssl.SSLError, match=r"(?i)EOF"):
                server.read(100)
        else:
            assert server.read(100) == b""
            server.write(b"answer")
            assert client.recv(100) == b"answer"


# -- certificates by name ---------------------------------------------------------------------------------------------


@pytest.fixture
def several(files):
    """A configuration maker with a default, an exact and a wildcard certificate."""
    default = files.issue("default", "default.example.org", "*.default.example.org")
    sni = {"a.example.com": files.issue("a", "a.example.com"), "*.Example.com": files.issue("w", "*.example.com")}
    return lambda **options: TLSConfig(*default, sni=sni, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "certificate"),
    [
        ("a.example.com", "a.example.com"),
        ("A.EXAMPLE.COM", "a.example.com"),
        ("b.example.com", "*.example.com"),
        ("b.c.example.com", "default.example.org"),
        ("example.com", "default.example.org"),
        ("default.example.org", "default.example.org"),
        ("unknown", "default.example.org"),
        (None, "default.example.org"),
    ],
)
def test_the_certificate_is_chosen_by_name(several, name, certificate):
    handshake = Handshake(build_context(several()), name)
    assert handshake.served == certificate
    assert handshake.owner.server_name == (name and name.lower())


@pytest.mark.slow
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("name", "certificate"),
    [
        ("a.example.com", "a.example.com"),
        ("b.example.com", "*.example.com"),
        ("default.example.org", "default.example.org"),
        ("x.default.example.org", "default.example.org"),
        ("example.com", UNRECOGNIZED_NAME),
        ("b.c.example.com", UNRECOGNIZED_NAME),
        (None, MISSING_EXTENSION),
    ],
)
def test_strict_sni_refuses_names_in_no_certificate(several, version, name, certificate):
    handshake = Handshake(build_context(several(strict_sni=True)), name, client_context(version=version))
    if isinstance(certificate, str):
        assert handshake.served == certificate
    else:
        assert classify_handshake_error(handshake.error) == "unknown_name"
        assert not handshake.done


def alert_on_the_wire(context, hello):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    owner = Owner()
    server = owner.wrap_memory(context, incoming, outgoing)
    incoming.write(hello)
    with pytest.raises(ssl.SSLError) as caught:
        server.do_handshake()
    level, description = outgoing.read()[-2:]
    return caught.value, level, description


def client_hello(name):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(("name", "alert"), [("unknown", UNRECOGNIZED_NAME), (None, MISSING_EXTENSION)])
def test_strict_sni_sends_the_alerts_of_the_rfcs(several, name, alert):
    _, level, description = alert_on_the_wire(build_context(several(strict_sni=True)), client_hello(name))
    assert (level, description) == (2, alert)


@pytest.mark.parametrize("strict", [False, True])
def test_a_name_that_is_not_ascii_fails_without_a_word(several, strict, monkeypatch):
    # CPython cannot decode it, and would print a traceback for each such client.
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    hello = client_hello("zzzz.example").replace(b"zzzz.example", b"\xff\xfezz.example")
    error, _, _ = alert_on_the_wire(build_context(several(strict_sni=strict)), hello)
    assert classify_handshake_error(error) == "unknown_name"
    assert printed == []


@pytest.mark.slow
def test_other_errors_that_cannot_be_raised_are_still_printed(several, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    build_context(several())

    class Bad:
        def __del__(self):
            b"\xff".decode("ascii")

    Bad()
    gc.collect()
    assert [type(unraisable.exc_value) for unraisable in printed] == [UnicodeDecodeError]


@pytest.mark.parametrize("name", [b"a\nb.example", b"a\x1b[2Jexample"])
def test_a_name_that_would_spoil_a_log_is_not_passed_on(several, name):
    context = build_context(several())
    hello = client_hello("z" * len(name)).replace(b"z" * len(name), name)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    owner = Owner()
    owner.wrap_memory(context, incoming, outgoing)
    incoming.write(hello)
    with pytest.raises(ssl.SSLWantReadError):
        owner.object.do_handshake()
    assert owner.server_name == ""


def test_the_owner_of_a_raw_socket_is_told_the_name_and_given_the_context(several, listening, spawn_thread):
    context = build_context(several())
    connection = socket.create_connection(listening.getsockname(), timeout=SOON)
    client = spawn_thread(lambda: client_context().wrap_socket(connection, server_hostname="a.example.com"))
    owner = Owner()
    with accept(listening) as accepted:
        accepted.setblocking(False)
        tls = owner.wrap_socket(context, accepted)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                gevent.socket.wait_read(accepted.fileno(), timeout=SOON)
        with client.get(timeout=SOON) as connected:
            certificate = x509.load_der_x509_certificate(connected.getpeercert(True))
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert alternatives.get_values_for_type(x509.DNSName) == ["a.example.com"]
        assert owner.server_name == "a.example.com"
        assert owner.context is not context


def test_the_context_also_serves_gevents_own_sockets(several, listening, spawn_thread):
    context = build_context(several())
    connection = socket.create_connection(listening.getsockname(), timeout=SOON)
    client = spawn_thread(lambda: client_context().wrap_socket(connection, server_hostname="b.example.com"))
    descriptor, _ = listening._accept()
    with context.wrap_socket(gevent.socket.socket(fileno=descriptor), server_side=True) as server:
        with client.get(timeout=SOON) as connected:
            certificate = x509.load_der_x509_certificate(connected.getpeercert(True))
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert alternatives.get_values_for_type(x509.DNSName) == ["*.example.com"]
        assert server.server_name == "b.example.com"


@pytest.mark.slow
def test_a_context_can_be_made_in_a_monkey_patched_process(several, shared, python):
    process = python(
        """
        import gevent.monkey
        gevent.monkey.patch_all()
        import ssl, sys
        import gevent, gevent.socket
        from gtcpserver.tls import TLSConfig, build_context
        certfile, keyfile, ca_file, other_certfile, other_keyfile = sys.argv[1:]
        context = build_context(TLSConfig(
            certfile, keyfile, minimum_version="TLSv1.3", client_auth="optional", client_ca=ca_file, alpn=["h2"],
            sni={"other.example.com": (other_certfile, other_keyfile)}))
        class Owner:
            context = property(lambda self: self.tls.context, lambda self, new: setattr(self.tls, "context", new))
        near, far = gevent.socket.socketpair()
        raw = gevent.socket.socket._gevent_sock_class(fileno=near.detach())
        raw.setblocking(False)
        owner = Owner()
        owner.tls = context._wrap_socket(raw, server_side=True, owner=owner)
        trusting = ssl.create_default_context(cafile=ca_file)
        client = gevent.spawn(trusting.wrap_socket, far, server_hostname="other.example.com")
        while True:
            try:
                owner.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                gevent.socket.wait_read(raw.fileno(), timeout=10)
        client.get(timeout=60)
        print(owner.server_name, owner.tls.version())
        """,
        *shared.server,
        shared.ca_file,
        *shared.other,
    )
    output, errors = process.communicate(timeout=SOON)
    assert output == b"other.example.com TLSv1.3\n", errors


# -- client certificates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("auth", ["none", "optional", "required"])
def test_client_certificates(shared, version, auth):
    options = {} if auth == "none" else {"client_auth": auth, "client_ca": shared.ca_file}
    context = build_context(TLSConfig(*shared.server, sni={"other.example.com": shared.other}, **options))
    for name in (None, "other.example.com"):
        without = Handshake(context, name, client_context(version=version))
        assert without.done == (auth != "required")
        assert without.info.peer_certificate is None
        assert without.info.peer_certificate_der is None
        good = Handshake(context, name, client_context(version=version, client=shared.client))
        assert good.done
        if auth == "none":
            assert good.info.peer_certificate is None
        else:
            assert ("email", "client@example.com") in good.info.peer_certificate["subjectAltName"]
            assert b"client@example.com" in good.info.peer_certificate_der
    if auth == "required":
        assert classify_handshake_error(without.error) == "client_certificate"


@pytest.mark.parametrize("auth", ["optional", "required"])
def test_a_client_certificate_of_another_ca_is_refused(shared, files, auth):
    context = build_context(TLSConfig(*shared.server, client_auth=auth, client_ca=shared.ca_file))
    stranger = files.issue("stranger", "client@example.com")
    handshake = Handshake(context, client=client_context(client=stranger))
    assert classify_handshake_error(handshake.error) == "client_certificate"


def test_client_ca_may_be_a_folder_of_any_names(shared, files):
    strangers = Files(files.folder)
    folder = files.folder / "trusted"
    folder.mkdir()
    (folder / "first.pem").write_bytes(shared.ca.cert_pem.bytes())
    (folder / "second.crt").write_bytes(strangers.ca.cert_pem.bytes())
    (folder / ".hidden").write_bytes(b"not read")
    context = build_context(TLSConfig(*shared.server, client_auth="required", client_ca=folder))
    for client in (shared.client, strangers.issue("client", "client@example.com")):
        assert Handshake(context, client=client_context(client=client)).done


def test_a_folder_without_a_ca_is_refused(shared, files):
    folder = files.folder / "trusted"
    folder.mkdir()
    options = {"client_auth": "required", "client_ca": folder}
    assert f'client_ca "{folder}" has no certificate of a CA in it' in refused(*shared.server, **options)
    (folder / "readme").write_text("hello")
    assert f'client_ca "{folder}/readme" must hold a certificate' in refused(*shared.server, **options)


def test_a_revoked_client_certificate_is_refused(files):
    server, good, bad = (files.issue(name, f"{name}@example.com") for name in ("server", "good", "bad"))
    crl = files.revoke("crl.pem", bad[0])
    context = build_context(TLSConfig(*server, client_auth="required", client_ca=files.ca_file, crl=crl))
    assert Handshake(context, client=client_context(client=good)).done
    error = Handshake(context, client=client_context(client=bad)).error
    assert classify_handshake_error(error) == "client_certificate"
    assert error.verify_message == "certificate revoked"


# -- sessions ---------------------------------------------------------------------------------------------------------

BOTH_VERSIONS = [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")]


def resume(credentials, listening, session, *options):
    """Whether openssl resumes the session in the file; without one there yet, it makes one."""
    there = os.path.exists(session)
    client = s_client(listening, "-ign_eof", "-sess_in" if there else "-sess_out", session, *options)
    owner = serve_once(credentials.context, listening)
    output, _ = client.communicate(timeout=SOON)
    assert ("Reused, " in output) == owner.reused
    assert os.path.exists(session), output
    return owner.reused


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize(("option", "version"), BOTH_VERSIONS)
def test_a_session_is_resumed_before_and_after_a_reload(files, listening, option, version):
    names = ["-servername", "server.example.com", option]
    credentials = Credentials(TLSConfig(*files.issue("server")))
    session = files.path("session")
    assert not resume(credentials, listening, session, *names)
    assert resume(credentials, listening, session, *names)
    os.unlink(session)
    assert not resume(credentials, listening, session, *names)
    files.issue("server", "new.example.com")
    credentials.reload()
    assert Handshake(credentials.context).served == "new.example.com"
    assert resume(credentials, listening, session, *names)


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize(("option", "version"), BOTH_VERSIONS)
def test_a_session_is_resumed_at_another_worker_process(files, listening, option, version):
    credentials = Credentials(TLSConfig(*files.issue("server")))
    session = files.path("session")

    def in_worker():
        """A forked process serves one connection; returns the client's output."""
        operation = "-sess_in" if os.path.exists(session) else "-sess_out"
        client = s_client(listening, "-ign_eof", "-servername", "server.example.com", operation, session, option)
        worker = os.fork()
        if worker == 0:
            status = 1
            try:
                serve_once(credentials.context, listening)
                status = 0
            finally:
                os._exit(status)
        output, _ = client.communicate(timeout=SOON)
        assert os.waitpid(worker, 0)[1] == 0
        return output

    assert "New, " in in_worker()
    assert "Reused, " in in_worker()


@pytest.mark.slow
@needs("openssl")
def test_sessions_are_not_resumed_when_clients_are_judged_anew(files, listening):
    client = files.issue("client", "client@example.com")
    server = files.issue("server")
    crl = files.revoke("crl.pem")
    credentials = Credentials(
        TLSConfig(*server, client_auth="required", client_ca=files.ca_file, crl=crl, sni={"a.example.com": server})
    )
    session = files.path("session")
    options = ["-cert", client[0], "-key", client[1]]
    assert not resume(credentials, listening, session, *options)
    files.issue("server")
    credentials.reload()
    assert resume(credentials, listening, session, *options)
    os.unlink(session)
    assert not resume(credentials, listening, session, *options)
    files.revoke("crl.pem", client[0])
    credentials.reload()
    s_client(listening, "-sess_in", session, *options)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
        serve_once(credentials.context, listening)


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize(("option", "version"), BOTH_VERSIONS)
def test_without_session_tickets_none_are_sent(shared, listening, option, version):
    context = build_context(TLSConfig(*shared.server, session_tickets=0))
    client = s_client(listening, "-ign_eof", option)
    assert serve_once(context, listening).info.version == version
    output, _ = client.communicate(timeout=SOON)
    assert "New, " in output
    assert "session ticket" not in output.lower().replace("session ticket: none", "")


@needs("openssl")
def test_a_resumed_session_keeps_the_clients_certificate(shared, listening, tmp_path):
    context = build_context(TLSConfig(*shared.server, client_auth="required", client_ca=shared.ca_file))
    session = str(tmp_path / "session")
    for operation in ("-sess_out", "-sess_in"):
        client = s_client(
            listening, "-ign_eof", "-tls1_3", operation, session, "-cert", shared.client[0], "-key", shared.client[1]
        )
        owner = serve_once(context, listening)
        client.communicate(timeout=SOON)
        assert owner.reused == (operation == "-sess_in")
        assert owner.info.peer_certificate["subjectAltName"] == (("email", "client@example.com"),)


# -- replacing certificates -------------------------------------------------------------------------------------------


def test_reload_serves_the_new_certificates_under_every_name(files):
    config = TLSConfig(*files.issue("server"), sni={"a.example.com": files.issue("a")})
    credentials = Credentials(config)
    files.issue("server", "new.example.com")
    files.issue("a", "a.example.com", "also-new.example.com")
    assert Handshake(credentials.context).served == "server.example.com"
    credentials.reload()
    assert Handshake(credentials.context).served == "new.example.com"
    assert Handshake(credentials.context, "a.example.com").names == ["a.example.com", "also-new.example.com"]


def test_reload_changes_the_kind_of_key(files):
    certfile, keyfile = files.issue("server", "rsa.example.com", key_type=trustme.KeyType.RSA)
    credentials = Credentials(TLSConfig(certfile, keyfile))
    wants_rsa = client_context(version=ssl.TLSVersion.TLSv1_2)
    wants_rsa.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    assert Handshake(credentials.context, client=wants_rsa).served == "rsa.example.com"
    files.issue("server", "ec.example.com", key_type=trustme.KeyType.ECDSA)
    credentials.reload()
    assert Handshake(credentials.context).served == "ec.example.com"
    # Not the old certificate, to clients that can do with it.
    assert classify_handshake_error(Handshake(credentials.context, client=wants_rsa).error) == "no_shared_cipher"


def test_a_handshake_under_way_at_a_reload_is_completed(files, listening, spawn_thread):
    credentials = Credentials(TLSConfig(*files.issue("server")))
    owner = Owner()
    with socket.create_connection(listening.getsockname(), timeout=SOON) as connection, accept(listening) as accepted:
        tls = owner.wrap_socket(credentials.context, accepted)
        files.issue("server", "new.example.com")
        credentials.reload()
        client = spawn_thread(client_context().wrap_socket, connection)
        tls.do_handshake()
        client.get(timeout=SOON).close()


def test_a_broken_file_leaves_the_old_certificates(files):
    certfile, keyfile = files.issue("server")
    credentials = Credentials(TLSConfig(certfile, keyfile, sni={"a.example.com": files.issue("a")}))
    files.issue("server", "new.example.com")
    files.write("a.pem", b"broken")
    with pytest.raises(ConfigError, match=r"sni\['a.example.com'\] certfile .* must hold a certificate"):
        credentials.reload()
    assert Handshake(credentials.context).served == "server.example.com"
    assert Handshake(credentials.context, "a.example.com").served == "a.example.com"
    os.unlink(certfile)
    with pytest.raises(ConfigError, match="No such file"):
        credentials.reload()
    assert Handshake(credentials.context).done


def test_a_ready_context_is_used_as_it_is_and_cannot_be_reloaded(shared):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*shared.server)
    credentials = Credentials(context)
    assert credentials.context is context
    assert credentials.config is None
    assert credentials.expires_at is None
    assert (credentials.handshake_timeout, credentials.report_truncation) == (10.0, False)
    assert Handshake(credentials.context).done
    with pytest.raises(ConfigError, match="tls cannot be reloaded: it was given as"):
        credentials.reload()
    with pytest.raises(ConfigError, match="watch needs a TLSConfig"):
        credentials.watch(1)


def test_gevents_context_is_a_ready_context_too(shared):
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert Credentials(context).context is context


def test_what_is_no_server_context_is_refused():
    with pytest.raises(ConfigError, match=r"tls must be a TLSConfig or .* got 'cert.pem'"):
        Credentials("cert.pem")
    with pytest.raises(ConfigError, match="tls must be a context for a server"):
        Credentials(ssl.create_default_context())


# -- watching files ---------------------------------------------------------------------------------------------------

LOOK = 0.01


@pytest.fixture
def watching(caplog):
    """`watching(config)` gives Credentials that look for changes all the time, until the test's end."""
    caplog.set_level(logging.INFO, logger="gtcpserver.tls")
    started = []

    def watch(config):
        credentials = Credentials(config)
        credentials.watch(LOOK)
        started.append(credentials)
        return credentials

    yield watch
    for credentials in started:
        credentials.stop_watching()


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def serves(credentials, name):
    return lambda: Handshake(credentials.context).served == name


def test_files_written_anew_are_seen(files, watching, caplog):
    credentials = watching(TLSConfig(*files.issue("server")))
    files.issue("server", "new.example.com")
    wait_until(serves(credentials, "new.example.com"))


def test_files_replaced_by_rename_are_seen(files, watching, caplog):
    certfile, keyfile = files.issue("server")
    credentials = watching(TLSConfig(certfile, keyfile))
    new_certfile, new_keyfile = files.issue("new")
    before = os.stat(certfile)
    os.utime(new_certfile, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new_keyfile, keyfile)
    os.replace(new_certfile, certfile)
    wait_until(serves(credentials, "new.example.com"))
    assert "TLS certificates reloaded" in caplog.text


def test_a_link_that_points_elsewhere_is_seen(files, watching):
    # As certbot and Kubernetes replace files.
    for name in ("first", "second"):
        certfile, keyfile = files.issue(name)
        files.write(f"{name}.pem", read(certfile) + read(keyfile))
    os.symlink(files.path("first.pem"), files.path("live.pem"))
    credentials = watching(TLSConfig(files.path("live.pem")))
    os.symlink(files.path("second.pem"), files.path("live.new"))
    os.replace(files.path("live.new"), files.path("live.pem"))
    wait_until(serves(credentials, "second.example.com"))


def test_a_certificate_whose_key_comes_later_is_logged_once_and_used_then(files, watching, caplog):
    certfile, keyfile = files.issue("server")
    credentials = watching(TLSConfig(certfile, keyfile))
    new_certfile, new_keyfile = files.issue("new")
    os.replace(new_certfile, certfile)
    wait_until(lambda: warnings_in(caplog))
    looks = []
    watched = credentials._reload_changed
    credentials._reload_changed = lambda: (looks.append(1), watched())
    wait_until(lambda: len(looks) >= 3)
    assert len(warnings_in(caplog)) == 1
    assert "does not belong to" in warnings_in(caplog)[0]
    assert Handshake(credentials.context).served == "server.example.com"
    os.replace(new_keyfile, keyfile)
    wait_until(serves(credentials, "new.example.com"))


def test_a_file_that_is_gone_for_a_while_is_waited_for(files, watching, caplog):
    certfile, keyfile = files.issue("server")
    credentials = watching(TLSConfig(certfile, keyfile))
    os.unlink(certfile)
    wait_until(lambda: warnings_in(caplog))
    assert "No such file" in warnings_in(caplog)[0]
    files.issue("server", "new.example.com")
    wait_until(serves(credentials, "new.example.com"))


def test_a_new_file_in_the_folder_of_client_cas_is_seen(files, shared, watching):
    folder = files.folder / "trusted"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(files.ca.cert_pem.bytes())
    credentials = watching(TLSConfig(*files.issue("server"), client_auth="required", client_ca=folder))
    client = client_context(client=shared.client)
    assert not Handshake(credentials.context, client=client).done
    (folder / "shared.pem").write_bytes(shared.ca.cert_pem.bytes())
    wait_until(lambda: Handshake(credentials.context, client=client).done)


def test_a_password_function_that_fails_does_not_end_the_watch(files, watching, caplog):
    certfile, keyfile = files.issue("server")
    encrypted = files.encrypt("encrypted.key", keyfile, "secret")
    answers = ["secret"]

    def password():
        gevent.sleep(0)  # it may wait for something
        return answers[0]

    credentials = watching(TLSConfig(certfile, encrypted, password=password))
    del answers[0]
    certfile, keyfile = files.issue("server", "new.example.com")
    files.encrypt("encrypted.key", keyfile, "other")
    wait_until(lambda: "IndexError" in caplog.text)
    answers.append("other")
    wait_until(serves(credentials, "new.example.com"))


def test_nothing_is_read_while_nothing_changes(files, watching, caplog):
    credentials = watching(TLSConfig(*files.issue("server")))
    looks = []
    states = credentials._look
    credentials.stop_watching()
    credentials._look = lambda: (looks.append(1), states())
    credentials.watch(LOOK)
    wait_until(lambda: len(looks) >= 5)
    assert "reloaded" not in caplog.text


def test_a_stopped_watch_looks_no_more(files, watching):
    credentials = watching(TLSConfig(*files.issue("server")))
    credentials.stop_watching()
    credentials.stop_watching()
    files.issue("server", "new.example.com")
    gevent.sleep(5 * LOOK)
    assert Handshake(credentials.context).served == "server.example.com"


@pytest.mark.slow
def test_watching_does_not_keep_a_program_alive(shared, python):
    process = python(
        """
        import sys, gevent
        from gtcpserver.tls import Credentials, TLSConfig
        Credentials(TLSConfig(*sys.argv[1:])).watch(0.01)
        print(gevent.get_hub().join(timeout=20))
        """,
        *shared.server,
    )
    output, errors = process.communicate(timeout=SOON)
    assert output == b"True\n", errors


# -- what a handshake agreed on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_what_a_connection_knows_of_its_tls(shared, version):
    context = build_context(TLSConfig(*shared.server, alpn=["h2"], maximum_version=version))
    handshake = Handshake(context, "server.example.com", client_context(alpn=["h2"]))
    info = handshake.info
    assert (info.version, info.alpn, info.server_name, info.session_reused) == (
        version,
        "h2",
        "server.example.com",
        False,
    )
    assert info.cipher.name == handshake.client.cipher()[0]
    assert info.cipher.bits == 256
    assert version in repr(info)
    assert info.cipher.name in repr(info)


def test_what_is_known_survives_an_error(shared):
    context = build_context(TLSConfig(*shared.server, client_auth="required", client_ca=shared.ca_file))
    handshake = Handshake(context, client=client_context(client=shared.client))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    assert handshake.done
    unfinished = ConnectionTLS(context._wrap_bio(incoming, outgoing, server_side=True))
    assert (unfinished.version, unfinished.cipher, unfinished.peer_certificate) == (None, None, None)
    assert "None" in repr(unfinished)


# -- why handshakes fail ----------------------------------------------------------------------------------------------


def failure(context, listening, data, end):
    """What the server's handshake fails with when a client sends `data`, and then closes or resets."""
    client = socket.create_connection(listening.getsockname(), timeout=SOON)
    with accept(listening) as accepted:
        owner = Owner()
        tls = owner.wrap_socket(context, accepted)
        client.sendall(data)
        if end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with pytest.raises(OSError) as caught:
            tls.do_handshake()
    return caught.value


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize(
    ("data", "end", "kind"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", "close", "http_request"),
        (b"POST / HTTP/1.1\r\nHost: example.com\r\n\r\n", "close", "http_request"),
        (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", "close", "http_request"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "close", "not_tls"),
        (b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00", "close", "not_tls"),
        (b"\0" * 64, "close", "not_tls"),
        (b"", "close", "eof"),
        (b"\x16\x03\x01", "close", "eof"),
        (b"", "reset", "reset"),
        (b"\x16\x03\x01", "reset", "reset"),
        (b"\x17\x03\x01\x00\x05hello", "close", "other"),
        (b"\x16\x03\x01\xff\xff" + b"x" * 64, "close", "other"),
    ],
)
def test_failures_before_the_hello(shared, listening, data, end, kind, report):
    context = build_context(TLSConfig(*shared.server, report_truncation=report))
    assert classify_handshake_error(failure(context, listening, data, end)) == kind


def test_the_first_bytes_tell_more_http_methods(shared, listening):
    request = b"DELETE /x HTTP/1.1\r\nHost: example.com\r\n\r\n"
    error = failure(build_context(TLSConfig(*shared.server)), listening, request, "close")
    assert classify_handshake_error(error) == "not_tls"
    assert classify_handshake_error(error, request) == "http_request"


def test_a_silent_client_is_a_timeout(shared, listening):
    context = build_context(TLSConfig(*shared.server))
    with socket.create_connection(listening.getsockname()), accept(listening) as accepted:
        accepted.settimeout(0.01)
        owner = Owner()
        with pytest.raises(TimeoutError) as caught:
            owner.wrap_socket(context, accepted).do_handshake()
    assert classify_handshake_error(caught.value) == "timeout"


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize(("server", "client", "kind"), FAILURES)
def test_failures_of_real_clients(shared, listening, server, client, kind):
    if "client_auth" in server:
        server = {**server, "client_ca": shared.ca_file}
    context = build_context(TLSConfig(*shared.server, **server))
    process = s_client(listening, *client)
    with pytest.raises(OSError) as caught:
        serve_once(context, listening)
    process.communicate(timeout=SOON)
    assert classify_handshake_error(caught.value) == kind


def test_errors_of_no_known_kind_are_other():
    assert classify_handshake_error(ValueError("x")) == "other"
    assert classify_handshake_error(ssl.SSLError(1, "x")) == "other"
    assert classify_handshake_error(BrokenPipeError()) == "reset"
    assert classify_handshake_error(EOFError()) == "eof"


# -- certificates for development -------------------------------------------------------------------------------------


def test_a_self_signed_certificate_is_good_for_its_names(listening, spawn_thread):
    made = self_signed(["localhost", "127.0.0.1", "a.example.com"])
    assert isinstance(made, CertificateFiles)
    context = build_context(TLSConfig(*made))
    trusting = ssl.create_default_context(cafile=made.certfile)
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of Python 3.13

    def fetch(name):
        connection = socket.create_connection(listening.getsockname(), timeout=SOON)
        with trusting.wrap_socket(connection, server_hostname=name) as client:
            return client.recv(100)

    for name in ("127.0.0.1", "localhost", "a.example.com"):
        client = spawn_thread(fetch, name)
        serve_once(context, listening)
        assert client.get(timeout=SOON) == b"hello\n"


@needs("curl")
def test_curl_takes_a_self_signed_certificate(listening):
    made = self_signed()
    context = build_context(TLSConfig(*made))
    client = subprocess.Popen(
        ["curl", "-sS", "--cacert", made.certfile, f"https://127.0.0.1:{listening.getsockname()[1]}/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    owner = Owner()
    with accept(listening) as sock:
        tls = owner.wrap_socket(context, sock)
        tls.do_handshake()
        request = b""
        while b"\r\n\r\n" not in request:
            request += tls.read(4096)
        tls.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        assert client.communicate(timeout=SOON)[0] == b"hello"


def test_a_self_signed_certificates_files_are_private():
    made = self_signed()
    assert stat.S_IMODE(os.stat(made.keyfile).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(made.keyfile)).st_mode) == 0o700
    certificate = x509.load_pem_x509_certificate(read(made.certfile))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


@pytest.mark.slow
def test_a_self_signed_certificates_files_go_with_the_process_that_made_them(python):
    process = python(
        """
        import os, sys
        from gtcpserver.tls import self_signed
        made = self_signed()
        if os.fork() == 0:
            sys.exit()
        os.wait()
        print(made.keyfile, os.path.exists(made.keyfile))
        """
    )
    output, errors = process.communicate(timeout=SOON)
    path, existed = output.decode().split()
    assert existed == "True", errors
    assert not os.path.exists(os.path.dirname(path))


@pytest.mark.parametrize("names", ["localhost", [], ["bücher.example"], [5]])
def test_names_that_cannot_be_in_a_certificate_are_refused(names):
    with pytest.raises(ConfigError, match="names"):
        self_signed(names)


def test_without_cryptography_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'gtcpserver\[tls\]'"):
        self_signed()
