"""Passwords: right ones are quick, wrong ones slow, and nobody else waits."""

from ipaddress import ip_address
from time import monotonic

import bcrypt
import gevent
import pytest

from gtcpserver import ConfigError
from gtcpserver.proxy import authenticate, passwords
from gtcpserver.proxy.authenticate import HashedUsers
from gtcpserver.proxy.passwords import Failures, check_hash, hash_password, matches, read_htpasswd
from kit.proxying import QUICK

CLIENT = ip_address("192.0.2.1")

BCRYPT = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()


@pytest.fixture
def users(monkeypatch):
    monkeypatch.setattr(passwords, "FIRST_DELAY", 0.0)
    made = []

    def make(hashes):
        made.append(HashedUsers(hashes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def hashed(monkeypatch):
    """The passwords that were compared by their hash."""
    asked, real = [], authenticate.matches

    def counting(kept, password):
        asked.append(password)
        return real(kept, password)

    monkeypatch.setattr(authenticate, "matches", counting)
    return asked


def test_a_password_that_was_right_is_recognized_for_a_while(users, hashed):
    staff = users({b"Ada": QUICK})
    for _ in range(5):
        assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(hashed) == 1
    assert not staff.check(b"Adap", b"w", CLIENT)  # the same bytes, cut elsewhere
    staff.forget()
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(hashed) == 3


def test_unknown_names_take_as_long_as_wrong_passwords(users, hashed):
    staff = users({b"Ada": QUICK})
    assert not staff.check(b"Nobody", b"pw", CLIENT)
    assert hashed == [b"pw"]


@pytest.mark.slow
def test_the_event_loop_goes_on_while_a_hash_is_computed(users):
    staff = users({b"Ada": hash_password(b"pw")})
    checking = gevent.spawn(staff.check, b"Ada", b"pw", CLIENT)
    turns = 0
    while not checking.ready():
        gevent.sleep(0)
        turns += 1
    assert checking.value
    assert turns > 3


def test_addresses_that_fail_too_often_are_not_asked_any_more(users, hashed, monkeypatch):
    staff = users({b"Ada": QUICK})
    for _ in range(passwords.MOST_FAILURES):
        assert not staff.check(b"Ada", b"no", CLIENT)
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert len(hashed) == passwords.MOST_FAILURES
    assert staff.check(b"Ada", b"pw", ip_address("192.0.2.2"))
    clock = monotonic
    monkeypatch.setattr(passwords, "monotonic", lambda: clock() + passwords.WINDOW + 1)
    assert staff.check(b"Ada", b"pw", CLIENT)


def test_failures_are_delayed_counted_by_network_and_bounded(monkeypatch):
    failures = Failures()
    assert [failures.note(CLIENT, b"ada") for _ in range(3)] == [0.5, 1.0, 1.5]
    assert max(failures.note(CLIENT, b"ada") for _ in range(20)) == 5.0
    failures.forget(CLIENT, b"ada")
    assert failures.note(CLIENT, b"ada") == 0.5
    failures.note(ip_address("2001:db8::1"), b"ada")
    assert failures.note(ip_address("2001:db8::ffff"), b"ada") == 1.0
    assert failures.note(ip_address("2001:db8:0:1::1"), b"ada") == 0.5
    monkeypatch.setattr(passwords, "MOST_ADDRESSES", 3)
    for number in range(10):
        failures.note(ip_address(f"198.51.100.{number}"), b"ada")
    assert len(failures._known) <= 4


def test_who_has_an_account_cannot_guess_other_passwords_for_that():
    failures = Failures()
    for _ in range(passwords.MOST_FAILURES):
        assert failures.may_try(CLIENT)
        failures.note(CLIENT, b"bob")
        failures.forget(CLIENT, b"ada")  # was right for this one
    assert not failures.may_try(CLIENT)
    failures.forget(CLIENT, b"bob")
    assert failures.may_try(CLIENT)
    assert not failures._known


def test_htpasswd_files(tmp_path):
    path = tmp_path / "htpasswd"
    path.write_text(f"# staff\nAda:{QUICK}\n\nBob:{BCRYPT}\n")
    assert read_htpasswd(str(path)) == {b"Ada": QUICK, b"Bob": BCRYPT}
    for content, message in {
        "Ada": "line 1 must be name:hash",
        ":x": "line 1 must be name:hash",
        "\nAda:plain": "line 2: a password must be a hash",
        "Ada:$apr1$x$y": "a password must be a hash that begins with $argon2 or $2y$",
    }.items():
        path.write_text(content)
        with pytest.raises(ConfigError) as raised:
            read_htpasswd(str(path))
        assert message in str(raised.value)
    with pytest.raises(ConfigError, match="cannot read /no/such: No such file"):
        read_htpasswd("/no/such")


def test_a_hash_does_not_show_the_password_in_errors():
    with pytest.raises(ConfigError) as raised:
        check_hash("my secret password")
    assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_hashes_made_here_are_argon2id():
    kept = hash_password(b"pw")
    assert kept.startswith("$argon2id$")
    assert matches(kept, b"pw")
    assert not matches(kept, b"pW")
    assert not matches("$argon2id$broken", b"pw")
    assert matches(BCRYPT.replace("$2b$", "$2y$"), b"secret")
