"""Rules about commands: what a client may tunnel to may differ from what it may send HTTP requests to."""

from ipaddress import ip_address

import pytest

from gtcpserver.proxy.errors import RuleError
from gtcpserver.proxy.rules import RuleMatch, decide_destination, parse_destination_rule, parse_way
from kit.proxying import http

CLIENT = ip_address("192.0.2.7")


def reach(rules, command, port):
    asked = RuleMatch(CLIENT, "office", None, None, port, command)
    return decide_destination(list(map(parse_destination_rule, rules)), asked, None, ip_address("8.8.8.8")).allowed


def test_a_rule_is_about_its_commands_alone():
    rules = ["deny from any command connect,bind to any:1-442,444-65535", "allow any"]
    assert reach(rules, "connect", 443)
    assert not reach(rules, "connect", 80)
    assert not reach(rules, "bind", 80)
    assert reach(rules, "forward", 80)
    assert reach(rules, "udp", 53)
    assert not reach(["allow from any command forward to any"], "connect", 443)


def test_so_is_one_that_chooses_an_upstream():
    name, match = parse_way("through out from 192.0.2.0/24 user ada via office command forward to .example.com:80")
    asked = RuleMatch(CLIENT, "office", None, "ada", 80, "forward")
    assert name == "out"
    assert asked.fits(match)
    asked.command = "connect"
    assert not asked.fits(match)


@pytest.mark.parametrize("wrong", ["", "GET", "connect,", "connect,,bind", "CONNECT"])
def test_other_words_are_no_commands(wrong):
    with pytest.raises(RuleError):
        parse_destination_rule(f"allow from any command {wrong} to any")


def test_one_client_asks_for_both(proxy, serve, connect, in_thread):
    """Decisions are remembered, each for its command."""

    def answer(conn):
        conn.recv(1000)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    origin = serve(answer)
    server = proxy(rules='[rules]\ndestinations = ["deny from any command connect to any", "allow loopback"]')
    for _ in range(2):
        for asked, status in ((b"GET http://127.0.0.1:%d/", b"200"), (b"CONNECT 127.0.0.1:%d", b"403")):
            said = in_thread(http, connect(server), asked % origin.port + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert said.startswith(b"HTTP/1.1 " + status)
