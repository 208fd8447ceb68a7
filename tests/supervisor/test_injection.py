"""A master whose system calls fail now and again: the service goes on, and nothing is lost or kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gtcpserver.supervisor import ControlError
from gtcpserver.supervisor.channel import Channel, make_pair
from gtcpserver.supervisor.messages import MASTER_KINDS, WORKER_KINDS
from gtcpserver.supervisor.slots import WorkerProcess
from injection.strace import command, injecting, needs_strace
from kit.patience import SOON
from kit.simulated import SimulatedSystem
from kit.supervised import APP, Master, Start, alive, wait_until


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    "rule",
    [
        "poll:error=ENOMEM",
        "poll:error=EINVAL:when=1+2",
        "recvfrom:error=ENOMEM",
        "recvfrom:error=ENOBUFS:when=1+3",
        "wait4:error=ECHILD",
        "sendto:error=ENOBUFS:when=1+2",
    ],
)
def test_a_healthy_worker_is_kept_and_the_service_goes_on(start: Start, tmp_path: Path, rule: str) -> None:
    master = start("--workers", "2", "--metrics", "0")
    workers = master.settled(2)
    with injecting(master.pid, tmp_path / "trace", rule, follow=False) as trace:
        began = time.monotonic()
        trace.wait(3)
        # A failure pauses the master for a quarter of a second; within a turn several calls may fail.
        assert trace.failed() < 20 + 40 * (time.monotonic() - began)
        assert {master.request()[1] for _ in range(4)} == {"more"}
        assert alive(master.pid)
    assert master.settled(2) == workers
    assert master.ask("status")["restarts"] == 0
    assert "the monitor (pid" not in master.log()
    assert master.stop() == 0


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    "rule",
    [
        "poll:error=ENOMEM",
        "sendto:error=EAGAIN:when=1..3",
        "sendmsg:error=ENOBUFS:when=1..4",
        "read:error=EIO:when=1+2",
    ],
)
def test_commands_and_signals_are_obeyed_meanwhile(start: Start, tmp_path: Path, rule: str) -> None:
    master = start("--workers", "1")
    (before,) = master.settled(1)
    with injecting(master.pid, tmp_path / "trace", rule, follow=False):
        master.send_signal(signal.SIGTTIN)
        wait_until(lambda: len(master.pids()) == 2)
        # "retire" is among the messages that cannot be sent at once: an old worker that does not hear of it stays.
        master.ask("reload")
        wait_until(lambda: not alive(before))
        master.settled(2)
    assert master.stop() == 0


@pytest.mark.slow
@needs_strace
def test_a_worker_that_cannot_read_what_it_is_told_reads_it_later(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1")
    (before,) = master.settled(1)
    with injecting(before, tmp_path / "trace", "recvmsg:error=ENOMEM:when=1..2", follow=False) as trace:
        master.ask("reload")
        trace.wait(2)
        assert trace.failed() < 5
        wait_until(lambda: not alive(before))
    assert "is gone" not in master.log()
    assert master.stop() == 0


@pytest.mark.slow
@needs_strace
def test_a_worker_that_cannot_be_forked_is_forked_later(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1")
    (before,) = master.settled(1)
    with injecting(
        master.pid, tmp_path / "trace", "clone:error=EAGAIN:when=1", "clone3:error=EAGAIN:when=1", follow=False
    ):
        os.kill(before, signal.SIGKILL)
        master.wait_for("cannot start worker 0: Resource temporarily unavailable; trying again in 0.5 s")
        assert master.request()[1] == "more"
    assert master.stop() == 0


@pytest.mark.slow
@needs_strace
def test_the_control_socket_waits_for_descriptors_and_does_not_spin(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1")
    with socket.socket(socket.AF_UNIX) as client:
        with injecting(master.pid, tmp_path / "trace", "accept4:error=EMFILE", follow=False) as trace:
            client.connect(master.control)
            client.sendall(b'{"command": "status"}\n')
            began = time.monotonic()
            trace.wait(3)
            # Four times a second.
            assert trace.failed() <= 3 + 8 * (time.monotonic() - began)
            assert time.monotonic() - began > 0.3
        client.settimeout(60)
        assert json.loads(client.makefile("rb").readline())["state"] == "serving"


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("error", ["ECONNABORTED", "EINTR", "EPERM", "ENOBUFS"])
def test_a_client_of_the_control_socket_that_is_gone_keeps_it_from_no_other(
    start: Start, tmp_path: Path, error: str
) -> None:
    """ECONNABORTED: it has left before it was accepted, accept(2). EPERM: a firewall's rule."""
    master = start("--workers", "1")
    with injecting(master.pid, tmp_path / "trace", f"accept4:error={error}:when=1..2", follow=False) as trace:
        assert master.ask("status")["state"] == "serving"
        assert trace.failed() == 2
    assert "the master failed" not in master.log()
    assert master.ask("reload") == {"ok": True}
    assert master.stop() == 0


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["single", "workers"])
def test_a_limit_of_open_files_that_may_not_be_read_is_told_and_left(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """prlimit(2), refused by a seccomp filter."""
    (tmp_path / "app.py").write_text(APP)
    prefix = command(["prlimit64:error=EPERM"], tmp_path / "trace", follow=False)
    master = Master(tmp_path, ("serve", "app:handler", "--bind", "127.0.0.1:0", *workers), prefix=prefix)
    try:
        master.wait_listening()
        assert "WARNING" in master.wait_for(".*cannot read the limit of open files: .*")
        assert master.request()[1] == "more"
        os.kill(int(master.wait_for(r"listening on .*\(pid (\d+)")), signal.SIGTERM)
        assert master.process.wait(SOON) == 0
    finally:
        master.kill_all()


@pytest.mark.slow
@needs_strace
def test_an_upgrade_that_cannot_be_started_is_told(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1")
    refused = pytest.raises(ControlError, match="Too many open files")
    with injecting(master.pid, tmp_path / "trace", "socketpair:error=EMFILE", follow=False), refused:
        master.ask("upgrade")
    assert master.request()[1] == "more"


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("rule", ["openat:error=EMFILE", "dup2:error=EBUSY", "dup3:error=EBUSY"])
def test_a_log_file_that_cannot_be_opened_again_is_told_and_another_time_it_is(tmp_path: Path, rule: str) -> None:
    log = tmp_path / "file.log"
    (tmp_path / "app.py").write_text(APP)
    options = ("--workers", "1", "--log-file", str(log), "--control", str(tmp_path / "ctl"))
    master = Master(tmp_path, ("serve", "app:handler", "--bind", "127.0.0.1:0", *options))
    try:
        wait_until(lambda: log.exists() and "listening on" in log.read_text())
        (worker,) = master.settled(1)
        log.rename(tmp_path / "old.log")
        descriptors = len(os.listdir(f"/proc/{master.pid}/fd"))
        with injecting(master.pid, tmp_path / "trace", rule, follow=False) as trace:
            try:
                master.ask("reopen")
                told = ""
            except ControlError as error:
                told = str(error)
            injected_any = trace.failed() > 0
        if injected_any:
            assert "cannot reopen the log file" in told
            assert "cannot reopen the log file" in (tmp_path / "old.log").read_text()
        master.ask("reopen")
        wait_until(lambda: os.readlink(f"/proc/{worker}/fd/2") == str(log))
        wait_until(lambda: len(os.listdir(f"/proc/{master.pid}/fd")) <= descriptors)
    finally:
        master.kill_all()


@pytest.mark.slow
@needs_strace
def test_systemd_is_told_again_what_it_could_not_be_told(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        master = start("--workers", "1", env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
        while b"READY=1" not in manager.recv(1000):
            pass
        with injecting(master.pid, tmp_path / "trace", "sendto:error=EAGAIN:when=1..2", follow=False) as trace:
            master.send_signal(signal.SIGHUP)
            trace.wait(2)
            said = [manager.recv(1000)]
            while b"READY=1" not in said[-1]:
                said.append(manager.recv(1000))
        assert said[0].startswith(b"RELOADING=1\nMONOTONIC_USEC=")


@pytest.mark.slow
def test_a_stop_that_waits_for_handlers_does_not_spin(start: Start) -> None:
    master = start("--workers", "1")
    (client,) = master.hold()
    with client:
        master.send_signal(signal.SIGTERM)
        master.wait_for("SIGTERM: stopping")
        client.sendall(b"sleep 1\n")
        before = cpu_seconds(master.pid)
        time.sleep(1)
        assert cpu_seconds(master.pid) - before < 0.3
    master.stop(signal.SIGQUIT)


@pytest.mark.parametrize("failing", [{"kill"}, set()], ids=["EPERM", "ESRCH"])
def test_a_process_that_is_not_killed_at_once_is_killed_again(failing: set[str]) -> None:
    system = SimulatedSystem()
    system.failing = failing
    ours, _ = system.make_pair(WORKER_KINDS, MASTER_KINDS)
    worker = WorkerProcess(0, 12345, ours, 1, system)
    worker.kill()
    assert worker.kill_at is not None
    assert 0 < worker.kill_at - system.now <= 1


class Moody:
    """A socket whose calls fail, one after the other, before they work."""

    def __init__(self, sock: socket.socket, *errors: int) -> None:
        self.sock = sock
        self.errors = list(errors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        if self.errors:
            raise OSError(self.errors.pop(0), "now and again")
        return self.sock.sendmsg(*arguments)


def test_a_message_is_kept_until_it_can_be_sent_and_the_newest_of_a_kind_counts() -> None:
    from errno import EAGAIN, EMSGSIZE, ENOBUFS, ENOMEM, ETOOMANYREFS

    here, there = make_pair(WORKER_KINDS, MASTER_KINDS)
    moody: Any = Moody(here._sock, ENOBUFS, ENOMEM, EAGAIN, ETOOMANYREFS)  # noqa: SLF001  what there is behind a channel
    channel = Channel(moody, WORKER_KINDS)
    channel.send("unready")
    channel.send("retire", timeout=5)
    channel.send("retire", timeout=1)
    assert not channel.flush()
    assert there.receive() == []
    assert channel.finish(1)
    assert [(message.kind, message.fields) for message, _ in there.receive()] == [
        ("unready", {}),
        ("retire", {"timeout": 1}),
    ]
    moody.errors.append(EMSGSIZE)
    channel.send("report")  # never to be sent, and no reason to hold up others
    channel.send("halt")
    assert [message.kind for message, _ in there.receive()] == ["halt"]
    channel.close()
    there.close()
