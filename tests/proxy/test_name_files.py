"""resolv.conf, hosts and nsswitch.conf, as glibc reads them; and files that cannot be read."""

import os

import pytest

from gtcpserver.proxy import name_files
from gtcpserver.proxy.name_files import ResolvConf, WatchedFile, parse_hosts, parse_resolv_conf


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("LOCALDOMAIN", raising=False)
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    monkeypatch.setattr("socket.gethostname", lambda: "host.own.test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ResolvConf(search=("own.test",))),
        ("search\n", ResolvConf()),
        ("domain a.test\nsearch b.test c.test\n", ResolvConf(search=("b.test", "c.test"))),
        ("search b.test\ndomain a.test\n", ResolvConf(search=("a.test",))),
        ("search . Foo.TEST. .bar.test bad..x 'x\n", ResolvConf(search=("", "foo.test", "bar.test"))),
        (
            "# nameserver 192.0.2.9\n; x\nnameserver 192.0.2.1\n nameserver ::1 comment\nnameserver x.test\nsearch\n",
            ResolvConf(servers=(("192.0.2.1", 53), ("::1", 53, 0, 0))),
        ),
        (
            f"nameserver a..b\nnameserver \ufffd\nnameserver {'9' * 64}\nnameserver 192.0.2.1\nsearch\n",
            ResolvConf(servers=(("192.0.2.1", 53),)),
        ),
        (
            "nameserver 192.0.2.1\n" * 9 + "search\nnameserver\nnonsense\n",
            ResolvConf(servers=(("192.0.2.1", 53),) * 3),
        ),
        (
            "search\noptions ndots:3 timeout:4 attempts:2 use-vc edns0 rotate\n",
            ResolvConf(ndots=3, timeout=4, attempts=2, by_tcp=True),
        ),
        (
            "search\noptions ndots:99 timeout:0 attempts:99\noptions ndots: timeout:x attempts:-1\n",
            ResolvConf(ndots=15, timeout=1, attempts=5),
        ),
        (
            "search " + " ".join(f"d{number}" for number in range(99)),
            ResolvConf(search=tuple(f"d{n}" for n in range(32))),
        ),
    ],
)
def test_resolv_conf(text, expected):
    assert parse_resolv_conf(text) == expected


def test_the_environment_prevails(monkeypatch):
    monkeypatch.setenv("LOCALDOMAIN", "x.test y.test")
    monkeypatch.setenv("RES_OPTIONS", "ndots:4")
    found = parse_resolv_conf("search a.test\noptions ndots:2\n")
    assert (found.search, found.ndots) == (("x.test", "y.test"), 4)


def test_candidates():
    conf = ResolvConf(search=("a.test", "", "a.test"), ndots=1)
    assert conf.candidates("x") == ["x.a.test", "x"]
    assert conf.candidates("x.y") == ["x.y", "x.y.a.test"]
    assert conf.candidates("x.") == ["x"]
    long = ".".join(["x" * 62] * 4)
    assert conf.candidates(long) == [long]  # below a.test it would be too long


def test_hosts_without_what_is_invalid():
    assert list(parse_hosts("::ffff:192.0.2.1 A a. #b\n192.0.2.256 c\nd\n\n#\n")) == ["a"]


def test_a_file_that_cannot_be_read_now_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(name_files, "CHECK_EVERY", 0.0)
    path = tmp_path / "file"
    parsed = []
    file = WatchedFile(str(path), lambda text: parsed.append(text) or text)
    assert file.read() == ""
    path.write_text("one")
    assert file.read() == file.read() == "one"
    path.write_text("two")

    def refuse(*_args, **_options):
        raise OSError(24, os.strerror(24))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        assert file.read() == "one"
    assert file.read() == "two"
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", refuse)
        assert file.read() == "two"
    path.unlink()
    assert file.read() == file.read() == ""
    assert parsed == ["", "one", "two", ""]
