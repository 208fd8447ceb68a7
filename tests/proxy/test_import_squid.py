"""squid.conf as a configuration of ours: nobody gets more than squid gave him, and nothing is lost in silence."""

from ipaddress import ip_address, ip_network
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver.proxy.import_draft import split_lines
from gtcpserver.proxy.import_files import import_lines
from gtcpserver.proxy.rules import (
    RuleMatch,
    decide_client,
    decide_destination,
    parse_client_rule,
    parse_destination_rule,
)

PORT = "http_port 127.0.0.1:3128\n"

ACLS = """
acl wide src 10.0.0.0/8
acl narrow src 10.1.0.0/16 192.0.2.0/24
acl net dst 8.8.0.0/16
acl subnet dst 8.8.8.0/24
acl domain dstdomain .example.com
acl host dstdomain www.example.com other.test
acl web port 80 443-500
acl tls port 443
acl anybody proxy_auth REQUIRED
acl ada proxy_auth ada
acl night time 00:00-06:00
"""


@pytest.fixture(autouse=True, scope="module")
def quick_hashes():
    with patch("gtcpserver.proxy.import_draft.hash_password", return_value="$argon2id$"):
        yield


def imported(text, acls=ACLS):
    return import_lines(split_lines((PORT + acls + text).encode(), "squid.conf"), "squid")


def kinds(draft):
    return {kind for kind, _, why in draft.notes if kind != "other" and "reverse name" not in why}


class Asked:
    """A request; `night` is what only squid knows."""

    def __init__(self, client, user, name, ip, port, connect, night=False):
        self.client, self.user, self.name, self.ip, self.port = ip_address(client), user, name, ip_address(ip), port
        self.connect, self.night = connect, night


class Challenge(Exception):
    """squid asks for a password."""


def has(acl, asked):
    def inside(ip, *networks):
        return any(ip in ip_network(one) for one in networks)

    def user():
        if asked.user is None:
            raise Challenge
        return asked.user

    name = asked.name or ""
    return {
        "all": lambda: True,
        "localhost": lambda: inside(asked.client, "127.0.0.0/8"),
        "wide": lambda: inside(asked.client, "10.0.0.0/8"),
        "narrow": lambda: inside(asked.client, "10.1.0.0/16", "192.0.2.0/24"),
        "net": lambda: inside(asked.ip, "8.8.0.0/16"),
        "subnet": lambda: inside(asked.ip, "8.8.8.0/24"),
        "domain": lambda: f".{name}".endswith(".example.com"),
        "host": lambda: name in ("www.example.com", "other.test"),
        "web": lambda: asked.port == 80 or 443 <= asked.port <= 500,
        "tls": lambda: asked.port == 443,
        "CONNECT": lambda: asked.connect,
        "anybody": lambda: bool(user()),
        "ada": lambda: user() == "ada",
        "night": lambda: asked.night,
        "manager": lambda: False,
    }[acl]()


def allowed_by_squid(lines, asked):
    last = "allow"
    try:
        for last, names in lines:
            if all(has(name.removeprefix("!"), asked) is not name.startswith("!") for name in names):
                return last == "allow"
    except Challenge:
        return False
    return bool(lines) and last == "deny"


def allowed_here(draft, asked):
    rules = draft.config.rules
    decision = decide_client(list(map(parse_client_rule, rules.clients)), asked.client, "default")
    if not decision.allowed or (decision.auth is not None and asked.user is None):
        return False
    match = RuleMatch(
        asked.client,
        "default",
        decision.auth,
        asked.user if decision.auth is not None else None,
        asked.port,
        "connect" if asked.connect else "forward",
    )
    return decide_destination(
        list(map(parse_destination_rule, rules.destinations)), match, asked.name, asked.ip
    ).allowed


NAMES = st.sampled_from(
    [
        *("all", "localhost", "wide", "narrow", "net", "subnet", "domain", "host"),
        *("web", "tls", "CONNECT", "anybody", "ada", "night", "manager"),
    ]
)
LINES = st.lists(
    st.tuples(
        st.sampled_from(["allow", "deny"]),
        st.lists(st.builds(str.__add__, st.sampled_from(["", "", "!"]), NAMES), min_size=1, max_size=3),
    ),
    max_size=5,
)
REQUESTS = st.lists(
    st.builds(
        Asked,
        st.sampled_from(["10.1.2.3", "10.2.0.1", "192.0.2.5", "203.0.113.9", "127.0.0.1"]),
        st.sampled_from([None, "ada", "bob"]),
        st.sampled_from([None, "example.com", "www.example.com", "other.test", "third.test"]),
        st.sampled_from(["8.8.8.8", "8.8.4.4", "9.9.9.9"]),
        st.sampled_from([80, 443, 450, 8080]),
        st.booleans(),
        st.booleans(),
    ),
    min_size=5,
    max_size=20,
)


@settings(max_examples=60)
@given(LINES, REQUESTS)
def test_nobody_gets_more_and_what_differs_is_told(lines, requests):
    draft = imported("".join(f"http_access {action} {' '.join(names)}\n" for action, names in lines))
    told = kinds(draft)
    for asked in requests:
        there, here = allowed_by_squid(lines, asked), allowed_here(draft, asked)
        assert there or not here or "more" in told, (draft.config.rules, vars(asked))
        assert here or not there or told, (draft.config.rules, vars(asked))


@pytest.mark.parametrize(
    ("lines", "clients", "destinations"),
    [
        ("", [], []),
        ("http_access allow wide", ["allow from 10.0.0.0/8 to any"], ["allow from 10.0.0.0/8 to any"]),
        # The opposite of the last line.
        ("http_access deny wide", ["deny from 10.0.0.0/8 to any", "allow from any to any"],
         ["deny from 10.0.0.0/8 to any", "allow any"]),
        ("http_access deny !wide\nhttp_access allow all", ["allow from 10.0.0.0/8 to any"],
         ["allow from 10.0.0.0/8 to any"]),
        ("http_access deny CONNECT !tls\nhttp_access allow wide", ["allow from 10.0.0.0/8 to any"],
         ["deny from any command connect to any:1-442,444-65535", "allow from 10.0.0.0/8 to any"]),
        # A list of what is allowed.
        ("http_access deny !domain\nhttp_access allow wide", ["allow from 10.0.0.0/8 to any"],
         ["allow from 10.0.0.0/8 to .example.com"]),
        ("http_access deny !anybody\nhttp_access allow domain\nhttp_access allow ada",
         ["allow from any to any with auth users"],
         ["allow from any via users to .example.com", 'allow from any user "ada" to any']),
        ("http_access allow manager localhost\nhttp_access deny manager\nhttp_access allow localhost",
         ["allow from 127.0.0.1 to any", "allow from ::1 to any"],
         ["allow from 127.0.0.1 to any", "allow from ::1 to any"]),
    ],
)  # fmt: skip
def test_rules(lines, clients, destinations):
    rules = imported(lines).config.rules
    assert (rules.clients, rules.destinations) == (clients, destinations)


def test_a_condition_that_is_missing_here_is_told():
    draft = imported("http_access deny night\nhttp_access allow narrow night\nhttp_access allow wide")
    assert draft.config.rules.destinations == ["allow from 10.0.0.0/8 to any"]
    assert draft.differs == [
        "squid.conf line 14: a restriction is missing: acls of the type time are no conditions of rules here "
        "(http_access deny night)",
        "squid.conf line 15: allows less: acls of the type time are no conditions of rules here "
        "(http_access allow narrow night)",
    ]
    assert "#   squid.conf line 14: http_access deny night\n" in draft.text("squid.conf")


def test_an_acl_may_get_more_values_after_its_use():
    draft = imported("http_access allow wide\nacl wide src 172.16.0.1-172.16.0.2\nacl wide src 192.168.0.0/255.255.0.0")
    assert [rule.split()[2] for rule in draft.config.rules.clients] == [
        "10.0.0.0/8", "172.16.0.1", "172.16.0.2", "192.168.0.0/16",
    ]  # fmt: skip


def test_other_settings(tmp_path):
    listed = tmp_path / "domains"
    listed.write_text("# ours\n.one.test\ntwo.test # the other\n")
    included = tmp_path / "conf.d"
    included.mkdir()
    (included / "a.conf").write_text("via off\nhttp_access allow ours\n")
    draft = imported(
        f"""
        acl ours dstdomain "{listed}"
        include {included}/*.conf
        auth_param basic program /bin/sh /usr/lib/users
        auth_param basic credentialsttl 2 hours
        acl many maxconn 20
        http_access deny many
        http_access deny \\
            all
        cache_peer parent.test parent 3128 0 login=ada:a%20b tls
        never_direct allow all
        forwarded_for delete
        visible_hostname proxy.test
        dns_nameservers 192.0.2.53 2001:db8::53
        connect_timeout 1 minute
        request_body_max_size 10 MB
        tcp_outgoing_address 192.0.2.1
        """
    )
    config = draft.config
    assert config.rules.destinations == ["allow .one.test", "allow two.test"]
    assert config.rules.upstreams == ["through upstream-1 any"]
    assert config.upstream["upstream-1"].url == "https://ada:a%20b@parent.test:3128"
    assert config.limits.client_connections == 20
    assert config.limits.request_body == 10 * 2**20
    assert (config.http.via, config.http.forwarded, config.http.pseudonym) == ("off", "remove", "proxy.test")
    assert config.resolver.servers == ["192.0.2.53", "[2001:db8::53]"]
    assert config.timeouts.connect == 60
    assert config.listener[0].external == "192.0.2.1"
    assert "a%20b" not in draft.text("squid.conf").partition("\n\n")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http_access allow nosuch", "line 14: there is no acl 'nosuch'"),
        ("http_access permit all", "line 14: http_access needs allow or deny"),
        ("acl x src 10.0.0.0/33", "line 14: a host name expected, got '10.0.0.0/33'"),
        ("acl x port 80-70", "line 14: the lower port must come first"),
        ("acl wide dst 1.1.1.1", "line 14: the acl wide was of the type src"),
        ('acl x dstdomain "/nonexistent"', "line 14: cannot read /nonexistent: No such file or directory"),
        ("connect_timeout 1 moon", "line 14: a unit of time expected, got 'moon'"),
        ("http_port 3128x", "line 14: a port must be a number from 1 to 65535, got '3128x'"),
        ("via", "line 14: via needs a value"),
    ],
)
def test_mistakes_are_told_with_their_line(text, said):
    with pytest.raises(ValueError, match="line") as told:
        imported(text)
    assert f"squid.conf {said}" in str(told.value)


def test_a_list_that_would_be_very_long():
    names = [f"user{number}" for number in range(20)]
    lines = "".join(
        f"acl u{number} proxy_auth {' '.join(names[:number] + names[number + 1 :])}\nhttp_access deny wide !u{number}\n"
        for number in range(20)
    )
    with pytest.raises(ValueError, match="this would be more than 5000 rules"):
        imported(lines + "http_access allow all")
