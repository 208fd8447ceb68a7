"""A client that speaks no TLS gets its answer whole also where nothing lingers: the end is no reset."""

import pytest

from gtcpserver.connection.handshake_failure import NOT_TLS_ALERT, PLAIN_HTTP_ANSWER
from kit.clients import read_all


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET /a?b HTTP/1.1\r\nHost: localhost\r\n\r\n", PLAIN_HTTP_ANSWER),
        (b"POST / HTTP/1.1\r\nContent-Length: 10000\r\n\r\n" + 10000 * b"x", PLAIN_HTTP_ANSWER),
        (b"SSH-2.0-OpenSSH_9.2\r\n", NOT_TLS_ALERT),
    ],
    ids=["GET", "POST", "SSH"],
)
def test_the_answer_to_plain_text_is_followed_by_an_end_and_not_by_a_reset(
    serve, tls, connect, in_thread, data, answer
):
    client = connect(serve(lambda conn: None, tls=tls, linger=0))
    client.sendall(data)
    assert in_thread(read_all, client) == (answer, "end")
