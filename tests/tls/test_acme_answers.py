"""An ACME authority's question on the server's own port (tls-alpn-01): who gets the challenge's certificate, and who
the server's."""

import hashlib
import os
import re
import ssl

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import Server, TLSConfig
from gtcpserver.tls.acme.answers import MAX_HELLO, Answers
from gtcpserver.tls.acme.folder import Folder
from gtcpserver.tls.acme.ordering import ACME_IDENTIFIER, challenge_certificate
from gtcpserver.tls.acme.settings import ACMESettings
from gtcpserver.tls.client_hello import protocols_in, server_name_in
from kit.programs import needs
from kit.tls import client_context, s_client
from kit.waiting import wait_until

pytestmark = needs("openssl")

NAME = "a.example.com"
PROOF = "token.thumbprint"
QUESTION = ("-alpn", "acme-tls/1", "-servername", NAME)


@pytest.fixture
def site(tmp_path, shared, serve, monkeypatch):
    """`site(**options)`: a server with a certificate of the tests' CA, where a challenge is under way for NAME."""
    monkeypatch.setattr("gtcpserver.server.certificates.keep_certificate", lambda *_arguments: None)
    settings = ACMESettings.checked([NAME, "b.example.com"], None, "staging", str(tmp_path / "acme"), None)
    folder = Folder(settings)
    folder_path = os.path.dirname(folder.certificate)
    os.makedirs(folder_path)
    with open(folder.certificate, "wb") as file:
        for path in shared.server:
            with open(path, "rb") as part:
                file.write(part.read())
    with open(folder.challenge(NAME), "wb") as file:
        file.write(challenge_certificate(NAME, PROOF))

    def start(handler=lambda conn: conn.sendall(b"served"), **options):
        tls = TLSConfig.acme([NAME, "b.example.com"], folder=tmp_path / "acme", **options)
        server = serve(handler, tls=tls)
        server.challenge = folder.challenge(NAME)
        return server

    return start


def certificate_in(output):
    pem = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", output, re.DOTALL)
    return x509.load_pem_x509_certificate(pem[0].encode()) if pem else None


def is_challenge(certificate):
    return any(one.oid == ACME_IDENTIFIER for one in certificate.extensions)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(
    "options", [{}, {"alpn": ["h2"]}, {"strict_sni": True, "client_auth": "required"}, {"session_tickets": 0}]
)
def test_the_question_of_an_authority_is_answered(site, shared, in_thread, version, options):
    if "client_auth" in options:
        options["client_ca"] = shared.ca_file
    server = site(**options)
    _, output = in_thread(s_client, server, *QUESTION, version)
    assert "ALPN protocol: acme-tls/1" in output
    assert "served" not in output
    certificate = certificate_in(output)
    # RFC 8737 section 3: the name alone, and the digest in a critical extension.
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [NAME]
    extension = certificate.extensions.get_extension_for_oid(ACME_IDENTIFIER)
    assert extension.critical
    assert extension.value.value == b"\x04\x20" + hashlib.sha256(PROOF.encode()).digest()
    wait_until(lambda: server.stats().handshake_failures == {"acme_challenge": 1})
    assert server.stats().accepted == 1
    assert not server.active_connections


@pytest.mark.parametrize(
    "question",
    [
        ("-servername", NAME),
        ("-servername", NAME, "-alpn", "h2"),
        ("-servername", NAME, "-alpn", "acme-tls/1,h2"),
        ("-servername", NAME, "-alpn", "h2,acme-tls/1"),
        ("-servername", "b.example.com", "-alpn", "acme-tls/1"),  # no challenge is under way
        ("-servername", "c.example.com", "-alpn", "acme-tls/1"),  # not ours
        ("-servername", "..", "-alpn", "acme-tls/1"),
        ("-servername", f"x/../challenge-{NAME}", "-alpn", "acme-tls/1"),
        ("-noservername", "-alpn", "acme-tls/1"),
    ],
)
def test_nobody_else_gets_the_challenges_certificate(site, in_thread, question):
    server = site()
    _, output = in_thread(s_client, server, *question)
    assert not is_challenge(certificate_in(output))
    assert "served" in output
    assert "acme_challenge" not in server.stats().handshake_failures


def test_a_challenge_ends_with_its_file_and_another_follows(site, in_thread):
    server = site()
    assert is_challenge(certificate_in(in_thread(s_client, server, *QUESTION)[1]))
    with open(server.challenge + ".new", "wb") as file:
        file.write(challenge_certificate(NAME, "another.thumbprint"))
    os.rename(server.challenge + ".new", server.challenge)
    certificate = certificate_in(in_thread(s_client, server, *QUESTION)[1])
    digest = certificate.extensions.get_extension_for_oid(ACME_IDENTIFIER).value.value
    assert digest.endswith(hashlib.sha256(b"another.thumbprint").digest())
    with open(server.challenge, "wb") as file:
        file.write(b"damaged")
    assert "served" in in_thread(s_client, server, *QUESTION)[1]
    os.unlink(server.challenge)
    assert "served" in in_thread(s_client, server, *QUESTION)[1]


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_an_answered_question_leaves_no_session(site, in_thread, tmp_path, version):
    server = site()
    ordinary = ("-servername", NAME, version)

    def is_resumed_after(number, *question):
        session = str(tmp_path / f"session-{number}")
        in_thread(s_client, server, *question, "-sess_out", session)
        if not os.path.exists(session):  # it got no ticket
            return False
        _, output = in_thread(s_client, server, *ordinary, "-sess_in", session)
        assert not is_challenge(certificate_in(output))
        return "Reused" in output

    assert is_resumed_after(1, *ordinary)
    assert not is_resumed_after(2, *QUESTION, version)


def test_starttls_answers_no_challenge(site, tls, connect, in_thread):
    # The authority speaks no other protocol before, so the client is none.
    def handle(conn):
        conn.start_tls(credentials)
        conn.sendall(b"served")

    server = site()
    credentials = server.tls
    with Server("127.0.0.1:0", handle) as plain:
        assert "served" in in_thread(s_client, plain, *QUESTION)[1]


# -- what is no ClientHello --------------------------------------------------------------------------------------------


def hello(name=NAME, protocols=("acme-tls/1",)):
    context = client_context(alpn=protocols)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    settings = ACMESettings.checked([NAME], None, "staging", str(folder), None)
    path = Folder(settings).challenge(NAME)
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(challenge_certificate(NAME, PROOF))
    return Answers(settings)


def test_a_first_message_that_is_too_long_is_not_looked_at(answers):
    record = hello()
    assert protocols_in(record[5:]) == [b"acme-tls/1"]
    assert server_name_in(record[5:]) == NAME
    assert answers.find(record) is not None
    assert answers.find(record) is answers.find(record)
    assert answers.find(record + b"\0" * (MAX_HELLO + 1 - len(record))) is None


@given(st.data())
def test_any_bytes_may_be_a_first_message(answers, data):
    record = bytearray(hello())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(record) - 1))
        record[place] = data.draw(st.integers(0, 255))
    answers.find(bytes(record))
    cut = bytes(record[: data.draw(st.integers(0, len(record)))])
    answers.find(cut)
    protocols_in(cut)
    server_name_in(cut)
