"""gtcpserver proxy import: what it prints, its exit status, and any text as its input."""

import os
from contextlib import ExitStack
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver.cli import commands
from gtcpserver.cli.proxy import proxy
from gtcpserver.errors import ConfigError
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.import_draft import split_lines
from gtcpserver.proxy.import_files import PROGRAMS, import_lines, program_of
from kit.proxying import QUICK

#: Where Debian's packages put theirs.
SHIPPED = {
    "/etc/danted.conf": 3,  # it has no address to listen on
    "/etc/tinyproxy/tinyproxy.conf": 0,
    "/etc/squid/squid.conf": 0,
    "/etc/3proxy/3proxy.cfg": None,
}

FILES = {
    "danted.conf": "internal: 127.0.0.1 port = 1080\nclient pass { from: 10.0.0.0/8 to: 0/0 }\nsocksmethod: none\n"
    "socks pass { from: 0/0 to: 0/0 }\n",
    "3proxy.cfg": "users ada:CL:secret\nauth strong\nallow ada\nsocks -i127.0.0.1\n",
    "squid.conf": "http_port 127.0.0.1:3128\nacl lan src 10.0.0.0/8\nhttp_access allow lan\nhttp_access deny all\n",
    "tinyproxy.conf": "Port 8888\nAllow 10.0.0.0/8\nBasicAuth ada secret\n",
}


@pytest.fixture
def run(capsys):
    """`run(*arguments)`: the exit status of the command, its output, and what it complains of."""

    def command(*arguments):
        status = commands.run(["proxy", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


@pytest.mark.parametrize("name", FILES)
def test_the_output_can_be_used(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name])
    done = CliRunner().invoke(proxy, ["import", str(path)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "secret" not in done.stdout
    (tmp_path / "proxy.toml").write_text(done.stdout)
    checked = CliRunner().invoke(proxy, ["check", str(tmp_path / "proxy.toml")])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("path", SHIPPED)
def test_what_debian_ships(path):
    if not os.path.exists(path):
        pytest.skip(f"needs {path}")
    done = CliRunner().invoke(proxy, ["import", path])
    assert done.exit_code in (0, 3), done.output
    make_proxy(parse_config(done.stdout)).handler.server_stopped()
    with open(path) as file:
        is_as_shipped = "This is the default" in file.read() or path == "/etc/danted.conf"
    if is_as_shipped and SHIPPED[path] is not None:
        assert done.exit_code == SHIPPED[path], done.stderr


def test_differences_are_on_standard_error_and_in_the_exit_status(run, tmp_path):
    path = tmp_path / "tinyproxy.conf"
    path.write_text("Port 8888\nAllow 10.0.0.0/8\nDeny .bad.test\nPidFile /x\n")
    status, output, complaints = run("import", str(path))
    said = "clients are not known by names here"
    assert status == 3
    assert complaints == f"gtcpserver: {path} line 3: a restriction is missing: {said} (Deny .bad.test)\n"
    assert f"#   {path} line 3: Deny .bad.test\n#     {said}\n" in output
    assert f"#   {path} line 4: PidFile /x\n#     the option --pid-file\n" in output
    make_proxy(parse_config(output)).handler.server_stopped()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "proxy.conf",
            "",
            "--from: must be one of danted, 3proxy, squid, tinyproxy: the name of the file does not say",
        ),
        ("squid.conf", None, "cannot read {}: No such file or directory"),
        ("squid.conf", "http_access allow x", "{} line 1: there is no acl 'x'"),
    ],
)
def test_mistakes(run, name, text, said, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert run("import", str(path)) == (2, "", f"gtcpserver: {said.format(path)}\n")


def test_the_name_of_a_file_says_whose_it_is():
    names = ["sockd.conf", "/etc/dante.conf", "/a/3proxy.cfg", "squid/squid.conf", "Tinyproxy.CONF", "tinyproxy/x.conf"]
    assert [program_of(name) for name in names] == ["danted", "danted", "3proxy", "squid", "tinyproxy", None]


def test_no_text_of_the_original_leaves_its_comment(tmp_path):
    path = tmp_path / "squid.conf"
    path.write_bytes(b"cache_dir x\x1b[2J\x7f\ty \xe2\x80\xa8[rules]\n# \xff\xfe in any encoding\nhttp_port 3128\n")
    done = CliRunner().invoke(proxy, ["import", str(path)])
    assert done.exit_code == 0, done.output
    assert "line 1: cache_dir x\\x1b[2J\\x7f y [rules]\n" in done.stdout
    path.write_bytes(b"http_port 3128\nvisible_hostname \xff\n")
    done = CliRunner().invoke(proxy, ["import", str(path)])
    assert str(done.exception).endswith("squid.conf line 2: must be UTF-8")


WORDS = """
    internal: external: client socks pass block { } from: to: 0/0 10.0.0.0/8 port = 80 - command: bind user: ada lo
    route via: socksmethod: username none ::1 2001:db8::/32 .example.com
    allow deny auth iponly strong users ada:CL:x proxy socks flush parent 1000 socks5 192.0.2.1 1080 * 80-90 HTTP -p81
    nsrecord 0.0.0.0 *.x.test *y $ "" "
    acl a b src dst dstdomain port proxy_auth REQUIRED http_access !a !b all CONNECT http_port 3128 cache_peer x
    parent 0 http_access allow deny manager maxconn include 1.1.1.1-1.1.1.9 \\ #
    Port 8888 Listen Allow Deny ConnectPort Upstream http none . BasicAuth Filter Bind BindSame yes Timeout 0
"""
TEXTS = st.lists(
    st.lists(st.sampled_from(WORDS.split()) | st.text(max_size=6), max_size=7).map(" ".join), max_size=9
).map("\n".join)

#: Without which a file has mistakes.
HEADS = {"3proxy": "socks -p9\n", "tinyproxy": "Port 1\n", "squid": "acl a src 10.1.1.1\nacl b port 81\n", "danted": ""}


@pytest.fixture(scope="module")
def no_files():
    """No hash takes long, and no file is read."""
    with ExitStack() as stack:
        for module in ("draft", "threeproxy", "tinyproxy"):
            stack.enter_context(patch(f"gtcpserver.proxy.import_{module}.hash_password", return_value=QUICK))
        stack.enter_context(patch("gtcpserver.proxy.import_files.read_lines", return_value=[]))
        yield


def outcome(program, data):
    """Import bytes, and load what it becomes; return the mistake, or None."""
    try:
        draft = import_lines(split_lines(data, "file"), program)
    except ConfigError as error:
        return str(error)
    make_proxy(parse_config(draft.text("file"))).handler.server_stopped()
    return None


@settings(max_examples=40)
@given(st.sampled_from(PROGRAMS), TEXTS)
def test_any_text_is_a_mistake_or_a_file_that_loads(no_files, program, text):
    for data in (text, HEADS[program] + text):
        mistake = outcome(program, data.encode())
        assert mistake is None or mistake.startswith("file line ")


@settings(max_examples=40)
@given(st.sampled_from(PROGRAMS), st.binary(max_size=60))
def test_so_are_any_bytes(no_files, program, data):
    mistake = outcome(program, HEADS[program].encode() + data)
    assert mistake is None or mistake.startswith("file line ")
