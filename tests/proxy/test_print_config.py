"""gtcpserver proxy --print-config: command-line options as a file."""

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.cli.proxy import OF_THE_PROXY, _from_options, _with_secrets, proxy
from gtcpserver.errors import ConfigError
from gtcpserver.files.toml_file import parse_text
from gtcpserver.proxy.config import parse_config
from gtcpserver.proxy.config_text import config_text
from gtcpserver.proxy.settings import ProxyConfig
from kit.proxying import QUICK


def printed(*arguments, **variables):
    done = CliRunner().invoke(proxy, ["--print-config", *arguments], env=variables)
    return done.exit_code, done.output


def same(left, right):
    """Whether two configurations mean the same; passwords are hashed with another salt each time."""
    left, right = (msgspec.to_builtins(one) for one in (left, right))
    for one in (left, right):
        for table in one["auth"].values():
            table["users"] = list(table["users"])
    return left == right


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socks", "127.0.0.1:1081", "--http", "[::1]:1082", "--http", "unix:/run/a b.sock"],
        ["--user", "ada:secret", "--user", 'eve "x" \\:pw', "--mixed", "0.0.0.0:1080", "--allow-client", "10.0.0.0/8"],
        ["--allow-destination", ".example.com:443", "--deny-destination", "private", "--allow-command", "connect"],
        ["--upstream", "socks5://ada:p%22w@proxy.example:1080", "--external", "192.0.2.1"],
        ["--udp-advertise", "192.0.2.1", "--udp-advertise", "::7", "--udp-ports", "1024-65535", "--udp-full-cone"],
        ["--redact", "--access-log", "json", "--allow-open", "--mixed", "0.0.0.0:1080"],
    ],
)
def test_the_file_does_what_the_options_say(arguments):
    status, text = printed(*arguments)
    assert status == 0, text
    meant = _from_options(_with_secrets(proxy.make_context("proxy", list(arguments)).params))
    found = parse_config(text)
    # Written out.
    meant.rules.clients, meant.rules.destinations = list(meant.rules.client_rules), list(meant.rules.destination_rules)
    assert same(found, meant)
    assert "secret" not in text


def test_without_options_it_is_the_beginning_of_a_file():
    assert printed() == (
        0,
        '[[listener]]\nname = "default"\nlisten = "127.0.0.1:1080"\nspeaks = "mixed"\n\n'
        '[rules]\nclients = ["allow 127.0.0.0/8", "allow ::1"]\ndestinations = ["allow any"]\n',
    )


#: For each option of the proxy's own: arguments in which it matters.
OWN = {
    "mixed": ["--mixed", "127.0.0.1:1"],
    "socks": ["--socks", "127.0.0.1:1"],
    "http": ["--http", "127.0.0.1:1"],
    "intercept": ["--intercept", "127.0.0.1:1"],
    "users": ["--user", "ada:secret"],
    "user_file": ["--user-file", "users"],
    "htpasswd": ["--htpasswd", "htpasswd"],
    "allow_client": ["--allow-client", "10.0.0.0/8"],
    "allow_destination": ["--allow-destination", "192.0.2.0/24"],
    "deny_destination": ["--deny-destination", ".example.com"],
    "allow_command": ["--allow-command", "udp"],
    "allow_open": ["--allow-open"],
    "upstream": ["--upstream", "socks5://192.0.2.1:1080"],
    "upstream_file": ["--upstream-file", "upstream"],
    "external": ["--external", "192.0.2.1"],
    "udp_advertise": ["--udp-advertise", "192.0.2.1"],
    "udp_ports": ["--udp-ports", "40000-40100"],
    "udp_full_cone": ["--udp-full-cone"],
    "redact": ["--redact"],
    "access_log_style": ["--access-log", "json"],
}

#: Some of every server's, as on a command line.
SERVERS = {"pool": ["--pool", "33"], "workers": ["--workers", "2"], "metrics": ["--metrics", "9100"]}


@pytest.mark.parametrize("name", OWN)
def test_each_option_is_in_the_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in {"users": "eve:pw\n", "htpasswd": f"ada:{QUICK}\n", "upstream": "http://192.0.2.1:80\n"}.items():
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(0o600)
    status, text = printed(*OWN[name])
    assert status == 0, text
    assert "stay on the command line" not in text
    meant = _from_options(_with_secrets(proxy.make_context("proxy", list(OWN[name])).params))
    meant.rules.clients, meant.rules.destinations = list(meant.rules.client_rules), list(meant.rules.destination_rules)
    assert same(parse_config(text), meant)
    assert text != printed()[1]


@pytest.mark.parametrize("name", OWN)
def test_each_variable_is_in_the_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in {"users": "eve:pw\n", "htpasswd": f"ada:{QUICK}\n", "upstream": "http://192.0.2.1:80\n"}.items():
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(0o600)
    (variable,) = (one.envvar for one in proxy.params if one.name == name)
    status, text = printed(**{variable: (OWN[name][1:] or ["yes"])[0]})
    assert status == 0, text
    assert f"# These variables are in this file: take them out of the environment: {variable}\n" in text
    meant = _from_options(_with_secrets(proxy.make_context("proxy", list(OWN[name])).params))
    meant.rules.clients, meant.rules.destinations = list(meant.rules.client_rules), list(meant.rules.destination_rules)
    assert same(parse_config(text), meant)


def test_variables_of_every_server_stay_in_the_environment():
    status, text = printed("--workers", "2", GTCPSERVER_POOL="33", GTCPSERVER_METRICS="9100")
    assert status == 0, text
    assert text.startswith(
        "# These options stay on the command line, beside --config: --workers\n\n"
        "# These variables stay in the environment: GTCPSERVER_METRICS, GTCPSERVER_POOL\n\n"
    )


def test_each_option_is_either_in_the_file_or_named():
    names = {one.name for one in proxy.params} - {"config", "print_config"}
    of_the_server = names - set(OWN)
    assert set(OWN) <= names
    assert of_the_server.isdisjoint(OF_THE_PROXY)
    assert {"pool", "workers", "metrics", "user"} <= of_the_server
    status, text = printed("--redact", *(word for words in SERVERS.values() for word in words))
    assert status == 0, text
    assert text.startswith(
        "# These options stay on the command line, beside --config: --metrics, --pool, --workers\n\n"
    )
    parse_config(text)


def test_a_password_is_pointed_out():
    assert printed("--upstream", "http://ada:pw@proxy.test:80")[1].startswith("# It contains a password")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "x.toml"], "--print-config: cannot be used together with --config"),
        (["--allow-client", "nowhere"], "nowhere"),
        (["--udp-advertise", "proxy.example"], "--udp-advertise: must be an address that clients reach"),
        (["--udp-ports", "50000"], "--udp-ports: must be a range of ports such as"),
        (["--mixed", "0.0.0.0:1080", "--allow-client", "0.0.0.0/0"], "opens the proxy"),
    ],
)
def test_mistakes(arguments, said):
    done = CliRunner().invoke(proxy, ["--print-config", *arguments])
    assert done.exit_code == 2 or isinstance(done.exception, ConfigError)  # which the program reports with status 2
    assert said in done.output + str(done.exception)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    names=st.dictionaries(st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True), TEXTS, max_size=3),
    rules=st.lists(TEXTS, max_size=3) | st.none(),
    seconds=st.floats(0.1, 1e9) | st.none(),
    style=st.sampled_from(["text", "json"]),
    file=TEXTS | st.none(),
)
def test_any_text_is_read_as_it_was_written(names, rules, seconds, style, file):
    given_ = {
        "auth": {name: {"users": {text or "x": "hash"}, "command": [text, text]} for name, text in names.items()},
        "rules": {"destinations": rules},
        "timeouts": {"idle": seconds},
        "log": {"style": style, "file": file},
    }
    config = msgspec.convert(given_, ProxyConfig)
    again = msgspec.convert(parse_text(config_text(config), "text"), ProxyConfig, strict=True)
    assert again.auth == config.auth
    assert again.log == config.log
    assert again.timeouts == config.timeouts
    assert again.rules.destination_rules == list(config.rules.destination_rules)
