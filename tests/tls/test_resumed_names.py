"""The name that a client asks for when it resumes a session."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import TLSConfig
from gtcpserver.tls.client_hello import server_name_in
from kit.programs import needs
from kit.tls import Files, client_context, s_client

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
PROTOCOL = {V12: "-tls1_2", V13: "-tls1_3"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    files = Files(tmp_path_factory.mktemp("tls"))
    files.server = files.issue("server", "localhost", "b.example.com")
    return files


def tell(conn):
    conn.sendall(repr((conn.tls.server_name, conn.tls.session_reused)).encode())


def ask(sock, context, name, session):
    with context.wrap_socket(sock, server_hostname=name, session=session) as client:
        return client.recv(100).decode(), client.session


@pytest.fixture
def resume(connect, in_thread):
    """`resume(server, version, name)` begins a session for "localhost" and resumes it for `name`."""

    def talk(server, version, name):
        context = client_context(version=version)
        first, session = in_thread(ask, connect(server), context, "localhost", None)
        assert first == "('localhost', False)"
        return in_thread(ask, connect(server), context, name, session)[0]

    return talk


@pytest.mark.parametrize("version", [V12, V13])
def test_a_session_is_resumed_for_its_own_name(serve, shared, resume, version):
    server = serve(tell, tls=TLSConfig(*shared.server, strict_sni=True))
    assert resume(server, version, "LocalHost") == "('localhost', True)"
    assert server.stats().handshake_failures == {}


@pytest.mark.parametrize("version", [V12, V13])
@pytest.mark.parametrize("tickets", [0, 2])
@pytest.mark.parametrize("name", ["evil.example.com", None])
def test_a_session_does_not_pass_by_strict_sni(serve, shared, resume, version, name, tickets):
    """With tickets, or with session IDs."""
    server = serve(tell, tls=TLSConfig(*shared.server, strict_sni=True, session_tickets=tickets))
    with pytest.raises(ssl.SSLError):
        resume(server, version, name)
    assert server.stats().handshake_failures == {"unknown_name": 1}


def test_a_session_is_not_resumed_for_another_name_that_is_known(serve, shared, resume):
    """RFC 6066 section 3. TLS 1.3 has it that the client may (RFC 8446 section 4.6.1)."""
    server = serve(tell, tls=TLSConfig(*shared.server, strict_sni=True))
    with pytest.raises(ssl.SSLError):
        resume(server, V12, "b.example.com")
    assert server.stats().handshake_failures == {"unknown_name": 1}


@pytest.mark.parametrize("name", ["b.example.com", None])
def test_without_strict_sni_the_connection_tells_what_was_asked_for(serve, shared, resume, name):
    server = serve(tell, tls=TLSConfig(*shared.server))
    assert resume(server, V12, name) == repr((name, True))


@pytest.mark.slow
@needs("openssl")
@pytest.mark.parametrize("version", [V12, V13])
def test_the_openssl_command(serve, shared, in_thread, tmp_path, version):
    server = serve(tell, tls=TLSConfig(*shared.server, strict_sni=True))
    file = tmp_path / "session"
    options = (PROTOCOL[version], "-servername")
    assert "('localhost', False)" in in_thread(s_client, server, *options, "localhost", "-sess_out", file)[1]
    assert "('localhost', True)" in in_thread(s_client, server, *options, "localhost", "-sess_in", file)[1]
    in_thread(s_client, server, *options, "evil.example.com", "-sess_in", file)
    in_thread(s_client, server, PROTOCOL[version], "-noservername", "-sess_in", file)
    assert server.stats().handshake_failures == {"unknown_name": 2}
    assert server.stats().accepted == 4


@pytest.mark.parametrize("name", ["a", "a.example.com", ".".join(["x" * 63] * 4), None])
@pytest.mark.parametrize("version", [V12, V13])
def test_the_name_is_found_in_a_hello(name, version):
    outgoing = ssl.MemoryBIO()
    client = client_context(version=version, alpn=["h2"]).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert server_name_in(outgoing.read()[5:]) == name


@given(st.binary(max_size=300))
def test_any_bytes_give_a_name_or_none(data):
    assert server_name_in(data) is None or isinstance(server_name_in(data), str)
