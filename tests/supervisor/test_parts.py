"""The parts of the supervisor that need no process: messages, totals, configuration, files, steering programs."""

from __future__ import annotations

import inspect
import os
import socket
from pathlib import Path
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import ConfigError, ListenConfig, parse_address
from gtcpserver.listening.draining import BPF_LOAD_WORD, BPF_RETURN
from gtcpserver.listening.listener import open_listeners
from gtcpserver.supervisor import SupervisorConfig, systemd
from gtcpserver.supervisor.channel import make_pair
from gtcpserver.supervisor.dump import format_stacks
from gtcpserver.supervisor.messages import (
    MASTER_KINDS,
    MAX_BYTES,
    MAX_TEXT,
    WORKER_KINDS,
    Message,
    MessageError,
    decode,
    encode,
)
from gtcpserver.supervisor.pid_file import PidFile
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState, describe_status
from gtcpserver.supervisor.sockets import ListeningSockets
from gtcpserver.supervisor.steering import NOBODY, SKF_AD_CPU, by_cpu, spread
from gtcpserver.supervisor.system import REAL_SYSTEM
from gtcpserver.supervisor.totals import Totals, add_up

# -- messages --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data: bytes) -> None:
    try:
        message = decode(data, WORKER_KINDS)
    except MessageError:
        return
    assert message.kind in WORKER_KINDS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    st.sampled_from(sorted(WORKER_KINDS)), st.dictionaries(st.sampled_from(["lag", "why", "stats", "x"]), json_values)
)
def test_what_is_encoded_is_decoded(kind: str, fields: dict[str, Any]) -> None:
    assert decode(encode(kind, **fields), WORKER_KINDS) == Message(kind, fields)


@pytest.mark.slow
@given(json_values)
def test_fields_of_another_type_are_no_error(value: Any) -> None:
    message = Message("beat", {"x": value})
    assert isinstance(message.text("x"), str)
    assert isinstance(message.number("x"), (int, float))
    assert message.seconds("x") is None or isinstance(message.seconds("x"), (int, float))


def test_long_texts_keep_their_end_and_fit_a_packet() -> None:
    data = encode("failed", error="\x00" * 10, details="é" * 200_000 + "the end")
    assert len(data) <= MAX_BYTES
    assert decode(data, WORKER_KINDS).text("details").endswith("éthe end")
    message = decode(encode("failed", details="x" * 200_000 + "the end"), WORKER_KINDS)
    assert message.text("details").endswith("the end")
    assert len(message.text("details")) == MAX_TEXT + 3


def test_a_message_of_the_other_side_is_refused() -> None:
    with pytest.raises(MessageError, match="expected one of"):
        decode(encode("ready"), MASTER_KINDS)


def test_a_channel_keeps_messages_apart_and_passes_descriptors() -> None:
    here, there = make_pair(WORKER_KINDS, MASTER_KINDS)
    with open(os.devnull) as file:
        there.send("ready")
        there.send("beat", lag=0.5)
        here.send("reopen", fd=file.fileno())
        assert [message.kind for message, _ in here.receive()] == ["ready", "beat"]
        ((message, fd),) = there.receive()
        assert message.kind == "reopen"
        assert fd is not None
        assert os.fstat(fd).st_rdev == os.fstat(file.fileno()).st_rdev
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert not here.ended
    there.close()
    assert here.receive() == []
    assert here.ended
    here.close()


def test_a_channel_never_waits_for_its_reader() -> None:
    here, there = make_pair(WORKER_KINDS, MASTER_KINDS)
    sent = 0
    while here.flush():
        here.send("report", padding="x" * 10_000)
        sent += 1
    for _ in range(1000):
        here.send("report")  # as many as are kept, then none
    assert not here.send_if_clear("report")
    got = []
    while True:
        got += there.receive()
        if here.flush() and not (more := there.receive()):
            break
        got += more if here.flush() else []
    assert sent <= len(got) <= sent + 70
    here.close()
    there.close()


@pytest.mark.slow
def test_too_big_a_message_is_an_error_where_it_is_made() -> None:
    with pytest.raises(MessageError, match=f"at most {MAX_BYTES} bytes"):
        encode("beat", stats={str(number): number for number in range(20_000)})


# -- totals ----------------------------------------------------------------------------------------------------------


def test_counters_add_up_and_those_of_dead_workers_stay() -> None:
    totals = Totals()
    one = {"accepted": 5, "active": 2, "handshake_failures": {"eof": 1}, "queue_wait_max": 0.5, "pool_size": 10}
    two = {"accepted": 7, "active": 1, "handshake_failures": {"eof": 2, "reset": 1}, "queue_wait_max": 0.2}
    assert totals.of([one, two | {"pool_size": 10}]) == {
        "accepted": 12,
        "active": 3,
        "handshake_failures": {"eof": 3, "reset": 1},
        "queue_wait_max": 0.5,
        "pool_size": 20,
    }
    totals.forget_worker(one)
    assert totals.of([two]) == {
        "accepted": 12,
        "active": 1,
        "handshake_failures": {"eof": 3, "reset": 1},
        "queue_wait_max": 0.5,
    }
    assert one["handshake_failures"] == {"eof": 1}


def test_means_are_weighted_and_no_limit_stays_no_limit() -> None:
    added = add_up(
        [
            {"queue_wait_mean": 1.0, "queue_wait_samples": 1, "pool_size": None},
            {"queue_wait_mean": 2.0, "queue_wait_samples": 3, "pool_size": 5},
        ]
    )
    assert added == {"queue_wait_mean": 1.75, "queue_wait_samples": 4, "pool_size": None}


# -- configuration, files, systemd -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "workers must be a whole number from 1, got 0"),
        ({"workers": "four"}, "workers must be a whole number from 1 or \"auto\", got 'four'"),
        ({"workers": 2000}, "workers must be at most 1024"),
        ({"worker_timeout": 0.5}, "worker_timeout must be a number, 1 or more"),
        ({"graceful_timeout": -1}, "graceful_timeout must be a number, 0 or more"),
        ({"recycle_memory": 0}, "recycle_memory must be a number, more than 0"),
        ({"umask": 0o1000}, "umask must be 0 to 0o777"),
        ({"pid_file": ""}, "pid_file must be a path, got ''"),
        ({"user": "nobody-of-this-name"}, "user must be one of this host's, got 'nobody-of-this-name'"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SupervisorConfig(**options)
    assert str(caught.value).startswith(said)


def test_auto_is_one_worker_for_each_cpu_at_most() -> None:
    assert 1 <= SupervisorConfig().worker_count() <= len(os.sched_getaffinity(0))
    assert SupervisorConfig(workers=3).worker_count() == 3


def test_a_pid_file_is_locked_and_removed_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")  # a live process, but not ours: stale
    first = PidFile(str(path))
    first.check()
    first.write()
    assert path.read_text() == f"{os.getpid()}\n"
    second = PidFile(str(path))
    with pytest.raises(FileExistsError, match=f"process {os.getpid()} is running"):
        second.check()
    second.write()  # the next master of an upgrade
    first.remove()
    assert path.exists()
    second.remove()
    assert not path.exists()
    second.remove()


def test_a_pid_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        PidFile(str(tmp_path / "missing" / "pid")).write()
    assert list(tmp_path.iterdir()) == []


def test_descriptors_for_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for pid, count in (("1", "1"), ("", "1"), (str(os.getpid()), "x"), (str(os.getpid()), "0")):
        monkeypatch.setenv("LISTEN_PID", pid)
        monkeypatch.setenv("LISTEN_FDS", count)
        assert systemd.take_listen_fds() == []
        assert "LISTEN_FDS" not in os.environ
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "5000")
    with pytest.raises(ConfigError, match="LISTEN_FDS is 5000, but descriptor"):
        systemd.take_listen_fds()


def test_nobody_is_notified_where_there_is_no_service_manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.notify("READY=1")  # nothing that would have to be said again
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert systemd.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0gtcpserver-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@gtcpserver-test-{os.getpid()}")
        assert systemd.notify("READY=1")
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("pid", "microseconds", "interval"),
    [("", "3000000", 1.5), ("1", "3000000", None), ("", "0", None), ("", "x", None), ("", "", None)],
)
def test_the_watchdog_wants_half_its_interval(
    monkeypatch: pytest.MonkeyPatch, pid: str, microseconds: str, interval: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", pid)
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    assert systemd.watchdog_interval() == interval


# -- steering and sockets --------------------------------------------------------------------------------------------


def test_the_program_of_pinned_cpus_names_each_member() -> None:
    program = by_cpu({0: 1, 3: 0})
    assert program[0] == (BPF_LOAD_WORD, 0, 0, SKF_AD_CPU)
    assert [(jump[3], answer[3]) for jump, answer in zip(program[1:-1:2], program[2:-1:2], strict=True)] == [
        (0, 1),
        (3, 0),
    ]
    assert program[-1] == (BPF_RETURN, 0, 0, NOBODY)


def takers(port: int, sockets: list[Any], count: int = 60) -> list[int]:
    """How many of so many new connections each listening socket gets."""
    clients = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(count)]
    counts = []
    for listener in sockets:
        taken = 0
        while True:
            try:
                listener.socket.accept()[0].close()
            except BlockingIOError:
                break
            taken += 1
        counts.append(taken)
    for client in clients:
        client.close()
    assert sum(counts) == count
    return counts


def test_connections_go_where_they_are_steered_and_back() -> None:
    group = open_listeners("127.0.0.1:0", ListenConfig(), 3)
    port = group[0].sockaddr[1]
    try:
        assert spread(group, [0, 1, 2], None)
        assert all(takers(port, group))
        assert spread(group, [2], None)
        assert takers(port, group) == [0, 0, 60]
        assert spread(group, [0, 1], None)
        assert takers(port, group)[2] == 0
        assert spread(group, [0, 1, 2], dict.fromkeys(os.sched_getaffinity(0), 1))
        assert takers(port, group) == [0, 60, 0]
        assert spread(group, [0, 1, 2], {4095: 1})  # a CPU that is none: the hash decides
        assert all(takers(port, group))
        assert spread(group, [], None)
        assert all(takers(port, group))
        assert spread(group, [2], None)
        assert spread(group, [0, 1, 2], None)
        assert all(takers(port, group))
    finally:
        for listener in group:
            listener.close()


def test_slots_come_and_go_and_the_kernel_and_we_count_alike() -> None:
    sockets = ListeningSockets(ListenConfig())
    sockets.open([parse_address("127.0.0.1:0")], [0])
    try:
        (group,) = sockets.groups
        port = group.members[0].listener.sockaddr[1]
        for slot in (1, 2, 3, 4):
            sockets.add_slot(slot)
        for closing in (1, 3, 0):
            rest = {member.slot for member in group.members} - {closing}
            sockets.steer(rest, {})
            assert sockets.remove_slot(closing) == 0
            for wanted in rest:
                sockets.steer({wanted}, {})
                counts = takers(port, group.members, 20)
                assert counts[[member.slot for member in group.members].index(wanted)] == 20
        assert [sock for sock, _ in sockets.of_slot(2)] == [m.socket for m in group.members if m.slot == 2]
        assert sockets.of_slot(0) == []
    finally:
        sockets.close()


def test_nobody_is_sent_to_a_late_worker_while_a_slot_is_closed() -> None:
    sockets = ListeningSockets(ListenConfig())
    sockets.open([parse_address("127.0.0.1:0")], range(5))
    try:
        (group,) = sockets.groups
        sockets.steer({1, 4}, {})
        sockets.remove_slot(0)  # the kernel moves the last member into its place
        counts = takers(group.members[0].listener.sockaddr[1], group.members)
        assert [member.slot for member, count in zip(group.members, counts, strict=True) if count] == [1]
    finally:
        sockets.close()


def test_a_slot_that_cannot_be_opened_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gtcpserver.supervisor import sockets as module

    sockets = ListeningSockets(ListenConfig())
    sockets.open([parse_address("127.0.0.1:0"), parse_address("127.0.0.1:0")], [0])
    opened = []
    try:

        def second_fails(*arguments: Any) -> Any:
            if opened:
                raise OSError(24, "Too many open files")
            opened.append(1)
            return open_listeners(*arguments)

        monkeypatch.setattr(module, "open_listeners", second_fails)
        with pytest.raises(OSError, match="Too many open files"):
            sockets.add_slot(1)
        assert [len(group.members) for group in sockets.groups] == [1, 1]
    finally:
        sockets.close()


# -- workers as the master sees them ---------------------------------------------------------------------------------


def test_a_late_loop_lags_until_it_has_kept_time_for_a_while() -> None:
    here, there = make_pair(WORKER_KINDS, MASTER_KINDS)
    worker = WorkerProcess(0, 1, here, 1, REAL_SYSTEM, state=WorkerState.READY)
    worker.note_beat(0.01)
    assert not worker.lagging
    worker.note_beat(0.5)
    assert worker.lagging
    for _ in range(3):
        worker.note_beat(0.0)
        assert worker.lagging
    worker.note_beat(0.0)
    assert not worker.lagging
    worker.note_silence(worker.last_beat + 5)
    assert worker.lagging
    assert worker.lag == pytest.approx(5)
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("status", "words"),
    [(9, "was killed by SIGKILL"), (11, "was killed by SIGSEGV"), (0, "exited with status 0"), (256 * 3, "status 3")],
)
def test_the_end_of_a_process_is_told_in_words(status: int, words: str) -> None:
    assert words in describe_status(status)


def test_stacks_of_greenlets_at_the_same_place_are_printed_once() -> None:
    def wait_here() -> None:
        gevent.sleep(60)

    waiting = [gevent.spawn(wait_here) for _ in range(50)]
    gevent.sleep(0)
    text = format_stacks(inspect.currentframe())
    gevent.killall(waiting)
    assert text.count("in wait_here") == 1
    assert "50 greenlets:" in text
    assert "running now:" in text
    assert "test_stacks_of_greenlets" in text
