"""Authenticators: asked once, not misled by clients that leave, and not worn down by guesses."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from ipaddress import ip_address
from select import select

import argon2
import bcrypt
import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver import ConfigError
from gtcpserver.proxy import authenticate, passwords
from gtcpserver.proxy.authenticate import CommandAuthenticator, HashedUsers, RememberingAuthenticator
from kit.patience import SOON
from kit.supervised import alive
from kit.waiting import wait_until

CLIENT = ip_address("192.0.2.1")
OTHER = ip_address("198.51.100.1")


def quick_hash(password):
    return argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(password)


ADA = quick_hash(b"pw")
BOB = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(passwords, "FIRST_DELAY", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` lets them pass."""
    real, ahead = authenticate.time.monotonic, [0.0]
    monkeypatch.setattr(authenticate.time, "monotonic", lambda: real() + ahead[0])
    monkeypatch.setattr(passwords, "monotonic", lambda: real() + ahead[0])

    def advance(seconds):
        ahead[0] += seconds

    return advance


class Known(RememberingAuthenticator):
    """Knows one password; `asked` is what it was asked, and it answers when `go` says so."""

    def __init__(self, at_once=2, **options):
        super().__init__(at_once=at_once, **options)
        self.asked = []
        self.go = gevent.event.Event()
        self.go.set()
        self.fault = None

    def verify(self, user, password):
        self.asked.append((user, password))
        self.go.wait()
        if self.fault is not None:
            raise self.fault
        return (user, password) == (b"Ada", b"pw")


def all_at_once(authenticator, attempts):
    """The answers to (user, password, client)s that are tried at the same time."""
    greenlets = [gevent.spawn(authenticator.check, *attempt) for attempt in attempts]
    gevent.sleep(0)
    authenticator.go.set()
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    return [greenlet.value for greenlet in greenlets]


# -- what all have in common -------------------------------------------------------------------------------------------


def test_a_hundred_tunnels_of_a_browser_ask_once():
    staff = Known()
    staff.go.clear()
    assert all_at_once(staff, [(b"Ada", b"pw", CLIENT)] * 100) == [True] * 100
    assert len(staff.asked) == 1


def test_a_password_that_was_right_is_believed_for_a_while(clock):
    staff = Known(remember=60)
    for _ in range(5):
        assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(staff.asked) == 1
    assert not staff.check(b"Adap", b"w", OTHER)  # the same bytes, cut elsewhere
    clock(61)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(staff.asked) == 3


def test_nothing_is_believed_without_asking_if_so_configured():
    staff = Known(remember=0)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(staff.asked) == 2


def test_what_is_remembered_is_bounded_and_no_password(monkeypatch):
    monkeypatch.setattr(authenticate, "MOST_REMEMBERED", 3)
    staff = Known()
    monkeypatch.setattr(staff, "verify", lambda user, password: True)
    for number in range(10):
        assert staff.check(b"user%d" % number, b"password", CLIENT)
    assert len(staff._right) == 3
    assert all(len(digest) == 32 for digest in staff._right)
    assert staff._questions == {}


def test_requirement_34_guesses_sent_at_once_are_no_more_than_those_sent_in_turn():
    staff = Known(at_once=1)
    staff.go.clear()
    guesses = [(b"Ada", b"guess %d" % number, CLIENT) for number in range(100)]
    assert not any(all_at_once(staff, guesses))
    assert len(staff.asked) == passwords.MOST_FAILURES
    assert not staff.check(b"Ada", b"pw", CLIENT)  # the right one comes too late
    assert staff.check(b"Ada", b"pw", OTHER)


def test_requirement_34_a_ban_is_for_the_network_of_an_ipv6_client_and_ends(clock):
    staff = Known()
    for number in range(passwords.MOST_FAILURES):
        assert not staff.check(b"Ada", b"no", ip_address(f"2001:db8::{number}"))
    assert not staff.check(b"Ada", b"pw", ip_address("2001:db8::ffff"))
    assert staff.check(b"Ada", b"pw", ip_address("2001:db8:0:1::1"))
    clock(passwords.WINDOW + 1)
    assert staff.check(b"Ada", b"pw", ip_address("2001:db8::1"))


def test_a_browser_with_an_old_password_is_not_banned_for_its_many_connections():
    staff = Known()
    staff.go.clear()
    assert not any(all_at_once(staff, [(b"Ada", b"old", CLIENT)] * 50))
    assert staff.check(b"Ada", b"pw", CLIENT)


def test_every_address_that_tries_the_same_wrong_password_is_counted():
    staff = Known()
    for _ in range(passwords.MOST_FAILURES):
        staff.go.clear()
        assert not any(all_at_once(staff, [(b"Ada", b"no", CLIENT), (b"Ada", b"no", OTHER)]))
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert not staff.check(b"Ada", b"pw", OTHER)


def test_a_wrong_password_is_answered_late_and_others_do_not_wait(monkeypatch):
    monkeypatch.setattr(passwords, "FIRST_DELAY", 5.0)
    staff = Known(at_once=1)
    wrong = gevent.spawn(staff.check, b"Ada", b"no", CLIENT)
    assert wait_until(lambda: staff.asked)
    assert staff.check(b"Ada", b"pw", OTHER)
    assert not wrong.ready()
    wrong.kill()


def test_a_client_that_leaves_takes_nobody_elses_answer_with_it():
    staff = Known()
    staff.go.clear()
    first, second = (gevent.spawn(staff.check, b"Ada", b"pw", client) for client in (CLIENT, OTHER))
    assert wait_until(lambda: staff.asked)
    first.kill()
    staff.go.set()
    assert second.get(timeout=60)
    assert len(staff.asked) == 1


def test_nobody_is_asked_for_clients_that_have_left():
    staff = Known(at_once=1)
    staff.go.clear()
    busy = gevent.spawn(staff.check, b"Ada", b"pw", CLIENT)
    assert wait_until(lambda: staff.asked)
    gone = gevent.spawn(staff.check, b"Bob", b"x", OTHER)
    assert wait_until(lambda: len(staff._questions) == 2)
    gone.kill()
    staff.go.set()
    assert busy.get(timeout=60)
    wait_until(lambda: not staff._questions)
    assert staff.asked == [(b"Ada", b"pw")]


def test_a_fault_is_no_failure_of_the_client_and_logged_a_few_times(caplog):
    staff = Known()
    staff.fault = RuntimeError("no database")
    for number in range(passwords.MOST_FAILURES * 2):
        assert not staff.check(b"Ada", b"secret-%d" % number, CLIENT)
    staff.fault = None
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert 1 <= len(caplog.records) <= 5
    assert "RuntimeError: no database" in caplog.text
    assert "secret" not in caplog.text


# -- hashes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def users():
    made = []

    def make(*args, **options):
        made.append(HashedUsers(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def htpasswd(tmp_path, monkeypatch):
    """`htpasswd(content)` writes the file, which is looked at each time; `htpasswd.path` is its path."""
    monkeypatch.setattr(authenticate, "LOOK_EVERY", 0.0)
    path = tmp_path / "htpasswd"

    def write(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    write.path = str(path)
    return write


def test_users_of_both_kinds_of_hashes(users):
    staff = users({b"Ada": ADA, b"Bob": BOB})
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert staff.check(b"Bob", b"secret", CLIENT)
    for user, password in [
        (b"Ada", b"PW"),
        (b"Bob", b"pw"),
        (b"Ada", b""),
        (b"", b""),
        (b"\xff\0", b"\xff"),
        (b"", b"pw"),
    ]:
        assert not staff.check(user, password, OTHER), user
    assert staff.check(b"Ada", b"pw", CLIENT)


def test_an_authenticator_needs_users(users):
    with pytest.raises(ConfigError, match="needs users, or an htpasswd file"):
        users({})
    with pytest.raises(ConfigError, match=r"begins with \$argon2"):
        users({b"Ada": "plain"})
    with pytest.raises(ConfigError, match="cannot read /no/such"):
        users(htpasswd="/no/such")


def test_unknown_users_are_compared_with_a_hash_that_is_always_the_same(users, monkeypatch):
    compared = []
    monkeypatch.setattr(authenticate, "matches", lambda kept, password: compared.append(kept) or True)
    staff = users({b"Ada": ADA, b"Bob": BOB}, remember=0)
    names = [b"nobody-%d" % number for number in range(40)]
    for number, name in enumerate(names + names):
        # "Right" for the hash of somebody else is not right.
        assert not staff.check(name, b"pw", ip_address(f"192.0.2.{number}"))
    assert compared[:40] == compared[40:]
    assert set(compared) == {ADA, BOB}


@pytest.mark.parametrize("kept", ["$2y$10$" + "!" * 53, "$2b$99$" + "a" * 53, "$argon2id$broken"])
def test_a_damaged_hash_lets_nobody_in_and_nothing_crash(users, caplog, monkeypatch, kept):
    monkeypatch.setattr(authenticate, "check_hash", lambda kept: None)  # not all damage can be seen
    staff = users({b"Ada": kept})
    assert not staff.check(b"Ada", b"pw", CLIENT)
    if kept.startswith("$2"):
        assert "the hash of a password cannot be used" in caplog.text
    assert kept not in caplog.text


def test_a_changed_htpasswd_file_is_read_again(users, htpasswd):
    htpasswd(f"Ada:{ADA}\n")
    staff = users(htpasswd=htpasswd.path)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert not staff.check(b"Bob", b"secret", CLIENT)
    htpasswd(f"Ada:{quick_hash(b'new')}\nBob:{BOB}\n")
    assert not staff.check(b"Ada", b"pw", CLIENT)  # not even though it was right a moment ago
    assert staff.check(b"Ada", b"new", CLIENT)
    assert staff.check(b"Bob", b"secret", CLIENT)
    htpasswd("")
    assert not staff.check(b"Bob", b"secret", CLIENT)


def test_a_change_that_leaves_size_and_time_as_they_were_is_seen_while_the_file_is_young(users, htpasswd):
    htpasswd(f"Ada:{ADA}\n")
    staff = users(htpasswd=htpasswd.path)
    assert staff.check(b"Ada", b"pw", CLIENT)
    before = os.stat(htpasswd.path)
    htpasswd(f"Eve:{ADA}\n")
    os.utime(htpasswd.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert staff.check(b"Eve", b"pw", CLIENT)


def test_a_file_that_has_not_changed_is_not_read_again(users, htpasswd, monkeypatch):
    htpasswd(f"Ada:{ADA}\n")
    os.utime(htpasswd.path, (1e9, 1e9))
    staff = users(htpasswd=htpasswd.path)
    monkeypatch.setattr(authenticate, "read_htpasswd", lambda path: pytest.fail("it was read"))
    assert staff.check(b"Ada", b"pw", CLIENT)


@pytest.mark.parametrize("content", ["Ada\n", "Ada:plain\n", b"Ada:$argon2\xff\n", None])
def test_a_file_that_cannot_be_used_changes_nothing_and_is_logged_once(users, htpasswd, caplog, content):
    htpasswd(f"Ada:{ADA}\n")
    staff = users(htpasswd=htpasswd.path)
    if content is None:
        os.unlink(htpasswd.path)
    else:
        htpasswd(content)
        os.utime(htpasswd.path, (1e9, 1e9))
    for _ in range(3):
        assert staff.check(b"Ada", b"pw", CLIENT)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "the users stay as they were" in caplog.text
    htpasswd(f"Bob:{BOB}\n")
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert staff.check(b"Bob", b"secret", CLIENT)


def test_the_file_has_the_last_word_on_users_who_are_listed_too(users, htpasswd):
    htpasswd(f"Ada:{quick_hash(b'new')}\n")
    staff = users({b"Ada": ADA, b"Bob": BOB}, htpasswd.path)
    assert staff.check(b"Ada", b"new", CLIENT)
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert staff.check(b"Bob", b"secret", CLIENT)
    htpasswd("")
    assert staff.check(b"Ada", b"pw", CLIENT)


def test_a_ban_survives_that_the_file_is_read_again(users, htpasswd):
    htpasswd(f"Ada:{ADA}\n")
    staff = users(htpasswd=htpasswd.path)
    for number in range(passwords.MOST_FAILURES):
        assert not staff.check(b"Ada", b"no %d" % number, CLIENT)
    htpasswd(f"Ada:{ADA}\nBob:{BOB}\n")
    assert not staff.check(b"Bob", b"secret", CLIENT)


def test_a_password_that_was_changed_while_it_was_compared_is_not_remembered(users, htpasswd, monkeypatch):
    htpasswd(f"Ada:{ADA}\n")
    staff = users(htpasswd=htpasswd.path)

    def change_then_match(kept, password):
        htpasswd(f"Ada:{quick_hash(b'new')}\n")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(authenticate, "matches", change_then_match)
        staff.check(b"Ada", b"pw", CLIENT)
    assert not staff.check(b"Ada", b"pw", CLIENT)


# -- a command ---------------------------------------------------------------------------------------------------------

HELPER = """
    import os, sys, urllib.parse, signal
    directory = sys.argv[1]
    open(f"{directory}/started-{os.getpid()}", "w").close()
    for line in sys.stdin.buffer:
        with open(f"{directory}/asked", "ab") as file:
            file.write(line)
        user, password = map(urllib.parse.unquote_to_bytes, line.split())
        if user == b"die":
            os._exit(1)
        elif user == b"hang":
            signal.pause()
        elif user == b"twice":
            answer = b"ERR\\nOK\\n"
        elif user == b"later":
            answer = b"ERR\\n"
        elif user == b"long":
            answer = b"O" * 20000 + b"\\n"
        elif user == b"echo":
            answer = password + b"\\n"
        else:
            answer = b"OK\\n" if password == b"pw" else b"ERR wrong\\n"
        os.write(1, answer)
        if user == b"later":
            os.write(1, b"OK\\n")
"""


@pytest.fixture
def helper(tmp_path):
    """`helper(**options)` makes an authenticator; `.asked()` and `.started()` tell what its processes saw."""
    script, made = tmp_path / "helper.py", []
    script.write_text(textwrap.dedent(HELPER))

    def make(**options):
        options.setdefault("processes", 1)
        options.setdefault("timeout", 10.0)
        made.append(CommandAuthenticator([sys.executable, "-S", str(script), str(tmp_path)], **options))
        return made[-1]

    make.asked = lambda: (tmp_path / "asked").read_bytes().splitlines() if (tmp_path / "asked").exists() else []
    make.started = lambda: [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("started-*")]
    yield make
    for one in made:
        one.close()


def test_a_command_is_asked_again_and_again(helper):
    staff = helper(remember=0)
    for _ in range(5):
        assert staff.check(b"Ada", b"pw", CLIENT)
        assert not staff.check(b"Ada", b"no", OTHER)
    assert len(helper.started()) == 1
    assert len(helper.asked()) == 10


def test_any_bytes_reach_the_command_as_two_words_of_one_line(helper):
    staff = helper(remember=0)
    assert staff.check(b"a b\nOK\r\0%41\xff+", b"pw", CLIENT)
    assert not staff.check(b"Ada", b"p w\nEve pw", CLIENT)
    assert helper.asked() == [b"a%20b%0AOK%0D%00%2541%FF%2B pw", b"Ada p%20w%0AEve%20pw"]


@pytest.fixture(scope="module")
def looking_glass():
    """A command that answers OK if the password is the user's name."""
    script = 'while read -r user password; do [ "$user" = "$password" ] && echo OK || echo ERR; done'
    staff = CommandAuthenticator(["sh", "-c", script], processes=1, remember=0)
    yield staff
    staff.close()


@settings(deadline=None)
@given(user=st.binary(min_size=1, max_size=255), password=st.binary(min_size=1, max_size=255))
def test_any_user_and_password_get_their_own_answer(looking_glass, user, password):
    assert looking_glass.verify(user, user) is True
    assert looking_glass.verify(user, password) is (user == password)


@pytest.mark.parametrize(("user", "password"), [(b"", b"pw"), (b"Ada", b""), (b"", b""), (b"Ada", b"x" * 9000)])
def test_the_command_is_not_asked_for_what_must_be_wrong(helper, user, password):
    assert not helper().check(user, password, CLIENT)
    assert helper.asked() == []


def test_several_processes_answer_at_the_same_time_and_no_more_are_started_than_needed(helper):
    staff = helper(processes=3, remember=0, timeout=30)
    for _ in range(4):
        assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(helper.started()) == 1
    hanging = gevent.spawn(staff.check, b"hang", b"x", CLIENT)
    assert wait_until(lambda: len(helper.asked()) == 5)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(helper.started()) == 2
    hanging.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("user", "message"),
    [
        (b"die", "has ended without an answer"),
        (b"twice", "answers one question with more than one line"),
        (b"long", "answers with more than 8192 bytes"),
    ],
)
def test_a_process_that_goes_wrong_is_replaced_and_the_client_is_not_to_blame(helper, caplog, clock, user, message):
    staff = helper(remember=0)
    for _ in range(passwords.MOST_FAILURES + 1):
        assert not staff.check(user, b"x", CLIENT)
        clock(60)
    assert message in caplog.text
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(helper.started()) == passwords.MOST_FAILURES + 2
    assert wait_until(lambda: sum(map(alive, helper.started())) == 1)


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_killed(helper, caplog):
    staff = helper(timeout=0.3, remember=0)
    assert not staff.check(b"hang", b"x", CLIENT)
    assert "has not answered within 0.3 s" in caplog.text
    assert wait_until(lambda: not any(map(alive, helper.started())))


def test_an_answer_that_nobody_has_asked_for_is_never_the_next_ones(helper):
    """It says ERR, and OK a moment later: the next one must not get that OK."""
    staff = helper(remember=0)
    assert not staff.check(b"later", b"x", CLIENT)
    # If both lines have come at once its end is already known; else the second one lies in wait.
    sock = staff._helpers[0]._socket
    assert sock is None or wait_until(lambda: select([sock.fileno()], [], [], 0)[0])
    assert not staff.check(b"Eve", b"no", OTHER)
    assert staff.check(b"Ada", b"pw", CLIENT)
    assert len(helper.started()) == 2


def test_a_process_that_was_killed_while_idle_is_replaced_without_a_failure(helper):
    staff = helper(remember=0)
    assert staff.check(b"Ada", b"pw", CLIENT)
    (pid,) = helper.started()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert staff.check(b"Ada", b"pw", CLIENT)


def test_a_client_that_leaves_does_not_shift_the_answers(helper):
    staff = helper(remember=0)
    for _ in range(5):
        leaving = gevent.spawn(staff.check, b"Ada", b"pw", CLIENT)
        gevent.sleep(0)
        leaving.kill()
        assert not staff.check(b"Ada", b"no", OTHER)
        assert staff.check(b"Ada", b"pw", OTHER)


def test_a_command_that_dies_again_and_again_is_not_started_again_at_once(tmp_path, caplog, clock):
    started = tmp_path / "started"
    staff = CommandAuthenticator(["sh", "-c", f"echo >> {started}; exit 1"], processes=1)
    for _ in range(20):
        assert not staff.check(b"Ada", b"pw", CLIENT)
    assert started.read_text().count("\n") == 2
    assert "is not started again for" in caplog.text
    assert len(caplog.records) <= 5
    clock(1.5)
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert started.read_text().count("\n") == 3
    clock(1.5)  # now it is two seconds
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert started.read_text().count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "right", "message"),
    [
        (b"OK", True, ""),
        (b"OK user=Ada", True, ""),
        (b"ERR", False, ""),
        (b'ERR message="no"', False, ""),
        (b"BH no database", False, "cannot tell: b'BH no database'"),
        (b"OKAY", False, "must answer OK, ERR or BH, got b'OKAY'"),
        (b"0 OK", False, "must answer OK, ERR or BH, got b'0 OK'"),
        (b"ok", False, "must answer"),
        (b" ", False, "must answer"),
    ],
)
def test_answers(helper, caplog, answer, right, message):
    assert helper().check(b"echo", answer, CLIENT) is right
    assert message in caplog.text
    assert bool(caplog.records) is bool(message)


def test_a_command_that_cannot_be_run_is_said_at_once():
    for command in (["/no/such"], [], ["/etc/passwd"]):
        with pytest.raises(ConfigError, match="the command must be a program that can be run, got"):
            CommandAuthenticator(command)
    with pytest.raises(ConfigError, match="processes must be 1 to 1000, got 0"):
        CommandAuthenticator(["cat"], processes=0)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="timeout must be more than 0 seconds, got"):
            CommandAuthenticator(["cat"], timeout=seconds)


def test_a_command_that_vanishes_is_a_line_in_the_log(tmp_path, caplog):
    script = tmp_path / "helper"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    staff = CommandAuthenticator([str(script)])
    script.unlink()
    assert not staff.check(b"Ada", b"pw", CLIENT)
    assert "cannot be started: No such file or directory" in caplog.text


def test_close_ends_the_processes_and_what_they_have_started(tmp_path):
    pids = tmp_path / "pids"
    staff = CommandAuthenticator(["sh", "-c", f"sleep 1000 & echo $! $$ > {pids}; while read line; do echo OK; done"])
    assert staff.check(b"Ada", b"pw", CLIENT)
    numbers = [int(pid) for pid in pids.read_text().split()]
    assert all(map(alive, numbers))
    staff.close()
    for pid in numbers:
        wait_until(lambda pid=pid: not alive(pid))


def test_processes_end_when_ours_is_killed(python, tmp_path):
    ours = python(
        """
        import sys
        from ipaddress import ip_address
        from gtcpserver.proxy.authenticate import CommandAuthenticator

        staff = CommandAuthenticator(["sh", "-c", f"echo $$ > {sys.argv[1]}; while read line; do echo OK; done"])
        print(staff.check(b"Ada", b"pw", ip_address("192.0.2.1")), flush=True)
        sys.stdin.read()
        """,
        tmp_path / "pid",
    )
    assert ours.stdout.readline() == b"True\n"
    pid = int((tmp_path / "pid").read_text())
    ours.kill()
    ours.wait()
    wait_until(lambda: not alive(pid))


def test_a_command_ends_by_sigpipe_although_python_ignores_it():
    ignored = "$(grep SigIgn /proc/self/status | cut -f 2)"
    command = f"while read line; do if [ $((0x{ignored} & 0x1000)) = 0 ]; then echo OK; else echo ERR; fi; done"
    users = CommandAuthenticator(["sh", "-c", command])
    assert users.verify(b"ada", b"x")
    users.close()


def test_a_command_is_asked_in_a_monkey_patched_program_too():
    program = """
    from gevent import monkey
    monkey.patch_all()
    from gtcpserver.proxy.authenticate import CommandAuthenticator
    users = CommandAuthenticator(["sh", "-c", "while read line; do echo OK; done"])
    assert users.verify(b"ada", b"x") and users.verify(b"bob", b"x")
    users.close()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=SOON)
