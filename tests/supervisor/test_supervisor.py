"""Worker processes as an operator meets them: signals, files, hooks, the control socket, systemd, the Python API."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtcpserver.supervisor import ControlError
from kit.patience import SOON
from kit.supervised import APP, COMMAND, Load, Master, Start, alive, children, masters, wait_until

pytestmark = pytest.mark.slow

ORDINARY_USER = 65534  # nobody


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter: not tmp_path, which each pytest that starts closes to others again."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "app.py").write_text(APP)
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with masters(folder) as start:
        yield start


AS_ORDINARY_USER = ["setpriv", f"--reuid={ORDINARY_USER}", f"--regid={ORDINARY_USER}", "--clear-groups"]


def ordinary_user_can(what: str) -> bool:
    """Python may be where an ordinary user may not read it, or not start it again."""
    code = f"import os, sys, gtcpserver.cli.serve; sys.exit(not ({what}))"
    return subprocess.run([*AS_ORDINARY_USER, sys.executable, "-c", code], capture_output=True, cwd="/").returncode == 0


def ctl(master: Master, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "ctl", "--control", master.control, *arguments], capture_output=True, text=True, timeout=SOON
    )


# -- signals ---------------------------------------------------------------------------------------------------------


def test_sigterm_waits_for_handlers_and_new_clients_are_refused_meanwhile(start: Start) -> None:
    master = start("--workers", "2")
    held = master.connect()
    held.sendall(b"sleep 1\n")
    master.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            master.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(refused)
    assert held.makefile("rb").readline().split()[1] == b"last"
    held.close()
    assert master.wait() == 0
    # Some of the attempts came before the sockets were muted, and were served.
    assert re.search(r"stopped: \d+ connections? finished, 0 cut", master.log())


def test_handlers_that_do_not_finish_in_time_are_cut_and_told(start: Start) -> None:
    master = start("--workers", "1", "--graceful-timeout", "0.2")
    with master.connect() as client:
        client.sendall(b"sleep 60\n")
        master.wait_until_active(1)
        assert master.stop() == 0
    assert "stopped: 0 connections finished, 1 cut" in master.log()
    assert "app.py" in master.log()


def test_a_reload_cuts_no_connection_however_short_the_time_for_a_stop_is(start: Start) -> None:
    master = start("--workers", "1", "--stop-timeout", "0.1", "--probation", "0")
    with master.connect() as client:
        client.sendall(b"sleep 1\n")
        master.wait_until_active(1)
        assert "error" not in master.ask("reload")
        assert client.makefile("rb").readline().split()[1] == b"last"
    master.settled(1)
    assert master.stop() == 0
    assert re.search(r"stopped: \d+ connections? finished, 0 cut", master.log())


OLD_CONNECTIONS = """
def handler(conn):
    conn.accepted_at -= 60  # longer ago than any time that a stop gives to first requests
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\\n")
        except EOFError:
            return
        conn.sendall(line)
"""


@pytest.mark.parametrize("leave", ["reload", "upgrade", "scale"])
def test_clients_whose_first_request_comes_long_after_they_connected_lose_nothing_when_their_worker_leaves(
    start: Start, folder: Path, leave: str
) -> None:
    (folder / "app.py").write_text(OLD_CONNECTIONS)
    master = start("--workers", "2")
    clients = [master.connect() for _ in range(8)]
    master.wait_until_active(len(clients))
    if leave == "scale":
        assert "error" not in master.ask("scale", workers=1)
    else:
        assert "error" not in master.ask(leave)
    for client in clients:
        client.sendall(b"hello\n")
        assert client.makefile("rb").readline() == b"hello\n"
        client.close()


def test_connections_of_a_replaced_worker_end_within_the_retire_timeout(start: Start) -> None:
    master = start("--workers", "1", "--retire-timeout", "0.1", "--stop-timeout", "none")
    with master.connect() as client:
        client.sendall(b"sleep 60\n")
        master.wait_until_active(1)
        master.ask("reload")
        assert client.recv(1) == b""
    master.settled(1)


@pytest.mark.parametrize("upgraded", [False, True])
def test_a_stop_gives_connections_of_replaced_workers_no_longer_than_others(start: Start, upgraded: bool) -> None:
    master = start("--workers", "1", "--stop-timeout", "0.1")
    with master.connect() as client:
        client.sendall(b"sleep 60\n")
        master.wait_until_active(1)
        old = master.pid
        assert "error" not in master.ask("upgrade" if upgraded else "reload")
        if upgraded:
            # The service manager tells all processes of a service to stop, the old master too.
            os.kill(old, signal.SIGTERM)
            assert client.recv(1) == b""
            master.pid = master.ask("status")["pid"]
            assert master.pid != old
        assert master.stop() == 0
        assert client.recv(1) == b""
    assert "1 cut" in master.log()


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM, signal.SIGTERM],
        [signal.SIGINT, signal.SIGINT],
        [signal.SIGTERM, signal.SIGINT],
        [signal.SIGQUIT],
    ],
)
def test_a_second_sigterm_or_sigint_and_sigquit_end_everything_at_once(start: Start, numbers: list[int]) -> None:
    master = start("--workers", "2", "--graceful-timeout", "none")
    with master.connect() as client:
        client.sendall(b"sleep 60\n")
        master.wait_until_active(1)
        for number in numbers:
            master.send_signal(number)
            master.wait_for(signal.Signals(number).name)  # or two of the same become one
        assert master.wait() == 0
    assert "ending 2 workers now" in master.log()


def test_sigterm_to_a_worker_replaces_it_gracefully(start: Start) -> None:
    master = start("--workers", "1")
    (before,) = master.pids()
    held = master.hold()[0]
    os.kill(before, signal.SIGTERM)
    assert held.recv(100).split() == [str(before).encode(), b"last"]
    held.close()
    assert master.settled(1) != [before]
    assert "got SIGTERM: replacing it" in master.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_as_systemd_and_a_terminal_send_it_is_a_graceful_stop(
    start: Start, number: signal.Signals
) -> None:
    master = start("--workers", "2", start_new_session=True)
    held = master.hold(count=4)
    os.killpg(master.pid, number)
    for client in held:
        assert client.recv(100).split()[1] == b"last"
        client.close()
    assert master.wait() == 0
    assert "0 cut" in master.log()


def test_sigquit_to_every_process_as_a_terminal_sends_it_ends_at_once(start: Start) -> None:
    master = start("--workers", "2", start_new_session=True)
    held = master.hold(count=2)
    os.killpg(master.pid, signal.SIGQUIT)
    assert master.wait() == 0
    assert [client.recv(100) for client in held] == [b"", b""]
    assert "Traceback" not in master.log()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_as_process_1_of_a_container_it_buries_orphans_and_stops_in_order(folder: Path) -> None:
    (folder / "parent.py").write_text(
        "import subprocess\ndef handler(conn):\n"
        "    out = subprocess.run(['sh', '-c', 'sleep 0.1 & echo $!'], stdout=subprocess.PIPE).stdout\n"
        "    conn.sendall(out)\n"
    )
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let root make a PID namespace")
    arguments = ("serve", "parent:handler", "--bind", "127.0.0.1:0", "--workers", "2", "--control", str(folder / "ctl"))
    master = Master(folder, arguments, prefix=unshare).wait_listening()
    try:
        assert "(pid 1, 2 workers)" in master.log()
        for _ in range(5):
            with master.connect() as client:
                assert client.recv(20).strip().isdigit()
        (first,) = children(master.process.pid)
        wait_until(lambda: len(children(first)) == 2)
        with pytest.raises(ControlError, match="this is process 1"):
            master.ask("upgrade")
        master.ask("reload")
        os.kill(first, signal.SIGTERM)
        assert master.process.wait(SOON) == 0
        assert "stopped:" in master.log()
    finally:
        master.process.kill()
        master.process.wait()


def test_drain_delay_is_not_ready_and_accepts_still(start: Start) -> None:
    master = start("--workers", "1", "--drain-delay", "60")
    assert ctl(master, "status").returncode == 0
    master.send_signal(signal.SIGTERM)
    master.wait_for("SIGTERM: stopping")
    answer = ctl(master, "status", "--json")
    assert answer.returncode == 1
    assert json.loads(answer.stdout)["state"] == "draining"
    assert json.loads(answer.stdout)["ready"] is False
    assert master.request()[1] == "more"
    assert master.stop() == 0  # the second SIGTERM does not wait


def test_a_stop_goes_on_after_the_drain_delay(start: Start) -> None:
    master = start("--workers", "1", "--drain-delay", "0.1")
    assert master.stop() == 0


# -- files and identity ----------------------------------------------------------------------------------------------


def test_the_log_file_is_opened_again_by_all_processes(start: Start, folder: Path) -> None:
    (folder / "noisy.py").write_text(
        "import sys\ndef handler(conn):\n    print('noise', file=sys.stderr, flush=True)\n    conn.sendall(b'x')\n"
    )
    path = folder / "server.log"
    master = Master(
        folder,
        ("serve", "noisy:handler", "--bind", "127.0.0.1:0", "--workers", "2", "--log-file", "server.log"),
    )
    master.log_path = path
    wait_until(path.exists)
    master.wait_listening()
    try:
        path.rename(folder / "old.log")
        master.send_signal(signal.SIGUSR1)
        wait_until(path.exists)
        master.wait_for("reopened")

        def written_by_all() -> bool:
            with master.connect() as client:
                client.recv(1)
            return path.read_text().count("noise") >= 20

        wait_until(written_by_all)
        assert (folder / "old.log").read_text().count("noise") < 5
    finally:
        master.kill_all()


def test_a_first_start_that_fails_is_told_on_the_terminal_too(folder: Path) -> None:
    (folder / "app.py").write_text("1 / 0\n")
    master = Master(folder, ("serve", "app:handler", "--bind", "127.0.0.1:0", "--workers", "1", "--log-file", "file"))
    assert master.wait() == 3
    assert master.log().splitlines()[-1].startswith("gtcpserver: workers cannot start: app raised ZeroDivisionError")
    assert "not started" in (folder / "file").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_workers_drop_privileges_and_the_master_keeps_the_port(start: Start, folder: Path) -> None:
    (folder / "who.py").write_text(
        "import os\ndef handler(conn):\n    os.umask(mask := os.umask(0))\n"
        "    conn.sendall(f'{os.getuid()} {os.geteuid()} {os.getgid()} {os.getgroups()} {mask:o}\\n'.encode())\n"
    )
    master = start("--workers", "2", "--user", "nobody", "--group", "daemon", "--umask", "027", handler="who:handler")
    gid = int(subprocess.run(["id", "-g", "daemon"], capture_output=True, text=True).stdout)
    for _ in range(2):
        with master.connect() as client:
            answer = client.makefile().readline().split()
        assert answer[:3] == [str(ORDINARY_USER), str(ORDINARY_USER), str(gid)]
        assert answer[-1] == "27"
        assert "0" not in "".join(answer[3:-1]).strip("[]").split(",")
        master.ask("reload")
    master.ask("scale", workers=3)
    workers = master.pids()
    # The death of the master is told to another user's processes as well.
    master.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)), 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_everything_works_for_an_ordinary_user(folder: Path) -> None:
    shutil.chown(folder, ORDINARY_USER, ORDINARY_USER)
    if not ordinary_user_can("True"):
        pytest.skip("an ordinary user cannot run this Python")
    master = Master(
        folder,
        (
            *("serve", "app:handler", "--bind", "127.0.0.1:0", "--workers", "2", "--control", str(folder / "ctl")),
            *("--pid-file", "pid", "--umask", "077"),
        ),
        prefix=AS_ORDINARY_USER,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    ).wait_listening()
    try:
        clients = Load(master.port)
        for _ in range(3):
            master.ask("reload")
        master.ask("scale", workers=3)
        master.ask("scale", workers=1)
        os.kill(master.settled(1)[0], signal.SIGTERM)
        master.wait_for("got SIGTERM: replacing it")
        master.settled(1)  # before that an upgrade is refused
        if ordinary_user_can("os.access(sys.executable, os.X_OK)"):
            master.ask("upgrade")
            master.pid = int((folder / "pid").read_text())
        assert clients.end()["failures"] == []
        held = master.hold(count=3)
        queued = [master.connect() for _ in range(20)]
        for client in queued:
            client.sendall(b"x\n")
        master.send_signal(signal.SIGTERM)
        for client in held + queued:
            with client:
                assert client.makefile("rb").readline().split()[1] in (b"last", b"more")
        assert master.wait() == 0
    finally:
        master.kill_all()


def test_a_reload_finds_the_release_that_a_link_points_to_now(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "app.py").write_text("import helper\ndef handler(conn):\n    conn.sendall(helper.answer)\n")
        (tmp_path / name / "helper.py").write_text(f"answer = b'{name}'\n")
    current = tmp_path / "current"
    current.symlink_to("one")
    master = Master(
        tmp_path,
        ("serve", "app:handler", "--bind", "127.0.0.1:0", "--workers", "1", "--control", str(tmp_path / "ctl")),
        env={**os.environ, "PWD": str(current)},
        at=current,
    ).wait_listening()
    try:

        def answer() -> bytes:
            with master.connect() as client:
                return client.recv(10)

        assert answer() == b"one"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(current)
        master.ask("reload")
        assert answer() == b"two"
    finally:
        master.kill_all()


# -- the program -----------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_the_workers(start: Start, folder: Path) -> None:
    (folder / "hooks.py").write_text(
        "import sys\n"
        "from gtcpserver.supervisor import current_worker\n"
        "def say(*what): print(*what, file=sys.stderr, flush=True)\n"
        "def begin(worker): say('begin', worker.number, worker.generation, worker.server.address, worker.ready)\n"
        "def end(worker): say('end', worker.number, current_worker() is worker)\n"
        "def error(worker, why): say('error', worker.number, why)\n"
    )
    master = start(
        *("--workers", "1", "--worker-start", "hooks:begin", "--worker-stop", "hooks:end"),
        *("--worker-error", "hooks:error"),
    )
    assert f"begin 0 1 127.0.0.1:{master.port} False\n" in master.log()
    (pid,) = master.pids()
    os.kill(pid, signal.SIGKILL)
    master.wait_for(rf"error 0 worker 0 \(pid {pid}\) was killed by SIGKILL")
    master.settled(1)
    master.ask("reload")
    master.wait_for("end 0 True")
    assert f"begin 0 2 127.0.0.1:{master.port}" in master.log()
    assert master.stop() == 0
    assert master.log().count("end 0 True") == 2


def test_preloaded_code_is_shared_and_read_again_by_an_upgrade_alone(start: Start, folder: Path) -> None:
    source = (
        "import os\nimported_in = os.getpid()\ndef handler(conn):\n    conn.sendall(f'{imported_in} %s'.encode())\n"
    )
    (folder / "pre.py").write_text(source % "old")
    master = start("--workers", "2", "--preload", "--pid-file", "pid", handler="pre:handler")

    def answer() -> list[str]:
        with master.connect() as client:
            return client.recv(100).decode().split()

    assert answer() == [str(master.pid), "old"]
    (folder / "pre.py").write_text(source % "brand new")
    master.ask("reload")
    assert answer() == [str(master.pid), "old"]
    assert "an upgrade loads it again" in master.log()
    master.ask("upgrade")
    master.pid = int((folder / "pid").read_text())
    wait_until(lambda: answer() == [str(master.pid), "brand", "new"])


def test_a_preloaded_program_that_has_made_an_event_loop_is_served(start: Start, folder: Path) -> None:
    (folder / "early.py").write_text(
        "import gevent\ngevent.sleep(0)\ndef handler(conn):\n    gevent.sleep(0.01)\n    conn.sendall(b'x')\n"
    )
    master = start("--workers", "2", "--preload", handler="early:handler")
    for _ in range(8):
        with master.connect() as client:
            assert client.recv(10) == b"x"
    assert master.stop() == 0


def test_a_worker_above_its_memory_is_replaced_by_draining(start: Start, folder: Path) -> None:
    (folder / "hungry.py").write_text(
        "kept = []\ndef handler(conn):\n    kept.append(bytearray(conn.recv_exactly(1)) * 150_000_000)\n"
        "    conn.sendall(b'eaten')\n"
    )
    master = start("--workers", "1", "--recycle-memory", "120", handler="hungry:handler")
    (before,) = master.pids()
    with master.connect() as client:
        client.sendall(b"x")
        assert client.recv(10) == b"eaten"
    master.wait_for(r"uses \d+ MiB: replacing it")
    assert master.settled(1) != [before]


def test_the_programs_exit_handlers_run_in_the_worker_and_not_those_of_the_master(start: Start, folder: Path) -> None:
    (folder / "leaves.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: print('bye from', os.getpid(), file=sys.stderr, flush=True))\n"
        "def handler(conn): pass\n"
    )
    master = start("--workers", "1", handler="leaves:handler")
    (pid,) = master.pids()
    assert master.stop() == 0
    assert master.log().count(f"bye from {pid}") == master.log().count("bye from") == 1


def test_cpus_are_pinned_and_get_what_they_receive(start: Start) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    master = start("--workers", str(len(cpus)), "--pin-cpus")
    workers = {one["number"]: one["pid"] for one in master.workers()}
    for number, cpu in enumerate(cpus):
        assert os.sched_getaffinity(workers[number]) == {cpu}
    try:
        for number, cpu in enumerate(cpus):
            # On the loopback interface the CPU that sends is the one that receives.
            os.sched_setaffinity(0, {cpu})
            assert {master.request()[0] for _ in range(20)} == {workers[number]}
    finally:
        os.sched_setaffinity(0, set(cpus))


@pytest.mark.parametrize("kind", ["unix", "no-reuse-port"])
def test_sockets_that_all_workers_share_lose_nothing(start: Start, folder: Path, kind: str) -> None:
    if kind == "unix":
        path = folder / "sock"
        master = start("--workers", "2", bind=f"unix:{path}")
        master.wait_for("listening on unix:")

        def connect() -> socket.socket:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(SOON)
            client.connect(str(path))
            return client
    else:
        master = start("--workers", "2", "--no-reuse-port")
        connect = master.connect
    before = set(master.pids())
    answered = set()
    for number in range(30):
        with connect() as client:
            if number % 10 == 5:
                master.ask("reload")
            if number == 17:
                master.ask("scale", workers=4)
            if number == 18:
                master.ask("scale", workers=1)
            client.sendall(b"x\n")
            answered.add(int(client.makefile("rb").readline().split()[0]))
    assert answered - before
    queued = [connect() for _ in range(20)]
    for client in queued:
        client.sendall(b"hold %d\n" % SOON)  # until the stop begins
    master.send_signal(signal.SIGTERM)
    for client in queued:
        with client, client.makefile("rb") as answers:
            assert [answers.readline().split()[1] for _ in range(2)] == [b"held", b"last"]
    assert master.wait() == 0
    if kind == "unix":
        assert not path.exists()


def test_a_unix_path_survives_an_upgrade(start: Start, folder: Path) -> None:
    path = folder / "sock"
    master = start("--workers", "1", "--pid-file", "pid", bind=f"unix:{path}")
    master.wait_for("listening on unix:")
    master.ask("upgrade")
    wait_until(lambda: master.process.poll() is not None)
    master.pid = int((folder / "pid").read_text())
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SOON)
        client.connect(str(path))
        client.sendall(b"x\n")
        assert client.recv(100).split()[1] == b"more"
    master.stop()
    wait_until(lambda: not path.exists())  # its end: it is no child of this process


def test_several_addresses_and_tls_with_one_certificate(start: Start) -> None:
    master = start("--workers", "2", "--bind", "*:0", "--tls-self-signed")
    first, second = (int(part.rpartition(":")[2]) for part in master.wait_for("listening on (.*) \\(").split(", "))
    seen = set()
    for number in range(20):
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        port = (first, second)[number % 2]
        with socket.create_connection(("127.0.0.1", port), SOON) as plain, context.wrap_socket(plain) as client:
            seen.add(client.getpeercert(binary_form=True))
            client.sendall(b"x\n")
            assert client.recv(100).split()[1] == b"more"
    assert len(seen) == 1
    assert master.stop() == 0


# -- the control socket ----------------------------------------------------------------------------------------------


def test_ctl_tells_and_steers(start: Start) -> None:
    master = start("--workers", "2")
    for _ in range(10):
        master.request()
    status = json.loads(ctl(master, "status", "--json").stdout)
    assert status["stats"]["accepted"] == 10
    assert status["pid"] == master.pid
    assert "accepted             10" in ctl(master, "status").stdout
    table = ctl(master, "workers").stdout.splitlines()
    assert len([line for line in table if "ready" in line]) == 2
    before = master.pids()
    assert ctl(master, "reload").returncode == 0
    assert not set(before) & set(master.pids())
    assert ctl(master, "scale", "3").returncode == 0
    assert len(json.loads(ctl(master, "workers", "--json").stdout)) == 3
    # Counters of workers that are gone are kept.
    assert wait_until(lambda: len(master.ask("status")["workers"]) == 3)
    assert master.ask("status")["stats"]["accepted"] == 10
    assert ctl(master, "scale", "0").returncode == 2
    assert ctl(master, "stop").returncode == 0
    assert master.process.poll() == 0 or master.wait() == 0
    gone = ctl(master, "status")
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1
    assert "is a master running" in gone.stderr


def test_ctl_stop_now_ends_handlers(start: Start) -> None:
    master = start("--workers", "1", "--graceful-timeout", "none")
    with master.connect() as client:
        client.sendall(b"sleep 60\n")
        master.wait_until_active(1)
        assert ctl(master, "stop", "--now").returncode == 0
    assert master.wait() == 0
    assert "ctl stop --now: ending 1 worker now" in master.log()


def test_counters_of_a_killed_worker_are_kept(start: Start) -> None:
    master = start("--workers", "1")
    for _ in range(5):
        master.request()
    assert master.ask("status")["stats"]["accepted"] == 5
    os.kill(master.pids()[0], signal.SIGKILL)
    master.wait_for("was killed by SIGKILL")
    master.settled(1)
    master.request()
    stats = master.ask("status")["stats"]
    assert stats["accepted"] == 6
    assert stats["active"] <= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_control_socket_is_closed_to_other_users(start: Start, folder: Path) -> None:
    master = start("--workers", "1")
    assert os.stat(master.control).st_mode & 0o777 == 0o600
    code = "import sys; from gtcpserver.supervisor import ask; ask(sys.argv[1], {'command': 'stop'}, 10)"
    ask_as_nobody = [*AS_ORDINARY_USER, sys.executable, "-c", code, master.control]
    if not ordinary_user_can("True"):
        pytest.skip("an ordinary user cannot run this Python")
    for mode in (0o600, 0o666):  # its mode, and whom the kernel says has connected
        os.chmod(master.control, mode)
        done = subprocess.run(ask_as_nobody, capture_output=True, text=True, cwd="/", timeout=SOON)
        assert done.returncode == 1
        assert "ControlError" in done.stderr
    assert "a process of user 65534 was refused" in master.log()
    assert master.request()[1] == "more"


def test_nonsense_on_the_control_socket_harms_nobody(start: Start) -> None:
    master = start("--workers", "1")

    def say(data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SOON)
            client.connect(master.control)
            client.sendall(data)
            return client.makefile("rb").readline()

    for data, answer in (
        (b"\n", "a request must be a JSON object"),
        (b"[" * 4000 + b"\n", "a request must be a JSON object"),
        (b"[1]\n", "a request must be a JSON object"),
        (b"\xff\xfe\n", "a request must be a JSON object"),
        (b"x" * 40_000, "a request must be a line of at most 32768 bytes"),
        (b"{}\n", "no command None"),
        (b'{"command": ["status"]}\n', "no command"),
        (b'{"command": "scale"}\n', "workers must be a whole number from 1 to 1024, got None"),
        (b'{"command": "scale", "workers": 1e9}\n', "workers must be a whole number"),
    ):
        assert answer in json.loads(say(data))["error"]
    silent = []
    for _ in range(16):  # all places, and nothing said
        client = socket.socket(socket.AF_UNIX)
        client.connect(master.control)
        silent.append(client)
    assert master.request()[1] == "more"
    assert master.ask("status")["ready"]  # when the silent ones have been given up
    for client in silent:
        client.close()
    with pytest.raises(ControlError, match="no command 'dance'"):
        master.ask("dance")
    assert "Traceback" not in master.log()


# -- systemd ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def notified(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(SOON)
        yield sock


def until_told(sock: socket.socket, word: str) -> str:
    while word not in (text := sock.recv(4096).decode()):
        pass
    return text


def test_systemd_is_told_what_happens(start: Start, folder: Path, notified: socket.socket) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "200000"}
    master = start("--workers", "2", "--pid-file", "pid", env=environment)
    assert f"MAINPID={master.pid}" in until_told(notified, "READY=1")
    until_told(notified, "WATCHDOG=1")
    master.ask("reload")
    assert "MONOTONIC_USEC=" in until_told(notified, "RELOADING=1")
    assert "2 of 2 workers ready" in until_told(notified, "READY=1")
    before = master.pid
    master.ask("upgrade")
    master.pid = int((folder / "pid").read_text())
    assert master.pid != before
    until_told(notified, f"MAINPID={master.pid}")
    master.send_signal(signal.SIGTERM)
    until_told(notified, "STOPPING=1")
    assert master.wait() == 0


def activate(*arguments: str) -> list[str]:
    """A command that starts another with its descriptor 3 listening: systemd's own, or what it does."""
    launcher = """
        import os, socket, sys
        sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
        if sock.fileno() != 3:
            os.dup2(sock.fileno(), 3)
        os.set_inheritable(3, True)
        os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
        os.execvp(sys.argv[2], sys.argv[2:])
    """
    return [sys.executable, "-c", textwrap.dedent(launcher), *arguments]


@pytest.mark.parametrize("workers", [(), ("--workers", "2")])
def test_sockets_from_systemd_are_served(folder: Path, workers: tuple[str, ...]) -> None:
    with (folder / "log0").open("wb") as log:
        command = [*COMMAND, "serve", "app:handler", *workers]
        process = subprocess.Popen(activate("0", *command), cwd=folder, stderr=log)
    try:
        log_text = (folder / "log0").read_text
        wait_until(lambda: "listening on" in log_text())
        port = int(log_text().partition("listening on 127.0.0.1:")[2].split()[0])
        with socket.create_connection(("127.0.0.1", port), SOON) as client:
            client.sendall(b"x\n")
            assert client.recv(100).split()[1] == b"more"
        assert port != 5000
    finally:
        process.terminate()
        assert process.wait(SOON) == 0


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="needs systemd-socket-activate (systemd)")
def test_systemd_socket_activate_starts_it_and_keeps_the_socket_over_upgrades(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*COMMAND, "serve", "app:handler", "--workers", "2", "--pid-file", "pid"]
    with (folder / "log0").open("wb") as log:
        process = subprocess.Popen(
            ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-E", "PATH", *command], cwd=folder, stderr=log
        )
    pid_file = folder / "pid"

    def ask() -> list[bytes]:
        with socket.create_connection(("127.0.0.1", port), SOON) as client:
            client.sendall(b"x\n")
            return client.makefile("rb").readline().split()

    try:
        wait_until(lambda: "Listening on" in (folder / "log0").read_text())
        assert ask()[1] == b"more"
        wait_until(lambda: "listening on" in (folder / "log0").read_text())
        first = int(pid_file.read_text())
        os.kill(first, signal.SIGUSR2)
        wait_until(lambda: int(pid_file.read_text()) != first)
        second = int(pid_file.read_text())
        wait_until(lambda: not alive(first))
        assert ask()[1] == b"more"
        os.kill(second, signal.SIGHUP)
        wait_until(lambda: "reload 1 is done" in (folder / "log0").read_text())
        assert ask()[1] == b"more"
        os.kill(second, signal.SIGTERM)
        wait_until(lambda: not alive(second))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(SOON)


# -- from Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["handler", "'app:handler'"])
def test_run_with_workers_in_a_program(folder: Path, handler: str) -> None:
    (folder / "program.py").write_text(
        "from app import handler\nfrom gtcpserver import run\n"
        f"print(run({handler}, bind='127.0.0.1:0', workers=2, timeout=30, control='ctl'), flush=True)\n"
    )
    with (folder / "log0").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=folder, stderr=log, stdout=subprocess.PIPE, text=True
        )
    try:
        wait_until(lambda: "listening on" in (folder / "log0").read_text())
        port = int((folder / "log0").read_text().partition("listening on 127.0.0.1:")[2].split()[0])
        workers = set()
        while len(workers) < 2:
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                client.sendall(b"x\n")
                workers.add(client.recv(100).split()[0])
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reload 1 is done" in (folder / "log0").read_text())
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=SOON)
    assert process.returncode == 0
    assert output.startswith("StopReport(finished=")


def test_run_without_workers_takes_names_and_bind_too(folder: Path) -> None:
    code = "from gtcpserver import run; run('app:handler', bind='127.0.0.1:0', max_accepts=0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 2
    assert done.stderr == "gtcpserver: max_accepts must be a whole number from 1, or None for no limit, got 0\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("handler, workers=0", "workers must be a whole number from 1"),
        ("handler, workers=2, pool=0", "pool must have at least 1 place"),
        ("handler, workers=2, accept_loops=2", "accept_loops cannot be used together with workers"),
        ("'nothing', workers=2", "handler and hooks must be callable or "),
        ("'app:nothing', workers=2", "app has no 'nothing'"),
    ],
)
def test_run_with_workers_says_what_is_wrong(folder: Path, arguments: str, said: str) -> None:
    code = f"from app import handler; from gtcpserver import run; run({arguments}, bind='127.0.0.1:0')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
