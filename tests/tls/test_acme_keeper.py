"""A server that keeps its certificate by itself: the helper process, who starts it, and what if it fails."""

import fcntl
import logging
import os
import signal
import time

import gevent
import pytest

from gtcpserver import TLSConfig
from gtcpserver.tls import Credentials
from gtcpserver.tls.acme import keeper as keepers
from gtcpserver.tls.acme.folder import Folder, read_json
from gtcpserver.tls.acme.keeper import Keeper
from gtcpserver.tls.acme.settings import DIRECTORIES, ACMESettings
from kit.acme import settings_for
from kit.programs import needs
from kit.supervised import alive
from kit.waiting import wait_until

pytestmark = pytest.mark.slow

needs_pebble = needs("pebble", "pebble-challtestsrv")


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "gtcpserver.tls")
    return lambda text: [record for record in caplog.records if text in record.getMessage()]


@pytest.fixture
def site(pebble, front, tmp_path, serve):
    """`site(**options)` starts a server, by default where the authority asks."""

    def start(address=None, **options):
        options = {"directory": front.directory, "folder": tmp_path / "acme", "ca_file": front.ca_file, **options}
        tls = TLSConfig.acme(["a.example.com"], watch=0.05, **options)
        return serve(lambda conn: None, address or f"127.0.0.1:{pebble.validates}", tls=tls)

    return start


@needs_pebble
def test_servers_get_a_certificate_by_themselves(site, front, log, tmp_path):
    first, second = site(), site("127.0.0.1:0")  # one orders, the other one sees it
    assert first.tls.expires_at is None
    wait_until(lambda: first.tls.expires_at and second.tls.expires_at)
    assert front.count("/order-plz") == 1
    # They may see the file before the helper has said so.
    [record] = wait_until(lambda: log("ACME: certificate for a.example.com issued; it expires on "))
    assert record.levelno == logging.INFO
    assert not log("staging")
    # At the next start it is there at once.
    first.stop()
    again = site()
    assert again.tls.expires_at == second.tls.expires_at
    assert front.count("/order-plz") == 1


@needs_pebble
def test_a_server_that_is_stopped_in_the_middle_goes_on_at_the_next_start(site, front, log, tmp_path):
    folder = Folder(settings_for(front, tmp_path / "acme"))
    held = gevent.get_hub().loop.async_()
    reached = gevent.event.Event()
    held.start(reached.set)

    def hold(_request):
        held.send()
        time.sleep(0.2)
        return 503, {}, "sorry"

    front.tricks["/finalize-order"] = hold
    server = site()
    reached.wait()
    server.halt()
    kept = read_json(folder.order)
    assert not os.path.exists(folder.certificate)
    front.tricks.clear()
    server = site()
    wait_until(lambda: server.tls.expires_at)
    assert front.count("/order-plz") == 1
    with open(folder.certificate) as file:
        assert kept["key"] in file.read()
    assert wait_until(lambda: log("ACME: going on with the order"))
    held.close()


@needs_pebble
def test_a_failure_is_a_warning_and_not_repeated_at_once(site, front, log, monkeypatch):
    monkeypatch.setattr(keepers, "LOOK_SECONDS", 0.01)
    front.tricks["/order-plz"] = lambda _request: (503, {"Retry-After": "3600"}, "sorry")
    site()
    wait_until(lambda: log("ACME: no certificate for a.example.com (attempt 1): HTTP status 503"))
    asked = len(front.asked)
    gevent.sleep(0.05)
    assert len(front.asked) == asked


# -- helpers that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    return ACMESettings.checked(["a.example.com"], None, DIRECTORIES["production"], str(tmp_path / "acme"), None)


@pytest.fixture
def keep(settings, monkeypatch):
    """`keep(program)`: a keeper whose helper is another program, and what it reloads."""

    def make(program):
        program = program if "_exit" in program else f"import sys; sys.stdin.read(); {program}"
        monkeypatch.setattr(keepers, "_PROGRAM", program.replace("{", "{{").replace("}", "}}"))
        return Keeper(
            Credentials(TLSConfig.acme(settings.names, folder=settings.folder, directory="production")), settings
        )

    return make


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("import os; os._exit(3)", "the helper process has ended without a result"),
        ("print('no JSON'); print([])", "the helper process has ended without a result"),
        ("""print('{"level": "error", "text": "no space"}')""", "no space"),
        ("import sys; sys.stdout.write('x' * 2**19)", "the helper process has ended without a result"),
        ("import time, sys; time.sleep(60)", "the helper process has not ended within 0 s"),
    ],
)
def test_a_helper_that_fails_is_told_once_and_waits(keep, log, program, text, monkeypatch):
    if "sleep" in program:
        monkeypatch.setattr(keepers, "HELPER_SECONDS", 0.01)
    keeper = keep(program)
    keeper.look()
    [record] = log("ACME: no certificates can be ordered: ")
    assert text in record.getMessage()
    assert record.levelno == logging.ERROR
    keeper.look()  # not before the pause is over
    assert len(log("ACME:")) == 1
    # The lock is free: the helper is gone.
    lock = keeper._folder.lock()
    assert lock is not None
    os.close(lock)


def test_a_program_without_a_known_interpreter(keep, log, monkeypatch):
    keeper = keep("")
    for executable, text in (("", "sys.executable"), ("/does/not/exist", "No such file")):
        monkeypatch.setattr("sys.executable", executable)
        keeper._not_before = 0.0
        keeper.look()
        assert text in log("ACME: no certificates can be ordered: ")[-1].getMessage()


def test_one_of_all_keepers_starts_a_helper(keep, settings, tmp_path):
    started = tmp_path / "started"
    program = f"""open({str(started)!r}, "a").write("x"); import time; time.sleep(0.1); print('{{"changed": false}}')"""
    keeper = keep(program)
    others = [keep(program) for _ in range(3)]
    together = [gevent.spawn(one.look) for one in (keeper, *others)]
    gevent.joinall(together)
    assert started.read_text() == "x"


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_child_of_a_handler_does_not_keep_the_lock(keep, tmp_path):
    # The worker has no copy of it while the helper runs.
    keeper = keep("import time; time.sleep(60)")
    looking = gevent.spawn(keeper.look)
    wait_until(lambda: os.path.exists(keeper._folder._lock) and keeper._folder.lock() is None)
    found = os.stat(keeper._folder._lock)
    mine = [fd for fd in map(int, os.listdir("/proc/self/fd")) if is_open(fd)]
    assert not [fd for fd in mine if os.path.samestat(os.fstat(fd), found)]
    looking.kill()


def test_a_helper_ends_with_its_server_and_holds_the_lock_until_then(keep, tmp_path):
    pid_file = tmp_path / "pid"
    keeper = keep(
        f"import os, time; open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid())); "
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r}); time.sleep(60)"
    )
    looking = gevent.spawn(keeper.look)
    wait_until(pid_file.exists)
    pid = int(pid_file.read_text())
    assert keeper._folder.lock() is None
    assert os.getpgid(pid) == pid  # Ctrl-C is not for it
    looking.kill()
    assert not alive(pid)
    lock = keeper._folder.lock()
    assert lock is not None
    os.close(lock)


def test_a_server_that_crashes_leaves_the_lock_to_its_helper(settings, python, tmp_path):
    # And the helper finishes its work.
    pid_file, done = tmp_path / "pid", tmp_path / "done"
    server = python(
        """
        import os, sys
        from gtcpserver.tls.acme import keeper
        from gtcpserver.tls.acme.folder import Folder
        from gtcpserver.tls.acme.settings import ACMESettings
        keeper._PROGRAM = f'''import os, time
        open({sys.argv[2]!r} + ".new", "w").write(str(os.getpid()))
        os.rename({sys.argv[2]!r} + ".new", {sys.argv[2]!r})
        while not os.path.exists({sys.argv[3]!r}): time.sleep(0.01)'''.replace("\\n        ", "\\n")
        settings = ACMESettings.checked(["a.example.com"], None, "production", sys.argv[1], None)
        folder = Folder(settings)
        folder.prepare()
        keeper.run_helper(settings, folder.lock())
        """,
        settings.folder,
        pid_file,
        done,
    )
    wait_until(pid_file.exists)
    pid = int(pid_file.read_text())
    server.send_signal(signal.SIGKILL)
    wait_until(lambda: server.poll() is not None)
    folder = Folder(settings)
    assert folder.lock() is None
    done.write_text("")
    wait_until(lambda: not alive(pid))
    lock = folder.lock()
    assert lock is not None
    os.close(lock)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_that_others_may_write_to_is_refused(keep, settings, log):
    keeper = keep("""print('{"changed": false}')""")
    os.makedirs(settings.folder)
    os.chmod(settings.folder, 0o770)
    keeper.look()
    [record] = log("ACME: no certificates can be ordered: ")
    assert "may be written to by others, expected mode 700" in record.getMessage()
    os.chmod(settings.folder, 0o755)
    keeper._not_before = 0.0
    keeper.look()
    assert len(log("ACME: no certificates")) == 1


def test_a_lock_that_is_a_link_is_refused(keep, settings, log, tmp_path):
    keeper = keep("""print('{"changed": false}')""")
    keeper._folder.prepare()
    os.symlink(tmp_path / "elsewhere", keeper._folder._lock)
    keeper.look()
    assert log("ACME: no certificates can be ordered: ")
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_of_another_program_is_waited_for(keep, log):
    keeper = keep("raise SystemExit")
    keeper._folder.prepare()
    with open(keeper._folder._lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        keeper.look()
        assert not log("ACME")


def test_a_new_certificate_that_cannot_be_read_leaves_the_server_as_it_is(keep, log):
    keeper = keep("""print('{"changed": true}')""")
    path = keeper._folder.certificate
    keeper._folder.prepare()
    with open(path, "w") as file:
        file.write("nonsense")
    keeper.look()
    assert log("ACME: the new certificate cannot be used, the old one stays: ")


def test_staging_is_said_loudly(serve, log, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeper, "look", lambda self: None)
    serve(lambda conn: None, tls=TLSConfig.acme(["a.example.com"], folder=tmp_path))
    wait_until(lambda: log("staging environment, and no browser trusts them"))
    assert log("staging environment")[0].levelno == logging.WARNING
