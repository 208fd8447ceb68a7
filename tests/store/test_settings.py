"""URLs of stores: each is understood, or refused with what was expected, and without the password."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import ConfigError
from gtcpserver.store import settings
from gtcpserver.store.settings import StoreSettings

pytest.importorskip("redis")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://a", {"hosts": (("a", 6379),), "db": 0, "tls": False, "password": None, "prefix": "gtcpserver"}),
        ("redis://a:1/2", {"hosts": (("a", 1),), "db": 2}),
        ("redis://[::1]:1", {"hosts": (("::1", 1),)}),
        ("redis://:p%40w@a", {"username": None, "password": "p@w"}),
        ("redis://u:p:w@a", {"username": "u", "password": "p:w"}),
        ("rediss://a?ssl_ca_certs=/x&prefix=mail", {"tls": True, "prefix": "mail"}),
        ("unix:///run/redis.sock?db=3", {"path": "/run/redis.sock", "db": 3, "hosts": ()}),
        ("redis+sentinel://a,b:2/main/4", {"hosts": (("a", 26379), ("b", 2)), "service": "main", "db": 4}),
        ("rediss+sentinel://u:p@a/main", {"tls": True, "service": "main", "username": "u"}),
    ],
)
def test_urls(url, expected):
    made = StoreSettings(url=url)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost", "a URL that begins with one of redis://"),
        ("http://a", "a URL that begins with one of redis://"),
        ("redis://", "a URL with a host"),
        ("redis://a:0", "a port of 1 to 65535"),
        ("redis://a:b", "a port of 1 to 65535"),
        ("redis://[::1", "a URL"),
        ("redis://a,b", "one host"),
        ("redis://a/x", "a number"),
        ("redis://a/1/2", "ends with the number of a database"),
        ("redis://a?db=x", "a number"),
        ("redis://a?timeout=1", "options among"),
        ("redis://a?ssl_cert_reqs=no", "required or none"),
        ("redis://:secret#@a", "%23"),
        ("redis+sentinel://a", "the name of the service"),
        ("unix://x/y", "unix:///path"),
        (5, "a URL, such as"),
    ],
)
def test_mistakes(url, told):
    with pytest.raises(ConfigError, match=r"^shared_limits must be") as raised:
        StoreSettings(url=url)
    assert told in str(raised.value)
    assert "secret" not in str(raised.value)


@given(st.one_of(st.text(), st.from_regex(r"(redis|rediss|unix|redis\+sentinel)://.*", fullmatch=True)))
def test_any_text_is_understood_or_refused(text):
    with suppress(ConfigError):
        StoreSettings(url=text)


def test_the_password_is_not_shown():
    made = StoreSettings(url="redis://user:secret@a:1?sentinel_password=secret")
    assert "secret" not in f"{made} {made!r}"
    assert str(made) == "a:1"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"shared_limits needs the package redis: pip install 'gtcpserver\[redis\]'"):
        StoreSettings(url="redis://a")
