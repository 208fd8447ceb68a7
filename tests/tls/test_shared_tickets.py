"""A session is resumed by any worker, and by no server that would not have admitted the client otherwise.

Two servers in this process stand for two workers, which share nothing but their memory.
"""

import ssl

import pytest

from gtcpserver import TLSConfig
from gtcpserver.shared.memory import SharedMemory
from gtcpserver.tls import Credentials, ticket_keys
from kit.tls import Files, client_context, read

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture(params=[V12, V13], ids=["1.2", "1.3"])
def version(request):
    return request.param


@pytest.fixture
def memory():
    made = SharedMemory.make(1)
    ticket_keys.share(made)
    yield made
    ticket_keys.share(None)
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = Files(tmp_path_factory.mktemp("tls"))
    made.server = made.issue("server", "localhost")
    made.renewed = made.issue("renewed", "localhost")
    made.client = made.issue("client", "client@example.com")
    made.other = Files(tmp_path_factory.mktemp("other"))
    return made


def tell(conn):
    conn.sendall(b"resumed" if conn.tls.session_reused else b"new")


@pytest.fixture
def talk(connect, in_thread):
    """`talk(server, context, session)`: connect, and return what the server says, and the session."""

    def once(sock, context, session):
        with context.wrap_socket(sock, server_hostname="localhost", session=session) as client:
            return client.recv(100).decode(), client.session

    return lambda server, context, session=None: in_thread(once, connect(server), context, session)


def test_another_worker_resumes_a_session(serve, files, memory, version, talk):
    one, other = (serve(tell, tls=TLSConfig(*files.server)) for _ in range(2))
    context = client_context(version=version)
    said, session = talk(one, context)
    assert said == "new"
    assert [talk(server, context, session)[0] for server in (other, one)] == ["resumed"] * 2


def test_without_shared_secrets_each_worker_has_its_own_keys(serve, files, version, talk):
    one, other = (serve(tell, tls=TLSConfig(*files.server)) for _ in range(2))
    context = client_context(version=version)
    _, session = talk(one, context)
    assert [talk(server, context, session)[0] for server in (other, one)] == ["new", "resumed"]


def test_tickets_of_the_keys_before_are_accepted_older_ones_not(serve, files, memory, version, talk):
    one, other = (serve(tell, tls=TLSConfig(*files.server)) for _ in range(2))
    context = client_context(version=version)
    _, session = talk(one, context)
    assert memory.rotate_tickets()
    assert [talk(server, context, session)[0] for server in (other, one)] == ["resumed"] * 2
    _, newer = talk(one, context)
    assert memory.rotate_tickets()
    assert [talk(server, context, session)[0] for server in (other, one)] == ["new"] * 2
    assert talk(other, context, newer)[0] == "resumed"
    assert not memory.rotate_tickets(after=3600)


def test_a_renewed_certificate_at_the_same_path_keeps_sessions(serve, files, memory, version, talk, tmp_path):
    for name, path in zip(("cert.pem", "cert.key"), files.server, strict=True):
        (tmp_path / name).write_bytes(read(path))
    config = TLSConfig(tmp_path / "cert.pem", tmp_path / "cert.key")
    one = serve(tell, tls=config)
    context = client_context(version=version)
    _, session = talk(one, context)
    for name, path in zip(("cert.pem", "cert.key"), files.renewed, strict=True):
        (tmp_path / name).write_bytes(read(path))
    other = serve(tell, tls=TLSConfig(tmp_path / "cert.pem", tmp_path / "cert.key"))
    assert talk(other, context, session)[0] == "resumed"


def test_a_session_from_before_a_change_of_the_ca_is_not_resumed(serve, files, memory, version, talk):
    """The client's certificate came from a CA that is not trusted any more."""
    options = {"client_auth": "required"}
    before = serve(tell, tls=TLSConfig(*files.server, client_ca=files.ca_file, **options))
    same = serve(tell, tls=TLSConfig(*files.server, client_ca=files.ca_file, **options))
    after = serve(tell, tls=TLSConfig(*files.server, client_ca=files.other.ca_file, **options))
    context = client_context(version=version)
    context.load_cert_chain(*files.client)
    _, session = talk(before, context)
    assert talk(same, context, session)[0] == "resumed"
    with pytest.raises(ssl.SSLError):
        talk(after, context, session)
    assert after.stats().handshake_failures == {"client_certificate": 1}


@pytest.mark.parametrize("auth", ["none", "optional"])
def test_a_session_without_a_certificate_does_not_open_a_server_that_requires_one(
    serve, files, memory, version, talk, auth
):
    """As when a reload changes the setting, or another listener of the same service has it."""
    ca = {"client_ca": files.ca_file}
    lax = serve(tell, tls=TLSConfig(*files.server, client_auth=auth, **(ca if auth != "none" else {})))
    strict = serve(tell, tls=TLSConfig(*files.server, client_auth="required", **ca))
    context = client_context(version=version)
    _, session = talk(lax, context)
    assert talk(lax, context, session)[0] == "resumed"
    with pytest.raises(ssl.SSLError):
        talk(strict, context, session)
    assert strict.stats().handshake_failures == {"client_certificate": 1}


def test_a_session_of_one_site_is_not_resumed_by_another(serve, files, memory, version, talk):
    """A man in the middle could pass a client's connection on to the other one, whose certificate it never sees."""
    one, other = serve(tell, tls=TLSConfig(*files.server)), serve(tell, tls=TLSConfig(*files.renewed))
    context = client_context(version=version)
    _, session = talk(one, context)
    assert talk(other, context, session)[0] == "new"


def test_the_name_of_older_keys_in_a_clients_message_opens_nothing(serve, files, memory, version, talk):
    """Anyone may write it into a ClientHello: here as the name of a server."""
    options = {"client_auth": "required", "client_ca": files.ca_file}
    server = serve(tell, tls=TLSConfig(*files.server, **options))
    context = client_context(version=version)
    context.load_cert_chain(*files.client)
    talk(server, context)
    memory.rotate_tickets()
    assert talk(server, context)[0] == "new"
    name, front = server.tls.older
    assert len(name) == ticket_keys.NAME_BYTES
    server.tls.older = b"localhost", front
    assert talk(server, context)[0] == "new"
    context = client_context(version=version)
    with pytest.raises(ssl.SSLError):
        talk(server, context)


def test_a_python_that_does_not_let_us_is_told_once(serve, files, memory, talk, monkeypatch, caplog):
    def fails(*_arguments):
        raise ticket_keys.CannotSetKeys("the layout is unknown")

    monkeypatch.setattr(ticket_keys, "set_ticket_keys", fails)
    one, other = (serve(tell, tls=TLSConfig(*files.server)) for _ in range(2))
    context = client_context(version=V13)
    _, session = talk(one, context)
    assert [talk(server, context, session)[0] for server in (other, one)] == ["new", "resumed"]
    assert caplog.text.count("can only be resumed by the worker that it began with: the layout is unknown") == 1


def test_what_is_no_context_is_not_written_to():
    keys = bytes(range(80))
    for context in (object(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)):
        with pytest.raises(ticket_keys.CannotSetKeys):
            ticket_keys.set_ticket_keys(context, keys)


def test_keys_differ_with_each_secret_and_each_identity():
    made = {ticket_keys.derive(secret * 32, identity) for secret in (b"a", b"b") for identity in (b"x", b"y")}
    assert len(made) == 4
    assert {len(keys) for keys in made} == {ticket_keys.KEY_BYTES}


def test_a_ready_context_keeps_its_own_keys(files, memory):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    credentials = Credentials(context)
    assert credentials.context is context
    assert credentials.older is None
