"""Request smuggling: every HTTP server here refuses what could be read in two ways, by one table (smuggling_corpus)."""

import pytest

from gtcpserver import Server, from_wsgi
from gtcpserver.monitoring import Monitor
from gtcpserver.static_files import StaticFiles
from kit.smuggling import Recorder, exchange, serve_http
from kit.smuggling_corpus import BAD_CHUNKS, SMUGGLED, heads

pytestmark = pytest.mark.slow


class Subject:
    """A server to be attacked.

    Attributes:
        address: of it.
        url: to be put before each path.
        passed: what the application or the origin has got of it.
    """

    def __init__(self, server, url=b"", passed=()):
        self.address, self.url, self.passed = server.address, url, passed


@pytest.fixture
def wsgi(serve):
    passed = []

    def application(environ, start_response):
        passed.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        passed.append(environ["wsgi.input"].read())
        start_response("200 OK", [("Content-Length", "0")])
        return []

    return Subject(serve(from_wsgi(application)), passed=passed)


@pytest.fixture
def files(serve, tmp_path):
    (tmp_path / "smuggled").write_text("smuggled")
    return Subject(serve(StaticFiles(tmp_path)))


@pytest.fixture
def metrics():
    with Server("127.0.0.1:0", lambda conn: None) as server, Monitor(server, 0) as monitor:
        yield Subject(monitor)


@pytest.fixture
def proxy(serve):
    origin = Recorder(serve)
    return Subject(serve(lambda conn: serve_http(conn, [])), origin.url.encode(), origin.heard)


@pytest.fixture(params=["wsgi", "files", "metrics", "proxy"])
def subject(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("behind", ["request", "chunked request"])
def test_every_head_of_the_table_is_refused_and_what_stands_behind_it_is_not_read(subject, in_thread, behind):
    body = (b"0\r\n\r\n" if behind == "chunked request" else b"") + SMUGGLED % subject.url

    def all_of_them():
        return [(head, exchange(subject.address, head + b"\r\n\r\n" + body)) for head in heads(subject.url)]

    answers = in_thread(all_of_them)
    assert len(answers) > 200
    assert [(head, answer) for head, answer in answers if answer[0] not in (400, 501, 505) or answer[1]] == []
    assert not subject.passed


@pytest.mark.parametrize("pieces", ["in one piece", "byte by byte"])
@pytest.mark.parametrize("subject", ["wsgi", "files", "metrics"], indirect=True)
def test_a_body_in_bad_chunks_is_the_last_of_its_connection(subject, in_thread, pieces):
    """Of the WSGI server: 400, whatever the application has read. The others read no bodies. The proxy is tested in
    test_proxy_smuggling, with an origin that looks at what it gets."""
    expected = (400,) if subject.passed == [] else (405, 421)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    def attack(bad):
        data = head + bad + SMUGGLED % b""
        if pieces == "in one piece" or len(data) > 1000:
            return exchange(subject.address, data)
        return exchange(subject.address, *(data[at : at + 1] for at in range(len(data))))

    answers = [(bad, in_thread(attack, bad)) for bad in BAD_CHUNKS]
    assert [(bad, answer) for bad, answer in answers if answer[0] not in expected or answer[1]] == []
    assert ("GET", "/smuggled") not in subject.passed
    if subject.passed:
        assert b"".join(found for found in subject.passed if isinstance(found, bytes)) == b""
