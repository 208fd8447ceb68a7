"""danted.conf, 3proxy.cfg and tinyproxy.conf as configurations of ours."""

import pytest

from gtcpserver.proxy.import_draft import split_lines
from gtcpserver.proxy.import_files import import_lines

DANTED = """
internal: 127.0.0.1 port = 1080
socksmethod: none
client pass { from: 10.0.0.0/8 to: 0.0.0.0/0 }
"""


@pytest.fixture(autouse=True)
def quick_hashes(monkeypatch):
    for module in ("draft", "threeproxy", "tinyproxy"):
        monkeypatch.setattr(f"gtcpserver.proxy.import_{module}.hash_password", lambda password: f"#{len(password)}")


def imported(program, text):
    return import_lines(split_lines(text.encode(), "file"), program)


def rules(draft):
    return draft.config.rules.clients, draft.config.rules.destinations


def told(draft, kind):
    return [(line.number, why) for one, line, why in draft.notes if one == kind]


# -- danted ------------------------------------------------------------------------------------------------------------


def test_danted_has_two_lists():
    draft = imported(
        "danted",
        """
        logoutput: stderr
        internal: 192.0.2.1 port = 1080
        internal: 2001:db8::1 port = socks
        external: 192.0.2.9
        socksmethod: none
        timeout.io: 3600
        client block { from: 10.1.0.0/16 to: 0/0 log: connect }
        client pass {
            from: 10.0.0.0/8 port 1-65535 to: 0.0.0.0/0  # ours
        }
        client pass { from: 2001:db8::/32 to:0/0 }
        socks block { from: 0/0 to: lo log: connect }
        socks block { from: 0/0 to: 0/0 port le 1023 command: bind log: connect }
        socks pass
        {
            from: 10.0.0.0/8 to: .example.com port = http
            protocol: tcp
        }
        socks pass { from: 0/0 to: 2600::/16 port ge 1024 command: connect udpassociate }
        socks pass { from: 0/0 to: 0/0 command: bindreply udpreply }
        """,
    )
    assert rules(draft) == (
        [
            "deny from 10.1.0.0/16 to any",
            "allow from 10.0.0.0/8 to any",
            "deny from 10.0.0.0/8 to any",
            "allow from 2001:db8::/32 to any",
        ],
        [
            "deny from 10.1.0.0/16 to any",
            "deny from 10.0.0.0/8 to 127.0.0.0/8",
            "deny from 10.0.0.0/8 to [::1]",
            "deny from 10.0.0.0/8 command bind to any:1-1023",
            "allow from 10.0.0.0/8 command connect,bind to .example.com:80",
            "allow from 10.0.0.0/8 command connect,udp to [2600::/16]:1024-65535",
            "deny from 10.0.0.0/8 to any",
            "deny from 2001:db8::/32 to 127.0.0.0/8",
            "deny from 2001:db8::/32 to [::1]",
            "deny from 2001:db8::/32 command bind to any:1-1023",
            "allow from 2001:db8::/32 command connect,udp to [2600::/16]:1024-65535",
        ],
    )
    assert [listener.listen for listener in draft.config.listener] == ["192.0.2.1:1080", "[2001:db8::1]:1080"]
    assert draft.config.listener[0].speaks == "socks"
    assert draft.config.listener[0].external == ["192.0.2.9"]
    assert draft.config.timeouts.idle == 3600
    assert draft.differs == []


def test_a_client_rule_is_about_clients_alone():
    draft = imported("danted", f"{DANTED}client block {{ from: 10.1.0.0/16 port 1-1023 to: 0/0 }}")
    assert told(draft, "more") == [(5, "the port of a client is no condition of rules")]
    draft = imported("danted", f"{DANTED}client pass {{ from: .example.com to: 0/0 }}")
    assert told(draft, "less") == [(5, "a client is known by its address, not by a name or an interface")]


@pytest.mark.parametrize(
    ("rule", "kind", "said"),
    [
        ("socks block { from: 0/0 to: 0/0 group: staff }", "more", "group is no condition of rules"),
        ("socks pass { from: 0/0 to: 0/0 group: staff }", "less", "group is no condition of rules"),
        ("socks pass { from: 0/0 to: eth0 }", "less", "addresses of an interface (eth0) are no condition of rules"),
        ("socks block { from: 0/0 to: bad.test }", "more", "danted also compares the addresses of this name"),
        ("socks block { from: 0/0 to: 0/0 command: bindreply }", "more", "replies to BIND and UDP ASSOCIATE"),
        ("socks pass { from: 0/0 to: 0/0 session.max: 5 }", "more", "limits are for all clients"),
        ("socks pass { from: 0/0 to: 0/0 proxyprotocol: socks_v5 }", "less", "the version of SOCKS"),
        ("socks pass { from: 0/0 to: 0/0 socksmethod: gssapi }", "less", "not by gssapi"),
        ("hostid block { from: 0/0 to: 0/0 }", "more", "there are no host identities"),
        ("libwrap.hosts_access: yes", "more", "hosts.allow and hosts.deny are not read"),
        ("srchost: nodnsunknown", "more", "names of clients are not looked up"),
        ("somethingnew: yes", "more", "this setting is not known"),
        ("internal: eth0 port = 1081", "less", "give listen an address of eth0"),
    ],
)
def test_what_danted_has_alone_is_told(rule, kind, said):
    draft = imported("danted", f"{DANTED}{rule}\n")
    assert any(line == 5 and said in why for line, why in told(draft, kind)), draft.notes
    assert draft.differs


def test_passwords_of_danted_are_those_of_the_system():
    draft = imported("danted", DANTED.replace("none", "username") + "socks pass { from: 0/0 to: 0/0 user: ada }")
    assert draft.config.rules.clients == ["allow from 10.0.0.0/8 to any with auth users"]
    assert draft.config.rules.destinations == ['allow from 10.0.0.0/8 user "ada" to any']
    assert list(draft.config.auth["users"].users) == ["replace-this-user"]
    assert told(draft, "less") == [(5, "the users are not in this file: add them to [auth.users]")]


def test_without_a_method_danted_serves_nobody():
    draft = imported("danted", DANTED.replace("socksmethod: none", "") + "socks pass { from: 0/0 to: 0/0 }")
    assert rules(draft) == ([], [])


def test_routes_of_danted():
    draft = imported(
        "danted",
        DANTED
        + """
        socks pass { from: 0/0 to: 0/0 }
        route { from: 10.0.0.0/8 to: .corp.test port = http via: direct }
        route { from: 0/0 to: 0/0 via: socks.example port = 1081 proxyprotocol: socks_v4 command: connect }
        """,
    )
    assert draft.config.rules.upstreams == [
        "through direct from 10.0.0.0/8 to .corp.test:80",
        "through upstream-2 from any to any",
    ]
    assert draft.config.upstream["upstream-2"].url == "socks4://socks.example:1081"


# -- 3proxy ------------------------------------------------------------------------------------------------------------


def test_a_service_of_3proxy_has_what_was_said_before():
    draft = imported(
        "3proxy",
        """\
nserver 192.0.2.53:5353
nsrecord bad.test 0.0.0.0
users ada:CL:secret "eve:CR:$2y$05$abc""d"
auth iponly
internal 192.0.2.1
deny * * 8.8.8.8
allow * 10.0.0.0/8,192.168.0.1-192.168.0.2 * 80-88,443 HTTP
allow * 10.0.0.0/8 * 443 HTTPS
proxy -p8080 -n
flush
auth strong
allow ada * *.one.test,two.test
allow * 10.0.0.0/8 * * CONNECT,UDPASSOC
socks -i127.0.0.1
flush
auth none
auto -p1
""",
    )
    assert rules(draft) == (
        [
            "allow from 10.0.0.0/8 to proxy",
            "allow from 192.168.0.1 to proxy",
            "allow from 192.168.0.2 to proxy",
            "deny from any to proxy",
            "allow from any to socks with auth users",
            "allow from 10.0.0.0/8 to socks with auth users",
            "deny from any to socks",
            "allow from any to auto",
        ],
        [
            "deny bad.test",
            "deny from any via proxy to 8.8.8.8",
            "allow from 10.0.0.0/8 via proxy command forward to any:80-88,443",
            "allow from 192.168.0.1 via proxy command forward to any:80-88,443",
            "allow from 192.168.0.2 via proxy command forward to any:80-88,443",
            "allow from 10.0.0.0/8 via proxy command connect to any:443",
            "deny from any via proxy to any",
            'deny from any user "ada" via socks to one.test',
            'allow from any user "ada" via socks to .one.test',
            'allow from any user "ada" via socks to two.test',
            "allow from 10.0.0.0/8 via socks command connect,udp to any",
            "deny from any via socks to any",
            "allow from any via auto to any",
        ],
    )
    assert draft.config.allow_open
    assert draft.config.auth["users"].users == {"ada": "#6", "eve": '$2y$05$abc"d'}
    listeners = [(listener.name, listener.listen, listener.speaks) for listener in draft.config.listener]
    assert listeners == [
        ("proxy", "192.0.2.1:8080", "http"),
        ("socks", "127.0.0.1:1080", "socks"),
        ("auto", "192.0.2.1:1", "mixed"),
    ]
    assert draft.config.resolver.servers == ["192.0.2.53:5353"]
    assert draft.differs == []


def test_an_empty_list_of_3proxy_allows_all_users():
    draft = imported("3proxy", "users ada:CL:secret\nauth strong\nsocks\n")
    assert rules(draft) == (["allow from any to socks with auth users"], ["allow from any via socks to any"])


def test_parents_of_3proxy():
    draft = imported(
        "3proxy",
        """\
auth iponly
allow * * .direct.test
allow * * * 80
parent 1000 http 192.0.2.7 3128 ada secret
allow *
parent 1000 socks5+ 192.0.2.8 1080
parent 500 connect 192.0.2.9 3128
parent 500 socks4+ 192.0.2.10 1080
socks
""",
    )
    assert draft.config.rules.upstreams == [
        "through direct from any via socks to .direct.test",
        "through upstream-1 from any via socks to any:80",
        "through group-5 from any via socks to any",
    ]
    upstreams = draft.config.upstream
    assert upstreams["upstream-1"].url == "http://ada:secret@192.0.2.7:3128"
    assert (upstreams["upstream-2"].url, upstreams["upstream-2"].resolve) == ("socks5://192.0.2.8:1080", "there")
    assert upstreams["upstream-4"].url == "socks4a://192.0.2.10:1080"
    assert upstreams["upstream-4"].through == "upstream-2"
    assert upstreams["group-5"].members == ["upstream-3", "upstream-4"]


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("deny * * * * * 1-5", "more", "times are no conditions of rules"),
        ("allow * * * * * 1-5", "less", "times are no conditions of rules"),
        ("deny * * * * HTTP_POST", "more", "methods of HTTP are no conditions"),
        ("deny * * *bad*", "more", "names have no patterns"),
        ("deny * * *bad.test", "more", "other names that end so are not meant"),
        ("bandlimin 57600 * 192.168.10.16", "more", "limit bytes a second"),
        ("countin 1 D 100 *", "more", "amounts of traffic are not limited"),
        ("connlim 10 60", "more", "limits.new_per_second"),
        ("auth dnsname", "more", "names of clients are not looked up"),
        ("users ada:NT:00", "less", "needs a password that is hashed"),
        ("pop3p", "less", "there is no pop3p"),
        ("plugin x y", "more", "there are no plugins"),
        ("somethingnew", "more", "this command is not known"),
    ],
)
def test_what_3proxy_has_alone_is_told(line, kind, said):
    draft = imported("3proxy", f"auth iponly\n{line}\nallow *\nproxy\n")
    assert any(number == 2 and said in why for number, why in told(draft, kind)), draft.notes


# -- tinyproxy ---------------------------------------------------------------------------------------------------------


def test_tinyproxy():
    draft = imported(
        "tinyproxy",
        """
        User nobody
        port 8888
        Listen 192.0.2.1
        Listen ::1
        Bind 192.0.2.9
        Timeout 600
        MaxClients 100
        Deny 10.1.0.0/16
        Allow 10.0.0.1/255.0.0.0
        ConnectPort 443
        ConnectPort 563
        DisableViaHeader Yes
        ViaProxyName "proxy.test"
        Upstream http ada:secret@proxy.test:3128
        Upstream socks5 192.0.2.7:1080 ".corp.test"
        Upstream none "192.168.0.0/16"
        """,
    )
    assert rules(draft) == (
        ["deny from 10.1.0.0/16 to any", "allow from 10.0.0.0/8 to any"],
        [
            "deny from any command connect to any:1-442,444-562,564-65535",
            "deny from 10.1.0.0/16 to any",
            "allow from 10.0.0.0/8 to any",
        ],
    )
    config = draft.config
    # The last one that matches decides there.
    assert config.rules.upstreams == [
        "through direct 192.168.0.0/16",
        "through upstream-2 .corp.test",
        "through upstream-1 any",
    ]
    assert config.upstream["upstream-1"].url == "http://ada:secret@proxy.test:3128"
    assert [listener.listen for listener in config.listener] == ["192.0.2.1:8888", "[::1]:8888"]
    assert config.listener[0].external == ["192.0.2.9"]
    assert (config.http.via, config.http.pseudonym) == ("off", "proxy.test")
    assert (config.limits.connections, config.timeouts.idle) == (100, 600)
    assert draft.differs == []


@pytest.mark.parametrize(
    ("text", "clients", "destinations"),
    [
        ("", ["allow from any to any"], ["allow any"]),
        ("BasicAuth ada secret", ["allow from any to any with auth users"], ["allow from any via users to any"]),
        ("Allow .corp.test", [], []),
        ("Deny .corp.test", [], []),
        (
            "Allow ::1\nConnectPort 0",
            ["allow from ::1 to any"],
            ["deny from any command connect to any", "allow from ::1 to any"],
        ),
        ("Allow ::1\nFilter /x\nFilterDefaultDeny Yes", [], []),
        ("Allow ::1\nReverseOnly Yes", [], []),
    ],
)
def test_rules_of_tinyproxy(text, clients, destinations):
    draft = imported("tinyproxy", f"Port 8888\n{text}")
    assert rules(draft) == (clients, destinations)
    assert draft.config.allow_open is (clients == ["allow from any to any"])


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("Filter /etc/tinyproxy/filter", "more", "rules have names and .domains, no patterns"),
        ("Deny .example.com", "more", "clients are not known by names"),
        ('Anonymous "Host"', "more", "other header fields than these are not removed"),
        ('Upstream none "."', "more", "names without a dot"),
        ("Somethingnew yes", "more", "this directive is not known"),
        ('AddHeader "X-My-Header" "x"', "other", ""),
    ],
)
def test_what_tinyproxy_has_alone_is_told(line, kind, said):
    draft = imported("tinyproxy", f"Port 8888\n{line}")
    assert any(number == 2 and said in why for number, why in told(draft, kind)), draft.notes


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "text", "said"),
    [
        ("danted", "socks pass {\n from: 0/0", "file line 1: this rule has no closing brace"),
        ("danted", "socks permit { from: 0/0 }", "file line 1: a rule expected before the brace, got 'socks permit'"),
        ("danted", "\n}", "file line 2: a closing brace without an opening one"),
        ("danted", "hello", "file line 1: a setting or a rule expected, got 'hello'"),
        ("danted", "internal: 1.2.3.4 port = nosuch", "file line 1: a port expected, got 'nosuch'"),
        ("danted", "\nsocks block { from: 0/0 to: 0/0 command: fly }", "file line 2: there is no command 'fly'"),
        ("danted", "route { from: 0/0 to: 0/0 }", "file line 1: a route needs via"),
        ("3proxy", "allow *", "file line 1: there is no proxy and no socks: is this a 3proxy.cfg?"),
        ("3proxy", "auth iponly\nallow * x\nsocks", "file line 2: an address, a range or a network expected, got 'x'"),
        ("3proxy", "deny *\nparent 1000 http 1.1.1.1 80", "file line 2: parent must follow allow"),
        ("3proxy", "socks\nsocks", "file line 2: two services must not have the same address, got *:1080 twice"),
        ("3proxy", 'users a"b', "file line 1: a quote without its partner"),
        ("3proxy", "users $/nonexistent", "file line 1: cannot read /nonexistent: No such file or directory"),
        ("tinyproxy", "Allow 127.0.0.1", "file line 1: there is no Port: is this a tinyproxy.conf?"),
        ("tinyproxy", "Port 0", "file line 1: Port must be a number from 1 to 65535, got '0'"),
        ("tinyproxy", "Allow", "file line 1: Allow needs a value"),
        ("tinyproxy", "Allow 1.2.3.4/99", "file line 1: a host name expected, got '1.2.3.4/99'"),
        ("tinyproxy", 'Port "8888', "file line 1: a quote without its partner"),
        ("tinyproxy", "BasicAuth ada", "file line 1: BasicAuth needs a user and a password"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(program, text, said):
    with pytest.raises(ValueError, match="line") as raised:
        imported(program, text)
    assert said in str(raised.value)
