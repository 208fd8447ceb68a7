"""What haproxy hears of a machine by agent checks, and what it makes of it.

GTCPSERVER_REPLACEMENTS=20 replaces both machines behind haproxy that often under load.
"""

import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from gtcpserver.supervisor import ControlError
from gtcpserver.supervisor.agent import MOST_CLIENTS, room
from gtcpserver.supervisor.slots import LAG_SECONDS, Slot, WorkerState
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.supervised import COMMAND, alive, upgrade, wait_until

APP = """
import os, time

def handler(conn):
    while data := conn.recv(100):
        if data == b"block":
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                pass
        conn.sendall(f"{os.getpid()}\\n".encode())
        if conn.server.stopping:
            return
"""

REPLACEMENTS = int(os.environ.get("GTCPSERVER_REPLACEMENTS", "1"))


def worker(handlers=0, pool_size=100, lag=0.0, state=WorkerState.READY):
    stats = {"handlers": handlers, "pool_size": pool_size}
    return SimpleNamespace(ready_at=1.0, state=state, stats=stats, lag=lag)


@pytest.mark.parametrize(
    ("workers", "percent"),
    [
        ([worker()], 100),
        ([worker(handlers=50)], 100),
        ([worker(handlers=75), worker()], 75),
        ([worker(handlers=100)], 1),
        ([worker(handlers=1000, pool_size=None)], 100),
        ([worker(lag=LAG_SECONDS)], 50),
        ([worker(lag=3 * LAG_SECONDS), worker()], 60),
        ([worker(), worker(state=WorkerState.STARTING)], 50),
        ([worker(), None, None, None], 25),
        ([worker(handlers=150)], 1),
        ([], 1),
    ],
)
def test_the_weight_follows_room_and_lag(workers, percent):
    assert room([Slot(number, current=one) for number, one in enumerate(workers)]) == percent


def ask(port):
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        return b"".join(iter(lambda: sock.recv(100), b"")).decode()


def percent(port):
    """The weight of a machine that serves."""
    said = ask(port)
    assert said.startswith("ready up "), said
    return int(said.split()[-1].rstrip("%"))


def hold(port, count):
    """Open connections, each of which has a place in the pool."""
    held = [socket.create_connection(("127.0.0.1", port), SOON) for _ in range(count)]
    for sock in held:
        sock.sendall(b"x")
        assert sock.recv(100)
    return held


def agent_of(master):
    return int(master.wait_for(r"agent checks on 127.0.0.1:(\d+)"))


def test_what_a_machine_says_in_its_life(start):
    master = start("--workers", "2", "--agent-check", "127.0.0.1:0", "--drain-delay", "0.3", "--probation", "0")
    port = agent_of(master)
    assert percent(port) > 10
    assert master.ask("maint", on=True) == {"ok": True}
    assert ask(port) == "maint\n"
    status = master.ask("status")
    assert (status["ready"], status["maintenance"]) == (False, True)
    assert master.request()[1] == "more"  # who comes is served
    old = upgrade(master)
    wait_until(lambda: not alive(old))
    assert ask(port) == "maint\n"
    assert master.ask("maint", on=False) == {"ok": True}
    assert ask(port).startswith("ready up ")
    assert master.ask("reload") == {"ok": True}
    assert ask(port).startswith("ready up ")
    with master.hold()[0] as held:
        master.send_signal(15)
        wait_until(lambda: ask(port) == "drain\n")
        held.recv(100)
    wait_until(lambda: not alive(master.pid))


def test_a_full_or_blocked_machine_wants_less(start):
    master = start("--workers", "1", "--agent-check", "127.0.0.1:0", "--pool", "2", app=APP)
    port = agent_of(master)
    held = hold(master.port, 2)
    wait_until(lambda: percent(port) == 1)
    for sock in held:
        sock.close()
    wait_until(lambda: percent(port) >= 60)
    with master.connect() as client:
        client.sendall(b"block")
        wait_until(lambda: percent(port) < 50)
        assert client.recv(100)
    wait_until(lambda: percent(port) >= 60)


def test_wrong_orders_and_clients_that_never_close(start):
    master = start("--workers", "1", "--agent-check", "127.0.0.1:0")
    port = agent_of(master)
    silent = [socket.create_connection(("127.0.0.1", port), SOON) for _ in range(3 * MOST_CLIENTS)]
    assert percent(port) > 10
    with socket.create_connection(("127.0.0.1", port), SOON) as chatty:
        chatty.sendall(b"agent-send\n" * 100)
        assert chatty.recv(100).startswith(b"ready up ")
    for sock in silent:
        sock.close()
    with pytest.raises(ControlError, match="on must be true or false, got 'maybe'"):
        master.ask("maint", on="maybe")
    command = [*COMMAND, "ctl", "--control", master.control, "maint", "on"]
    assert subprocess.run(command, timeout=SOON).returncode == 0
    assert ask(port) == "maint\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--agent-check", "x:y:z"], "--agent-check: must be an address"),
        (["--bind", "127.0.0.1:4711", "--agent-check", "4711"], '--agent-check: address "4711" is given twice'),
    ],
)
def test_addresses_that_cannot_be(tmp_path, arguments, said):
    command = [sys.executable, "-m", "gtcpserver", "echo", "--workers", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


def test_an_address_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "echo", "--workers", "1", "--bind", "127.0.0.1:0", "--agent-check", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, cwd=tmp_path)
    assert done.returncode == 1
    assert "agent check: " in done.stderr


# -- with haproxy ------------------------------------------------------------------------------------------------------

CONFIG = """
global
    stats socket {folder}/haproxy.sock
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
    retries 3
    option redispatch
listen app
    bind 127.0.0.1:{port}
    balance roundrobin
    default-server weight 100 check inter 100ms agent-check agent-inter 50ms
    server one 127.0.0.1:{ports[0]} agent-port {ports[1]}
    server two 127.0.0.1:{ports[2]} agent-port {ports[3]}
"""


class Balanced:
    """Two machines behind haproxy."""

    def __init__(self, start, folder):
        self._start = start
        self.port, *self.ports = (free_port() for _ in range(5))
        self.machines = [self.begin(0), self.begin(1)]
        (folder / "haproxy.cfg").write_text(CONFIG.format(folder=folder, port=self.port, ports=self.ports))
        self._socket = str(folder / "haproxy.sock")
        self.haproxy = subprocess.Popen(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")])
        wait_until(lambda: os.path.exists(self._socket) and self.weight(0) and self.weight(1))

    def begin(self, number):
        bind, agent = self.ports[2 * number : 2 * number + 2]
        return self._start(
            *("--workers", "1", "--agent-check", str(agent), "--drain-delay", "0.5", "--pool", "4"),
            bind=f"127.0.0.1:{bind}",
            app=APP,
            control=f"ctl{number}",
        )

    def _ask(self, command):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SOON)
            sock.connect(self._socket)
            sock.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: sock.recv(65536), b"")).decode()

    def row(self, number):
        """What haproxy knows of a machine."""
        names, *rows = [line.split(",") for line in self._ask("show stat").strip().split("\n")]
        found = [dict(zip(names, row, strict=False)) for row in rows]
        return next(row for row in found if row["svname"] == ("one", "two")[number])

    def weight(self, number):
        """The weight of a machine; 0 if it gets nothing."""
        row = self.row(number)
        return int(row["weight"]) if row["status"].startswith("UP") else 0

    def replace(self, number):
        machine = self.machines[number]
        machine.send_signal(15)
        wait_until(lambda: self.row(number)["status"].startswith("DRAIN"))
        machine.wait()
        self.machines[number] = self.begin(number)
        wait_until(lambda: self.weight(number))

    def end(self):
        self.haproxy.terminate()
        self.haproxy.wait()


@pytest.fixture
def balanced(start, tmp_path):
    def start_with_control(*arguments, control, **options):
        return start("--control", str(tmp_path / control), *arguments, **options)

    made = Balanced(start_with_control, tmp_path)
    for number, machine in enumerate(made.machines):
        machine.control = str(tmp_path / f"ctl{number}")
    yield made
    made.end()


def request(port):
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        sock.sendall(b"x")
        answer = sock.makefile("rb").readline()
        assert answer.endswith(b"\n"), answer
        return int(answer)


@pytest.mark.slow
@needs("haproxy")
def test_haproxy_sends_less_to_a_machine_that_has_less_to_offer_and_loses_no_request(balanced):
    wait_until(lambda: min(balanced.weight(0), balanced.weight(1)) >= 60)
    held = hold(balanced.machines[0].port, 3)
    # A quarter of its pool is free.
    wait_until(lambda: 0 < balanced.weight(0) <= 50 <= balanced.weight(1) - 10)
    before = [int(balanced.row(number)["stot"]) for number in (0, 1)]
    for _ in range(30):
        request(balanced.port)
    some, more = (int(balanced.row(number)["stot"]) - before[number] for number in (0, 1))
    assert some < more
    for sock in held:
        sock.close()
    wait_until(lambda: balanced.weight(0) >= 60)
    balanced.machines[1].ask("maint", on=True)
    wait_until(lambda: balanced.row(1)["status"].startswith("MAINT"))
    assert len({request(balanced.port) for _ in range(10)}) == 1
    balanced.machines[1].ask("maint", on=False)
    wait_until(lambda: balanced.weight(1))
    assert len({request(balanced.port) for _ in range(10)}) == 2
    no_request_is_lost_while_both_are_replaced(balanced)


def no_request_is_lost_while_both_are_replaced(balanced):
    failures, done, stop = [], [0], threading.Event()

    def load():
        while not stop.is_set():
            try:
                request(balanced.port)
                done[0] += 1
            except (OSError, AssertionError) as error:
                failures.append(repr(error))

    clients = [threading.Thread(target=load) for _ in range(2)]
    for one in clients:
        one.start()
    try:
        for _ in range(REPLACEMENTS):
            balanced.replace(0)
            balanced.replace(1)
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert failures == []
    assert done[0] > 20
