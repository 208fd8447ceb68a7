"""What a master does about terminals, service managers, sandboxes, and files it cannot have: over real processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import pty
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gtcpserver.cli import ctl as ctl_module
from gtcpserver.errors import ConfigError
from gtcpserver.listening.listener import ListenConfig, open_listeners
from gtcpserver.supervisor.control import ControlError
from gtcpserver.supervisor.surroundings import Terminal
from kit.patience import SOON
from kit.supervised import APP, COMMAND, Master, wait_until

LISTEN = ("--bind", "127.0.0.1:0")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Master]]:
    (tmp_path / "app.py").write_text(APP)
    masters: list[Master] = []

    def start(*arguments: str, command: tuple[str, ...] = ("serve", "app:handler"), **options: Any) -> Master:
        arguments = (*command, *LISTEN, "--workers", "2", "--control", str(tmp_path / "ctl"), *arguments)
        masters.append(Master(tmp_path, arguments, **options))
        return masters[-1].wait_listening()

    yield start
    for master in masters:
        master.kill_all()


# -- terminals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal() -> Iterator[tuple[Callable[[], None], dict[str, Any]]]:
    """A function that closes it, and how a process becomes its foreground process."""
    ours, theirs = pty.openpty()
    closed: list[int] = []

    def close() -> None:
        os.close(ours)
        closed.append(ours)

    options = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)}
    try:
        yield close, {**options, "pass_fds": (theirs,)}
    finally:
        os.close(theirs)
        if not closed:
            os.close(ours)


@pytest.mark.slow
def test_a_master_whose_terminal_is_closed_stops_gracefully(start) -> None:
    with terminal() as (close, options):
        master = start(**options)
        (client,) = master.hold()
        with client:
            close()
            assert client.makefile("rb").readline().endswith(b" last\n")
        assert master.wait() == 0
    assert "SIGHUP of the terminal, which is gone: stopping" in master.log()
    assert "1 connection finished, 0 cut" in master.log()


@pytest.mark.slow
def test_a_hangup_while_the_terminal_is_there_is_a_reload(start) -> None:
    with terminal() as (_, options):
        master = start(**options)
        before = master.settled(2)
        master.send_signal(signal.SIGHUP)
        master.wait_for("reload 1 is done")
        assert not set(before) & set(master.settled(2))


@pytest.mark.slow
def test_nohup_is_obeyed(start) -> None:
    with terminal() as (close, options):
        master = start(prefix=["nohup"], **options)
        close()
        os.kill(master.pid, signal.SIGHUP)  # the kernel sends an ignored one to nobody
        master.wait_for("going on, as nohup")
        master.request()


def test_long_after_the_terminal_was_closed_a_hangup_is_a_reload() -> None:
    there = [True]
    seen = Terminal(lambda: there[0])
    assert seen.hung_up(100.0) is False
    there[0] = False
    seen.look(100.0)
    assert seen.hung_up(101.0) is True  # from a shell
    assert seen.hung_up(103.0) is False


@pytest.mark.slow
def test_a_single_process_whose_terminal_is_closed_stops_gracefully(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    with terminal() as (close, options), (tmp_path / "log").open("wb") as log:
        command = [*COMMAND, "serve", "app:handler", *LISTEN]
        process = subprocess.Popen(command, cwd=tmp_path, stdin=options["pass_fds"][0], stderr=log, **options)
        try:
            text = (tmp_path / "log").read_text
            port = wait_until(lambda: re.search(r"listening on \S*:(\d+)", text()))[1]
            with socket.create_connection(("127.0.0.1", int(port)), SOON) as client:
                client.sendall(b"hold 60\n")
                lines = client.makefile("rb")
                assert lines.readline().endswith(b"held\n")
                close()
                assert lines.readline().endswith(b" last\n")
            assert process.wait(SOON) == 0, text()
        finally:
            process.kill()
            process.wait()


# -- service managers --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_supervisord_there_is_no_upgrade(start) -> None:
    master = start(env={**os.environ, "SUPERVISOR_ENABLED": "1"})
    with pytest.raises(ControlError, match="supervisord knows the process that it started"):
        master.ask("upgrade")
    master.send_signal(signal.SIGUSR2)
    master.wait_for("no upgrade: supervisord", 2)
    master.request()


@pytest.mark.slow
def test_under_runit_there_is_no_upgrade(start, tmp_path: Path) -> None:
    # A process of this name that starts ours, and ends with it.
    (tmp_path / "runsv").symlink_to(sys.executable)
    program = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    master = start(prefix=[str(tmp_path / "runsv"), "-S", "-c", program])
    if "runsv" not in Path(f"/proc/{master.process.pid}/comm").read_text():
        pytest.skip("this python does not keep the name it was started by")
    with pytest.raises(ControlError, match="runsv knows the process that it started"):
        master.ask("upgrade")
    master.ask("stop")


@pytest.mark.parametrize("notified", [False, True])
def test_under_systemd_there_is_one_if_it_is_told(monkeypatch: pytest.MonkeyPatch, notified: bool) -> None:
    from gtcpserver.supervisor.surroundings import who_ends_with_us

    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x") if notified else monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert ("Type=notify" in who_ends_with_us()) is not notified


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_process_1_quit_is_obeyed() -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root make a PID namespace")
    process = subprocess.Popen([*unshare, *COMMAND, "echo", *LISTEN], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "listening on" not in (line := process.stderr.readline()):
            assert line, "it did not start"
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGQUIT)
        _, log = process.communicate(timeout=SOON)
        assert process.returncode == 0, log
        assert "SIGQUIT: stopping" in log
    finally:
        process.kill()
        process.communicate()


# -- sandboxes ---------------------------------------------------------------------------------------------------------

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
#: Numbers of system calls (asm/unistd.h).
CALLS = {
    "x86_64": {"setsockopt": 54, "prctl": 157, "fadvise64": 221, "sendfile": 40, "splice": 275, "preadv2": 327},
    "aarch64": {"setsockopt": 208, "prctl": 167, "fadvise64": 223, "sendfile": 71, "splice": 76, "preadv2": 286},
}.get(platform.machine(), {})

needs_seccomp = pytest.mark.skipif(not CALLS, reason="the numbers of the system calls are not known")

#: The errno of a call and, if given, the value of one of its arguments with which it fails.
Refusals = dict[str, tuple[int, tuple[int, int] | None]]


def sandbox(refusals: Refusals) -> list[str]:
    """A prefix for a command, as seccomp(2) of a container refuses calls."""
    program = []
    for call, (error, argument) in refusals.items():
        load, compare, give = (0x20, 0, 0), 0x15, 0x06
        block = [(give, 0, 0, ERRNO | error)]
        if argument is not None:
            block = [(*load, 16 + 8 * argument[0]), (compare, 0, 1, argument[1]), *block]
        program += [(*load, 0), (compare, 0, len(block), CALLS[call]), *block]
    program.append((0x06, 0, 0, ALLOW))
    code = b"".join(struct.pack("=HBBI", *one) for one in program)
    source = f"""
import ctypes, os, sys
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
prctl = ctypes.CDLL(None, use_errno=True).prctl
code = bytes.fromhex("{code.hex()}")
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0  # PR_SET_SECCOMP
os.execv(sys.argv[1], sys.argv[1:])
"""
    return [sys.executable, "-S", "-c", source]


@pytest.mark.slow
@needs_seccomp
@pytest.mark.parametrize("error", [92, 22], ids=["ENOPROTOOPT", "EINVAL"])
def test_without_so_reuseport_workers_share_a_socket(start, error: int) -> None:
    master = start(prefix=sandbox({"setsockopt": (error, (2, socket.SO_REUSEPORT))}))
    assert master.log().count("this system has no SO_REUSEPORT: all workers accept from one socket") == 1
    assert master.request()[0] in master.settled(2)
    master.ask("scale", workers=3)
    master.settled(3)
    master.ask("reload")
    pids = master.settled(3)
    held = master.hold(count=6)
    assert master.request()[0] in pids
    for client in held:
        client.close()
    assert master.stop() == 0


@pytest.mark.slow
@needs_seccomp
def test_without_so_reuseport_a_single_process_has_one_accept_loop(tmp_path: Path) -> None:
    prefix = sandbox({"setsockopt": (92, (2, socket.SO_REUSEPORT))})
    command = [*prefix, *COMMAND, "echo", *LISTEN, "--accept-loops", "4"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        warned = process.stderr.readline()
        port = re.search(r"listening on \S*:(\d+)", process.stderr.readline())
        process.terminate()
        process.communicate()
    assert "this system has no SO_REUSEPORT: 127.0.0.1:0 has one listening socket instead of 4" in warned
    assert port


@pytest.mark.slow
@needs_seccomp
def test_without_prctl_it_serves(start) -> None:
    master = start(prefix=sandbox({"prctl": (1, (0, 1))}))  # EPERM, PR_SET_PDEATHSIG
    workers = master.settled(2)
    assert master.request()[0] in workers
    os.kill(master.pid, signal.SIGKILL)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


@pytest.mark.slow
@needs_seccomp
@pytest.mark.parametrize("error", [1, 38], ids=["EPERM", "ENOSYS"])
def test_files_are_served_where_fast_ways_are_refused(start, tmp_path: Path, error: int) -> None:
    folder = tmp_path / "www"
    folder.mkdir()
    content = os.urandom(1 << 20)
    (folder / "file").write_bytes(content)
    refused = dict.fromkeys(("fadvise64", "sendfile", "splice", "preadv2"), (error, None))
    master = start(command=("files", str(folder)), prefix=sandbox(refused))
    with master.connect() as client:
        client.sendall(b"GET /file HTTP/1.0\r\n\r\n")
        head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == content


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "path", "status", "said"),
    [
        ("--pid-file", "none/pid", 1, "cannot start: --pid-file: PID file {}: No such file or directory"),
        ("--log-file", "none/log", 1, "cannot start: --log-file: log file {}: No such file or directory"),
        ("--control", "none/ctl", 1, "cannot start: --control: control socket {}: No such file or directory"),
        ("--control", "x" * 120, 2, "--control: must be a path of at most 107 bytes (unix(7)), got "),
        ("--control", "@" + "x" * 120, 2, "--control: must be a path of at most 107 bytes (unix(7)), got 121 of "),
        ("--control", "taken", 1, "cannot start: --control: control socket {}: the path exists and is no socket"),
    ],
)
def test_a_path_that_cannot_be_had_is_told_with_its_option(
    tmp_path: Path, option: str, path: str, status: int, said: str
) -> None:
    (tmp_path / "taken").touch()
    done = subprocess.run(
        [*COMMAND, "echo", *LISTEN, "--workers", "1", option, path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    name = path if option == "--log-file" else str(tmp_path / path)
    assert f"gtcpserver: {said.format(name)}" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize(("option", "what"), [("--pid-file", "PID file"), ("--control", "control socket")])
def test_a_full_folder_is_told_with_its_option(tmp_path: Path, option: str, what: str) -> None:
    mount = f"mount -t tmpfs -o size=4k,nr_inodes=2 none {tmp_path} && touch {tmp_path}/a"
    shell = ["unshare", "--mount", "sh", "-c", f'{mount} || exit 77; exec "$@"', "sh"]
    command = [*COMMAND, "echo", *LISTEN, "--workers", "1", option, str(tmp_path / "new")]
    done = subprocess.run([*shell, *command], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"no mounts: {done.stderr}")
    last = done.stderr.splitlines()[-1]
    assert last == f"gtcpserver: cannot start: {option}: {what} {tmp_path}/new: No space left on device"
    assert done.returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
@pytest.mark.parametrize(("owner", "group"), [("nobody", None), (None, 12345), ("12345", "nogroup"), (12345, 12346)])
@pytest.mark.parametrize("mode", [None, 0o660])
def test_a_unix_socket_has_its_owner_and_group(tmp_path: Path, owner: Any, group: Any, mode: int | None) -> None:
    import grp
    import pwd

    config = ListenConfig(unix_owner=owner, unix_group=group, unix_mode=mode)
    (listener,) = open_listeners(f"unix:{tmp_path}/socket", config)
    found = os.stat(tmp_path / "socket")
    listener.close()
    expected = {None: 0, "nobody": pwd.getpwnam("nobody").pw_uid}
    assert found.st_uid == expected.get(owner, 12345)
    assert found.st_gid == (0 if group is None else grp.getgrnam(group).gr_gid if group == "nogroup" else group)
    if mode is not None:
        assert stat.S_IMODE(found.st_mode) == mode


@pytest.mark.parametrize("field", ["unix_owner", "unix_group"])
@pytest.mark.parametrize("value", ["no such one", "", "a\0b", -1, 2**32 - 1, "99999999999", True, 1.5])
def test_an_owner_that_this_host_does_not_have(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a (user|group) of this host, got "):
        ListenConfig(**{field: value})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_socket_that_cannot_be_given_away_is_not_left_behind(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.setresuid(65534, 65534, 65534)\n"
        "from gtcpserver.listening.listener import *\n"
        "try: open_listeners('unix:' + sys.argv[1], ListenConfig(unix_owner=0))\n"
        "except OSError as error: print(error.strerror)\n"
    )
    os.chmod(tmp_path, 0o777)
    path = f"/tmp/gtcpserver-test-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", f"import gtcpserver.listening.listener, socket, encodings.idna\n{program}", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"unix:{path}: cannot be given to user and group (0, -1): Operation not permitted" in done.stdout, (
        done.stderr
    )
    assert not os.path.exists(path)


# -- preload -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("patched", [True, False])
def test_only_real_threads_are_warned_of(start, tmp_path: Path, patched: bool) -> None:
    extra = """
import threading
wait = gevent.sleep if PATCHED else time.sleep
threading.Thread(target=wait, args=(60,), daemon=True).start()
"""
    (tmp_path / "app.py").write_text(APP + extra.replace("PATCHED", str(patched)))
    master = start("--preload", *([] if patched else ["--no-monkey-patch"]))
    assert ("the program starts threads" in master.log()) is not patched


# -- ctl ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctl_does_not_wait_for_a_master_that_is_stopped(start, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    master = start()
    monkeypatch.setattr(ctl_module, "ANSWER_SECONDS", 0.2)
    master.send_signal(signal.SIGSTOP)
    try:
        for command in ("status", "stop"):
            done = CliRunner().invoke(ctl_module.ctl, ["--control", master.control, "--timeout", "0.2", command])
            assert done.exit_code == 1
            assert "no answer within 0.2 s" in done.output
    finally:
        master.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["status"], [10]), (["workers"], [10]), (["reopen"], [10]), (["reload"], [150]), (["upgrade"], [150]),
        (["scale", "2"], [150]), (["stop"], [10, None]), (["--timeout", "3", "stop"], [3, 3]),
        (["--timeout", "none", "status"], [None]),
    ],
)  # fmt: skip
def test_how_long_ctl_waits(monkeypatch: pytest.MonkeyPatch, arguments: list[str], seconds: list[float | None]) -> None:
    from click.testing import CliRunner

    asked: list[float | None] = []

    def ask(_path: str, request: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        asked.append(timeout)
        return {"state": "serving", "ready": True, "workers": [], "target": 0, "generation": 1, "restarts": 0, "pid": 1,
                "uptime": 1, "addresses": [], "stats": {}}  # fmt: skip

    monkeypatch.setattr(ctl_module, "ask", ask)
    CliRunner().invoke(ctl_module.ctl, ["--control", "x", *arguments], catch_exceptions=False)
    assert asked == seconds


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_time_out_that_is_none(value: str) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(ctl_module.ctl, ["--control", "x", "--timeout", value, "status"])
    assert done.exit_code == 2
    assert 'must be a number above 0, or "none"' in done.output
