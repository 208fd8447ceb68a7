"""What becomes of workers and masters that fail: blocked, crashing, killed, badly upgraded."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.supervised import APP, Load, Master, Start, alive, children, wait_until

pytestmark = pytest.mark.slow


def test_a_worker_that_computes_for_ever_is_dumped_and_replaced_while_others_serve(start: Start) -> None:
    master = start("--workers", "2", "--worker-timeout", "2")
    blocked_client = master.connect()
    blocked_client.sendall(b"block 1000\n")
    # New connections go to the other worker as soon as the beats are missed.
    master.wait_for(r"worker \d+ lags: new connections go to the others")
    served = {master.request()[0] for _ in range(20)}
    blocked = int(master.wait_for(r"worker \d+ \(pid (\d+)\): event loop blocked"))
    assert blocked not in served
    assert blocked_client.makefile("rb").readline() == b""
    after = master.settled(2)
    assert blocked not in after
    log = master.log()
    assert "running now:" in log
    assert "app.py" in log
    assert "while time.monotonic() < time_to_end" in log
    assert not alive(blocked)


def test_a_worker_that_blocks_while_it_leaves_is_ended_though_it_has_no_time_out(start: Start) -> None:
    master = start("--workers", "1", "--worker-timeout", "1", "--graceful-timeout", "none")
    (before,) = master.pids()
    with master.connect() as client:
        client.sendall(b"block 60 0.5\n")
        master.wait_until_active(1)
        master.ask("reload")
        master.wait_for(rf"pid {before}\): event loop blocked")
        wait_until(lambda: not alive(before))
    assert master.settled(1) != [before]
    assert master.stop() == 0


def test_a_worker_stuck_in_c_code_is_dumped_by_faulthandler_and_replaced(start: Start, tmp_path: Path) -> None:
    # sum() holds the interpreter: no signal handler of Python's runs in it.
    (tmp_path / "stuck.py").write_text("def handler(conn):\n    sum(range(1 << 40))\n")
    master = Master(
        tmp_path,
        (
            *("serve", "stuck:handler", "--bind", "127.0.0.1:0", "--workers", "1", "--worker-timeout", "1"),
            *("--control", str(tmp_path / "ctl")),
        ),
    ).wait_listening()
    try:
        (before,) = master.pids()
        with master.connect():
            master.wait_for(r"is ready after", 2)
            wait_until(lambda: not alive(before))
        assert master.settled(1) != [before]
        assert "Fatal Python error: Aborted" in master.log()
        assert "stuck.py" in master.log()
    finally:
        master.kill_all()


def test_a_late_worker_gets_no_new_connections_until_it_has_caught_up(start: Start) -> None:
    master = start("--workers", "2")
    with master.connect() as client:
        client.sendall(b"block 1.5\n")
        late = master.wait_for(r"worker (\d+) lags")
        late_pid = master.workers()[int(late)]["pid"]
        assert late_pid not in {master.request()[0] for _ in range(20)}
        assert client.recv(100).split()[1] == b"more"
    master.wait_for(rf"worker {late} has caught up")
    wait_until(lambda: master.request()[0] == late_pid)


def test_a_worker_that_crashes_is_replaced_at_once(start: Start) -> None:
    master = start("--workers", "1")
    (before,) = master.pids()
    with master.connect() as client:
        client.sendall(b"crash\n")
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass
    assert master.request()[0] != before
    assert "SIGSEGV" in master.log()


def test_starts_that_fail_back_off_and_the_reason_is_logged(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1")
    (before,) = master.pids()
    (tmp_path / "app.py").write_text("raise RuntimeError('not today')\n")
    os.kill(before, signal.SIGKILL)
    # At once, then after 0.5, 1 and 2 s, each with the time the start itself takes.
    master.wait_for("could not start.*; trying again in", count=4)
    failures = re.findall(r"(?m)^\S+T(\d+):(\d+):(\S+)Z .* could not start.*; trying again in (\S+) s", master.log())
    assert [float(pause) for *_, pause in failures[:4]] == [0.5, 1, 2, 4]
    times = [(int(hour) * 60 + int(minute)) * 60 + float(second) for hour, minute, second, _ in failures[:4]]
    for number, pause in enumerate((0.5, 1, 2)):
        assert (times[number + 1] - times[number]) % 86_400 >= pause - 0.01, master.log()
    assert "RuntimeError: not today" in master.log()
    assert "app.py" in master.log()
    (tmp_path / "app.py").write_text(APP + "\n# whole again\n")
    master.send_signal(signal.SIGHUP)  # nobody has to wait for the end of the back-off
    assert master.request()[1] == "more"


def test_a_reload_to_code_that_cannot_start_changes_nothing(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2")
    before = master.pids()
    (tmp_path / "app.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(Exception, match="app raised ModuleNotFoundError while it was imported"):
        master.ask("reload")
    assert master.settled(2) == before
    # The first new worker goes ahead alone: one start has failed, not two.
    assert master.log().count("cannot start") == 1
    (tmp_path / "app.py").write_text(APP + "\n# whole again\n")
    master.ask("reload")
    assert not set(master.settled(2)) & set(before)


def test_an_upgrade_to_code_that_raises_leaves_the_old_generation(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2", "--pid-file", "pid")
    before = master.pids()
    clients = Load(master.port)
    try:
        (tmp_path / "app.py").write_text("raise RuntimeError('bad release')\n")
        with pytest.raises(Exception, match="app raised RuntimeError while it was imported"):
            master.ask("upgrade")
        # The command itself may be what is broken.
        (tmp_path / "gtcpserver.py").write_text("raise RuntimeError('broken library')\n")
        master.send_signal(signal.SIGUSR2)
        master.wait_for(r"the upgrade failed, the old master serves on", 2)
        assert master.settled(2) == before
        assert (tmp_path / "pid").read_text() == f"{master.pid}\n"
        wait_until(lambda: set(children(master.pid)) == set(before))
        (tmp_path / "gtcpserver.py").unlink()
        (tmp_path / "app.py").write_text(APP + "\n# whole again\n")
        master.ask("upgrade")
        master.pid = int((tmp_path / "pid").read_text())
        assert not set(master.settled(2)) & set(before)
    finally:
        met = clients.end()
    assert met["failures"] == []


@pytest.mark.parametrize("busy", [False, True])
def test_no_worker_outlives_a_master_killed_by_9(start: Start, busy: bool) -> None:
    master = start("--workers", "3")
    pids = master.pids()
    held = master.hold(count=3) if busy else []
    if busy:
        blocker = master.connect()
        blocker.sendall(b"block 1000\n")
        master.wait_for(r"worker \d+ lags")
    master.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)))
    for client in held:
        client.close()
    again = start("--workers", "1", bind=f"127.0.0.1:{master.port}")
    assert again.request()[1] == "more"


def test_a_new_master_does_not_start_beside_a_running_one(start: Start, tmp_path: Path) -> None:
    start("--workers", "1", "--pid-file", "pid")
    second = Master(tmp_path, ("serve", "app:handler", "--workers", "1", "--bind", "127.0.0.1:0", "--pid-file", "pid"))
    assert second.wait() == 1
    assert "is running" in second.log()


def test_two_hundred_replacements_leave_no_zombie_and_no_descriptor(start: Start) -> None:
    master = start("--workers", "4", "--probation", "0")
    master.settled(4)
    master.ask("reload")
    wait_until(lambda: len(children(master.pid)) == 4)
    before = open_files(master.pid)
    replaced = 0
    while replaced < 100:
        for pid in master.settled(4):
            os.kill(pid, signal.SIGKILL)
        replaced += 4
        master.wait_for("was killed by SIGKILL", replaced)
    while replaced < 200:
        master.ask("reload")
        replaced += 4
    pids = master.settled(4)
    assert sorted(children(master.pid)) == sorted(pids)
    assert "Z" not in children(master.pid).values()
    wait_until(lambda: open_files(master.pid) == before)
    counts = {len(open_files(pid)) for pid in pids}
    assert max(counts) < 25, counts


def open_files(pid: int) -> list[str]:
    """What a process has open, without the numbers that tell two sockets apart."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}").split(":[")[0])
        except FileNotFoundError:
            pass
    return sorted(found)


def test_a_worker_holds_no_socket_of_another_slot(start: Start) -> None:
    master = start("--workers", "3")
    inodes = {}
    with open("/proc/net/tcp") as file:
        for line in file.readlines()[1:]:
            columns = line.split()
            if int(columns[1].split(":")[1], 16) == master.port and columns[3] == "0A":
                inodes[f"socket:[{columns[9]}]"] = set()
    assert len(inodes) == 3
    for pid in master.pids():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if name in inodes:
                inodes[name].add(pid)
    assert sorted(len(holders) for holders in inodes.values()) == [1, 1, 1]


def test_the_first_start_that_fails_ends_with_3_and_the_error(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("def helper():\n    raise RuntimeError('no database')\nhelper()\n")
    master = Master(tmp_path, ("serve", "app:handler", "--workers", "3", "--bind", "127.0.0.1:0"))
    assert master.wait() == 3
    lines = master.log().splitlines()
    assert lines[-1] == "gtcpserver: workers cannot start: app raised RuntimeError while it was imported"
    assert lines.count("RuntimeError: no database") == 1
    assert any("helper()" in line for line in lines)
    assert "gtcpserver/supervisor" not in master.log()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "ap:handler", "--workers", "2"], "MODULE:HANDLER: no module 'ap'"),
        (["serve", "app:nothing", "--workers", "2"], "MODULE:HANDLER: app has no 'nothing'"),
        (["serve", "app:handler", "--workers", "0"], "--workers: must be a whole number from 1, got 0"),
        (["serve", "app:handler", "--workers", "many"], "--workers: must be a whole number or \"auto\", got 'many'"),
        (["serve", "app:handler", "--workers", "5000"], "--workers: must be at most 1024, got 5000"),
        (["serve", "app:handler", "--pid-file", "x"], "--pid-file: needs --workers"),
        (["serve", "app:handler", "--worker-start", "app:x"], "--worker-start: needs --workers"),
        (["serve", "app:handler", "--workers", "1", "--accept-loops", "3"], "--accept-loops: cannot be used together"),
        (["serve", "app:handler", "--workers", "1", "--worker-timeout", "0"], "--worker-timeout: must be a number, 1"),
        (["serve", "app:handler", "--workers", "1", "--drain-delay", "-1"], "--drain-delay: must be a number, 0"),
        (["serve", "app:handler", "--workers", "1", "--recycle-after", "0"], "--recycle-after: must be a whole"),
        (["serve", "app:handler", "--workers", "1", "--user", "no-such-user"], "--user: must be one of this host's"),
        (["serve", "app:handler", "--workers", "1", "--group", "no-such"], "--group: must be one of this host's"),
        (["serve", "app:handler", "--workers", "1", "--umask", "9"], "--umask: must be permission bits in octal"),
        (["serve", "app:handler", "--workers", "1", "--worker-stop", "app:two"], "--worker-stop: app:two must take"),
        (["echo", "--workers", "2", "--pool", "0"], "--pool: must have at least 1 place"),
    ],
)
def test_wrong_call_is_one_line_and_status_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "app.py").write_text("def handler(conn): ...\ndef two(one, more): ...\n")
    done = run_command(*arguments, "--bind", "127.0.0.1:0", cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"gtcpserver: {said}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--worker-user", "nobody"], "--worker-user: needs --workers"),
        (["--worker-user", "no-such-user", "--workers", "1"], "--worker-user: must be one of this host's"),
    ],
)
def test_the_workers_user_of_a_proxy_has_an_option_of_its_own(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run_command("proxy", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gtcpserver: {said}")


def test_address_in_use_is_one_line_and_status_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        master = Master(tmp_path, ("echo", "--workers", "2", "--bind", f"127.0.0.1:{port}"))
        assert master.wait() == 1
    assert master.log().startswith(f"gtcpserver: cannot start: 127.0.0.1:{port} is already in use by another server")
    assert len(master.log().splitlines()) == 1


def test_a_worker_that_ends_by_itself_is_replaced(start: Start, tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("import os\ndef handler(conn):\n    os._exit(0)\n")
    master = Master(
        tmp_path,
        ("serve", "leaving:handler", "--bind", "127.0.0.1:0", "--workers", "1", "--control", str(tmp_path / "ctl")),
    ).wait_listening()
    try:
        (before,) = master.pids()
        with master.connect() as client:
            assert client.recv(10) == b""
        wait_until(lambda: master.pids() not in ([], [before]))
        assert "exited with status 0" in master.log()
    finally:
        master.kill_all()
