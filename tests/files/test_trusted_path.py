"""Root is not led to other files by less privileged users; nobody else is held up. These tests are root's own."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gtcpserver import ConfigError, ListenConfig
from gtcpserver.files.trusted_path import FIRST_USERS_GROUP, UntrustedPath, check_path, open_file, trusted_place
from gtcpserver.listening.listener import open_listeners
from gtcpserver.server.access_log import AccessLog
from gtcpserver.supervisor.control import ControlError
from gtcpserver.supervisor.log_files import open_log_file
from gtcpserver.supervisor.pid_file import PidFile
from kit.supervised import COMMAND, Master, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root is led anywhere")

ADA = 12345  # a user without rights; numbers need no entry
SYSLOG = 104

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of root's, which has a folder of ada's and a secret that she would like to be written to."""
    (tmp_path / "hers").mkdir()
    os.chown(tmp_path / "hers", ADA, ADA)
    (tmp_path / "secret").write_text("secret\n")
    return tmp_path


def opened(path: Path) -> str:
    """Where a file that was opened really is."""
    fd = open_file(str(path), APPEND, 0o640)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_link_in_the_folder_of_another_user_is_not_followed(folder: Path) -> None:
    (folder / "hers/app.log").symlink_to(folder / "secret")
    with pytest.raises(UntrustedPath, match=rf"{folder}/hers/app.log: refused.*hers belongs to user {ADA}"):
        opened(folder / "hers/app.log")


def test_a_folder_that_another_user_may_exchange_is_refused_however_deep(folder: Path) -> None:
    deep = folder / "hers/a/b"
    deep.mkdir(parents=True)  # root's, and may be moved away with its parent
    with pytest.raises(UntrustedPath, match="hers belongs to user"):
        opened(deep / "app.log")
    assert not list(deep.iterdir())


@pytest.mark.parametrize(
    ("mode", "group", "who"),
    [(0o777, 0, "every user may write to"), (0o775, FIRST_USERS_GROUP, f"group .*{FIRST_USERS_GROUP}.* may write to")],
)
def test_a_folder_into_which_others_may_write_is_refused(folder: Path, mode: int, group: int, who: str) -> None:
    os.chmod(folder / "hers", mode)
    os.chown(folder / "hers", 0, group)
    with pytest.raises(UntrustedPath, match=who):
        opened(folder / "hers/app.log")


@pytest.mark.parametrize(("mode", "group"), [(0o1777, 0), (0o2775, SYSLOG), (0o775, SYSLOG)])
def test_where_others_may_write_the_file_itself_must_be_roots(folder: Path, mode: int, group: int) -> None:
    shared = folder / "shared"
    shared.mkdir()
    os.chown(shared, 0, group)
    os.chmod(shared, mode)
    assert opened(shared / "app.log") == str(shared / "app.log")
    assert opened(shared / "app.log") == str(shared / "app.log")
    (shared / "link").symlink_to(folder / "secret")
    os.link(folder / "secret", shared / "name")
    (shared / "theirs").touch()
    os.chown(shared / "theirs", ADA, ADA)
    os.mkfifo(shared / "fifo")
    os.chown(shared / "fifo", ADA, ADA)
    (shared / "folder").symlink_to(folder)
    for name, why in (
        ("link", "link is a symbolic link"),
        ("name", "several names"),
        ("theirs", f"belongs to user {ADA}"),
        ("fifo", f"belongs to user {ADA}"),
        ("folder/secret", "folder is a symbolic link"),
    ):
        with pytest.raises(UntrustedPath, match=why):
            opened(shared / name)
    assert (folder / "secret").read_text() == "secret\n"


def test_a_link_of_another_user_is_not_followed(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "secret")
    os.lchown(folder / "link", ADA, ADA)
    with pytest.raises(UntrustedPath, match="is a symbolic link that is not only root's"):
        opened(folder / "link")


def test_links_that_lead_in_a_circle_end(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        opened(folder / "a")


def test_a_folder_that_is_exchanged_all_the_time_never_leads_elsewhere(folder: Path) -> None:
    """She moves her folder of the same name to and fro while root opens a file in it."""
    os.chmod(folder, 0o1777)
    (folder / "good").mkdir()
    (folder / "evil").mkdir()
    os.chown(folder / "evil", ADA, ADA)
    (folder / "evil/app.log").symlink_to(folder / "secret")
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            for name in ("good", "evil"):
                os.rename(folder / name, folder / "log")
                os.rename(folder / "log", folder / name)
            os.symlink(folder / "evil", folder / "log")
            os.unlink(folder / "log")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(2000):
            try:
                assert opened(folder / "log/app.log") != str(folder / "secret")
            except (UntrustedPath, OSError):
                pass
    finally:
        done.set()
        thread.join()
    assert (folder / "secret").read_text() == "secret\n"


# -- what goes on to work ----------------------------------------------------------------------------------------------


def test_links_of_root_in_folders_of_root_are_followed(folder: Path) -> None:
    (folder / "data/log").mkdir(parents=True)
    (folder / "log").symlink_to("data/../data/log")
    (folder / "data/log/app.log").symlink_to(folder / "data/real.log")
    assert opened(folder / "log/app.log") == str(folder / "data/real.log")
    assert opened(folder / "log/new.log") == str(folder / "data/log/new.log")


def test_a_file_of_another_user_in_a_folder_of_root_is_written(folder: Path) -> None:
    # As logrotate makes it: "create 0640 app adm".
    (folder / "app.log").touch()
    os.chown(folder / "app.log", ADA, ADA)
    assert opened(folder / "app.log") == str(folder / "app.log")


@pytest.mark.parametrize("path", ["/var/log", "/run", "/var/run", "/tmp", "/dev", "/var/tmp"])
def test_where_distributions_have_their_files_is_trusted(path: str) -> None:
    check_path(f"{path}/gtcpserver-test.log")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "/dev/null"])
def test_own_descriptors_and_devices_are_files_too(folder: Path, name: str) -> None:
    code = f"""
import os
from gtcpserver.supervisor.log_files import open_log_file
os.write(open_log_file({name!r}), b"written\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == (b"" if name == "/dev/null" else b"written\n")


def test_other_users_open_what_they_like(folder: Path) -> None:
    (folder / "hers/link").symlink_to("file")
    pid = os.fork()
    if not pid:
        try:
            os.chmod(folder, 0o755)
            for parent in folder.parents:
                if parent != Path("/") and not parent.stat().st_mode & 1:
                    raise LookupError
            os.setresuid(ADA, ADA, ADA)
            os.close(open_file(str(folder / "hers/link"), APPEND))
            with trusted_place(str(folder / "hers/x")) as place:
                os.stat(".", dir_fd=place.folder)
            os._exit(0)
        except LookupError:
            os._exit(0)  # she cannot get there
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


# -- each file that is opened ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--log-file", "hers/x"),
        ("--pid-file", "hers/x"),
        ("--control", "hers/x"),
        ("--access-log-file", "hers/x"),
    ],
)
@pytest.mark.parametrize("link", [True, False])
def test_the_command_line_says_so_and_ends_with_2(folder: Path, options: tuple[str, ...], link: bool) -> None:
    if link:
        (folder / "hers/x").symlink_to(folder / "secret")
    command = [*COMMAND, "echo", "--bind", "127.0.0.1:0", "--workers", "1", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2, last
    assert f"hers/x: refused, since this process is root: {folder}/hers belongs to user {ADA}" in last
    assert "Traceback" not in done.stderr.decode()
    assert (folder / "secret").read_text() == "secret\n"


@pytest.mark.slow
def test_a_log_file_whose_folder_was_exchanged_since_is_not_opened_again(folder: Path) -> None:
    (folder / "log").mkdir()
    log = folder / "log/app.log"
    options = ("--log-file", str(log), "--control", str(folder / "ctl"))
    master = Master(folder, ("echo", "--bind", "127.0.0.1:0", "--workers", "1", *options))
    try:
        wait_until(lambda: log.exists() and "listening on" in log.read_text())
        log.rename(folder / "old.log")
        log.symlink_to(folder / "secret")
        os.chown(folder / "log", ADA, ADA)
        with pytest.raises(ControlError, match="belongs to user"):
            master.ask("reopen")
        assert f"{folder}/log belongs to user {ADA}" in (folder / "old.log").read_text()
        assert (folder / "secret").read_text() == "secret\n"
        master.ask("status")
    finally:
        master.kill_all()


def test_an_access_log_whose_folder_was_exchanged_since_goes_on_in_the_old_file(folder: Path) -> None:
    (folder / "log").mkdir()
    access = AccessLog("text", folder / "log/access.log")
    (folder / "log/access.log").rename(folder / "old.log")
    (folder / "log/access.log").symlink_to(folder / "secret")
    os.chown(folder / "log", ADA, ADA)
    access.write({"time": "now", "result": "ok"})
    assert "result=ok" in (folder / "old.log").read_text()
    assert (folder / "secret").read_text() == "secret\n"


def test_the_functions_name_the_file(folder: Path) -> None:
    path = str(folder / "hers/x")
    for what, make in (
        ("log file", lambda: open_log_file(path)),
        ("PID file", lambda: PidFile(path).check()),
        ("PID file", lambda: PidFile(path).write()),
        ("access log", lambda: AccessLog("text", path)),
    ):
        with pytest.raises(ConfigError, match=f"^{what} {path}: refused"):
            make()  # type: ignore[no-untyped-call]
    assert not list((folder / "hers").iterdir())


# -- the PID file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_ada() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Runs something as another user, in a process that stays until the end of the test."""
    children = []

    def run(what: Callable[[], None]) -> int:
        ready, tell = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.setresuid(ADA, ADA, ADA)
                what()
                os.write(tell, b"x")
                threading.Event().wait()
            finally:
                os._exit(1)
        children.append(pid)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        os.close(tell)
        return pid

    yield run
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("held_while_running", [True, False])
def test_a_lock_of_another_user_does_not_keep_a_master_from_starting(
    folder: Path, as_ada: Callable[[Callable[[], None]], int], held_while_running: bool
) -> None:
    path = folder / "pid"
    first = PidFile(str(path))
    first.write()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    theirs = os.open(path, os.O_RDONLY)  # as every user can

    def lock() -> None:
        first.close()  # a fork has it, another user's process has not
        fcntl.flock(theirs, fcntl.LOCK_EX)
        try:
            fcntl.lockf(theirs, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            assert held_while_running

    if held_while_running:
        as_ada(lock)
        with pytest.raises(FileExistsError, match=f"process {os.getpid()} is running"):
            PidFile(str(path)).check()
        first.close()
    else:
        first.close()
        as_ada(lock)
    os.close(theirs)
    second = PidFile(str(path))
    second.check()
    second.write()
    with pytest.raises(FileExistsError, match=f"process {os.getpid()} is running"):
        PidFile(str(path)).check()
    second.remove()
    assert not path.exists()


def test_a_lock_with_fcntl_names_its_process(folder: Path) -> None:
    path = folder / "pid"
    path.write_text("1\n")
    code = f"import fcntl; file = open({str(path)!r}, 'r+'); fcntl.lockf(file, 2); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(FileExistsError, match=f"process {holder.pid} is running"):
            PidFile(str(path)).check()
    finally:
        holder.communicate(b"\n")


def test_a_pid_file_that_another_user_has_made_is_replaced(folder: Path) -> None:
    os.chmod(folder, 0o1777)
    path = folder / "pid"
    path.write_text("1\n")
    os.chown(path, ADA, ADA)
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        one = PidFile(str(path))
        one.check()
        one.write()
    assert path.stat().st_uid == 0
    one.remove()
    path.symlink_to(folder / "secret")
    one.check()
    one.write()
    assert not path.is_symlink()
    assert (folder / "secret").read_text() == "secret\n"
    one.remove()


@pytest.mark.slow
def test_a_device_is_not_replaced_by_a_pid_file(folder: Path) -> None:
    """`--pid-file /dev/null` put a file in place of the whole host's /dev/null, and removed it at the end."""
    path = folder / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices can be made here")
    command = [*COMMAND, "echo", "--bind", "127.0.0.1:0", "--workers", "1", "--pid-file", str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == f"gtcpserver: PID file {path} must be a file, it is a device; left alone\n"
    assert done.returncode == 2
    assert path.is_char_device()


@pytest.mark.slow
def test_a_folder_is_no_pid_file(folder: Path) -> None:
    (folder / "pids").mkdir()
    command = [*COMMAND, "echo", "--bind", "127.0.0.1:0", "--workers", "1", "--pid-file", "pids"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == f"gtcpserver: PID file {folder / 'pids'} must be a file, it is a folder\n"
    assert done.returncode == 2


def test_a_temporary_name_that_exists_is_not_followed(folder: Path) -> None:
    (folder / f"pid.{os.getpid()}").symlink_to(folder / "secret")
    one = PidFile(str(folder / "pid"))
    one.write()
    assert (folder / "secret").read_text() == "secret\n"
    assert sorted(path.name for path in folder.iterdir()) == ["hers", "pid", "secret"]
    one.remove()


# -- unix sockets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, None])
def test_a_unix_socket_has_its_mode_from_the_begin_and_whatever_the_umask_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int | None
) -> None:
    path = folder / "sock"
    seen: list[int] = []
    listen = socket.socket.listen

    def looked_at(sock: socket.socket, backlog: int = 0) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        listen(sock, backlog)

    def no_path(target: object, *_arguments: object, **_options: object) -> None:
        raise AssertionError(f"chmod of {target}")

    before = os.umask(umask)
    chmod = os.chmod
    monkeypatch.setattr(
        os, "chmod", lambda target, mode: chmod(target, mode) if "/proc/self/fd/" in str(target) else no_path(target)
    )
    try:
        (listener,) = open_listeners(f"unix:{path}", ListenConfig(unix_mode=mode))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == (mode if mode is not None else 0o777 & ~umask)
    listener.close()
    assert not path.exists()


def test_a_link_in_place_of_the_socket_is_left_alone(folder: Path) -> None:
    os.chmod(folder / "secret", 0o600)
    path = folder / "hers/sock"
    (listener,) = open_listeners(f"unix:{path}", ListenConfig(unix_mode=0o666))
    path.unlink()
    path.symlink_to(folder / "secret")
    listener.close()
    assert path.is_symlink()
    with pytest.raises(OSError, match="the path exists and is no socket"):
        open_listeners(f"unix:{path}", ListenConfig(unix_mode=0o666))
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
