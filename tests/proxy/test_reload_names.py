"""After a reload a tunnel is judged by the name that was looked up, not only by the one that the client sent."""

import pytest

from gtcpserver.proxy.config import make_proxy, parse_config
from kit.handlers import echo
from kit.proxying import reply, socks


@pytest.mark.parametrize(
    ("rules", "ends"),
    [
        ('"allow .corp.test", "allow loopback"', False),
        ('"allow secret.corp.test"', True),  # the address is special, and must be named
        ('"deny .corp.test", "allow loopback"', True),
        ('"deny secret", "allow loopback"', True),
        ('"deny corp", "allow loopback"', False),
    ],
)
def test_end_forbidden_knows_the_name_that_was_looked_up(
    dns_server, name_files, serve, connect, in_thread, rules, ends
):
    name_files("search corp.test\n")
    dns_server.add("secret.corp.test", "A", "127.0.0.1")

    def made(rules):
        text = f'[[listener]]\nlisten = "127.0.0.1:0"\n[rules]\ndestinations = [{rules}]\n'
        text += f'[resolver]\nservers = ["{dns_server.address}"]\n[reload]\nend_forbidden = true\n'
        return make_proxy(parse_config(text)).handler

    origin, server = serve(echo), serve(made('"allow loopback"'))
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port, "secret")) == 0
    old, server.handler = server.handler, made(rules)
    old.retire(server.handler)
    if ends:
        with pytest.raises(ConnectionResetError):
            in_thread(client.recv, 1)
    else:
        client.sendall(b"hello")
        assert in_thread(client.recv, 5) == b"hello"
