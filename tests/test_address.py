"""Reading and printing endpoints."""

import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gtcpserver.address import Address, format_sockaddr, parse_address
from gtcpserver.errors import ConfigError


@pytest.mark.parametrize(
    ("given_address", "expected", "printed"),
    [
        ("127.0.0.1:5000", Address("tcp", "127.0.0.1", 5000), "127.0.0.1:5000"),
        ("0.0.0.0:0", Address("tcp", "0.0.0.0", 0), "0.0.0.0:0"),
        ("[::1]:443", Address("tcp", "::1", 443), "[::1]:443"),
        ("[0:0:0:0:0:0:0:1]:443", Address("tcp", "::1", 443), "[::1]:443"),
        ("[fe80::1%eth0]:80", Address("tcp", "fe80::1%eth0", 80), "[fe80::1%eth0]:80"),
        ("*:80", Address("tcp", "*", 80), "*:80"),
        (":80", Address("tcp", "*", 80), "*:80"),
        ("80", Address("tcp", "127.0.0.1", 80), "127.0.0.1:80"),
        (80, Address("tcp", "127.0.0.1", 80), "127.0.0.1:80"),
        ("example.org:65535", Address("tcp", "example.org", 65535), "example.org:65535"),
        ("host_name-1:1", Address("tcp", "host_name-1", 1), "host_name-1:1"),
        (("127.0.0.1", 5000), Address("tcp", "127.0.0.1", 5000), "127.0.0.1:5000"),
        (("", 5000), Address("tcp", "*", 5000), "*:5000"),
        (("::1", 5000, 0, 0), Address("tcp", "::1", 5000), "[::1]:5000"),
        (("fe80::1", 5000, 0, 999), Address("tcp", "fe80::1%999", 5000), "[fe80::1%999]:5000"),
        ("unix:/run/x.sock", Address("unix", path="/run/x.sock"), "unix:/run/x.sock"),
        ("unix:relative", Address("unix", path="relative"), "unix:relative"),
        ("unix:@name", Address("unix", path="@name"), "unix:@name"),
        ("fd:3", Address("fd", fd=3), "fd:3"),
    ],
)
def test_each_form_is_read_and_printed(given_address, expected, printed):
    assert parse_address(given_address) == expected
    assert str(expected) == printed
    assert parse_address(printed) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        "", "localhost", "127.0.0.1", "::1", "::1:5000", "[::1]", "[::1]5000", "[127.0.0.1]:80", "[*]:80", "[]:80",
        "127.0.0.1:", "127.0.0.1:-1", "127.0.0.1:+1", "127.0.0.1: 1", "127.0.0.1:65536", "127.0.0.1:" + "9" * 5000,
        "127.0.0.1:\uff11", "65536", "256.0.0.1:80", "127.1:80", "1.2.3.4.5:80", "http://x:80", "a b:80", "a..b:80",
        "x" * 64 + ":80", "a." * 130 + "b:80", "unix:", "unix:@", "unix:a\0b", "unix:/" + "x" * 107, "fd:", "fd:-1",
        "fd:x", "fd:1 ", "fd:12345678901", "[fe80::1%]:80", "user@host:80",
        -1, 65536, True, None, 1.5, b"127.0.0.1:80", [], (), ("h",), ("h", "80"), ("h", True), ("h", 1, 2),
        ("h", 70000), (1, 2), ("::1", 80, 0, 0, 0),
    ],
)  # fmt: skip
def test_anything_else_is_a_config_error_that_shows_what_was_given(wrong):
    with pytest.raises(ConfigError) as caught:
        parse_address(wrong)
    assert repr(wrong)[:40] in str(caught.value)


def test_port_error_says_the_range():
    with pytest.raises(ConfigError, match=r"port must be 0 to 65535, got '127\.0\.0\.1:70000'"):
        parse_address("127.0.0.1:70000")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("tcp://127.0.0.1:5000", "127.0.0.1:5000"), ("http://[::1]:80/x", "[::1]:80"), ("x://a\nb", "a\nb")],
)
def test_a_url_is_answered_with_what_to_write(wrong, right):
    with pytest.raises(ConfigError) as caught:
        parse_address(wrong)
    assert str(caught.value) == f"address is written without a scheme: {right!r}, got {wrong!r}"


def test_a_unix_path_may_be_as_long_as_the_kernel_takes():
    path = "/" + "x" * 106
    assert parse_address("unix:" + path).path == path


@pytest.mark.slow
@given(st.text())
@example("unix:\ud800")
@example("\ud800:1")
@example("[::1%\n]:1")
def test_any_text_is_an_address_that_reads_back_or_a_config_error(text):
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.slow
@given(
    st.one_of(
        st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535)).map(lambda a: f"{a[0]}:{a[1]}"),
        st.tuples(st.ip_addresses(v=6).map(str), st.integers(0, 65535)).map(lambda a: f"[{a[0]}]:{a[1]}"),
    )
)
def test_every_ip_address_and_port_is_read(text):
    assert str(parse_address(text)) == str(parse_address(str(parse_address(text))))


@pytest.mark.slow
@given(st.one_of(st.integers(), st.floats(), st.binary(), st.none(), st.tuples(st.text(), st.integers())))
def test_any_object_is_an_address_or_a_config_error(thing):
    try:
        address = parse_address(thing)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("sockaddr", "family", "printed"),
    [
        (("127.0.0.1", 80), socket.AF_INET, "127.0.0.1:80"),
        (("::1", 80, 0, 0), socket.AF_INET6, "[::1]:80"),
        (("::ffff:192.0.2.1", 80, 0, 0), socket.AF_INET6, "192.0.2.1:80"),
        (("fe80::1", 80, 0, 1), socket.AF_INET6, f"[fe80::1%{socket.if_indextoname(1)}]:80"),
        (("fe80::1%eth7", 80, 0, 7), socket.AF_INET6, "[fe80::1%eth7]:80"),
        (("fe80::1", 80, 0, 99999), socket.AF_INET6, "[fe80::1%99999]:80"),
        ("/run/x.sock", socket.AF_UNIX, "unix:/run/x.sock"),
        (b"\0name", socket.AF_UNIX, "unix:@name"),
        ("\0name", socket.AF_UNIX, "unix:@name"),
        ("", socket.AF_UNIX, "unix:"),
    ],
)
def test_what_the_kernel_says_is_printed_as_it_is_read(sockaddr, family, printed):
    assert format_sockaddr(sockaddr, family) == printed
    if printed != "unix:":
        parse_address(printed)
