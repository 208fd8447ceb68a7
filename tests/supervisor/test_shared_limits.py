"""Limits hold for all workers together: under load, through reloads, upgrades, and when workers are killed.

GTCPSERVER_HAMMER=5000 makes the loads larger: connections of each of the four client processes.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from gtcpserver.proxy.passwords import hash_password
from kit.patience import SOON
from kit.supervised import Master, alive, upgrade, wait_until

ATTEMPTS = int(os.environ.get("GTCPSERVER_HAMMER", "100"))
CLIENTS = 4
WORKERS = 4
#: Of tests for which fewer will do.
FEWER = 4 if ATTEMPTS > 100 else 2

APP = """
def handler(conn):
    conn.sendall(b"+")
    while conn.recv(100):
        pass
"""

#: Opens connections from some threads, as fast as it can, and says when each of those that were served was open. The
#: server has it open for longer.
HAMMER = """
import json, random, socket, sys, threading, time
port, attempts, hold = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
times, refused, lock = [], [0], threading.Lock()

def client():
    for _ in range(attempts // 4):
        try:
            with socket.create_connection(("127.0.0.1", port), 60) as sock:
                if sock.recv(1) != b"+":
                    raise ConnectionResetError
                began = time.monotonic()
                time.sleep(hold * random.random())
                ended = time.monotonic()
        except ConnectionError:
            with lock:
                refused[0] += 1
        else:
            with lock:
                times.append((began, ended))

running = [threading.Thread(target=client) for _ in range(4)]
for one in running: one.start()
for one in running: one.join()
print(json.dumps([times, refused[0]]))
"""


def hammer(port, hold=0.005):
    """Return when each connection was open, and how many were refused."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(port), str(ATTEMPTS), str(hold)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(CLIENTS)
    ]
    times, refused = [], 0
    for one in running:
        some, failed = json.loads(one.communicate(timeout=10 * SOON)[0])
        times += some
        refused += failed
    return times, refused


def most_at_once(times):
    """Return the largest number of connections that were open at one moment."""
    open_now = most = 0
    for _, change in sorted([(began, 1) for began, _ in times] + [(ended, -1) for _, ended in times]):
        open_now += change
        most = max(most, open_now)
    return most


def come(port):
    """Connect; return the socket if it was served, None if it was refused."""
    sock = socket.socket()
    sock.settimeout(SOON)
    try:
        sock.connect(("127.0.0.1", port))
        if sock.recv(1) == b"+":
            return sock
    except ConnectionResetError:
        pass
    sock.close()
    return None


def fill(port, count):
    """Open so many connections, and see that no worker serves another one."""
    held = [come(port) for _ in range(count)]
    assert None not in held
    refused_by_all(port)
    return held


def refused_by_all(port):
    # The kernel chooses the worker by the client's port: with 16, hardly one is left out.
    assert [come(port) for _ in range(16)] == [None] * 16


def close(held):
    for sock in held:
        sock.close()


def free(port, count):
    """Wait until the service admits so many connections, and not one more."""
    held = []
    while len(held) < count:
        sock = wait_until(lambda: come(port))
        held.append(sock)
    refused_by_all(port)
    return held


def test_no_client_has_more_than_its_connections_under_load(start):
    master = start("--workers", str(WORKERS), "--client-connections", "5", app=APP)
    times, refused = hammer(master.port)
    assert refused
    assert len(times) > 20
    assert 5 <= most_at_once(times) <= 5 + WORKERS - 1
    assert master.ask("status")["stats"]["clients_refused"]["client_connections"] <= refused
    close(free(master.port, 5))  # none is still counted
    assert master.stop() == 0


def test_a_client_keeps_its_rate_under_load(start):
    master = start(
        "--workers",
        str(FEWER),
        "--client-new-per-second",
        "0.01",
        "--client-burst",
        "20",
        "--probation",
        "0",
        app=APP,
    )
    times, refused = hammer(master.port)
    assert 20 <= len(times) <= 20 + FEWER - 1
    assert refused == CLIENTS * (ATTEMPTS // 4) * 4 - len(times)
    master.send_signal(signal.SIGHUP)
    master.wait_for("reload 1 is done")
    refused_by_all(master.port)  # the new workers know it
    assert master.stop() == 0


def test_connections_of_killed_workers_count_no_more(start):
    master = start("--workers", str(FEWER), "--client-connections", "12", app=APP)
    held = fill(master.port, 12)
    for pid in master.pids()[: FEWER // 2]:
        os.kill(pid, signal.SIGKILL)
    gone = [sock for sock in held if is_closed(sock)]
    master.settled(FEWER)
    close(free(master.port, len(gone)))
    close(held)
    close(free(master.port, 12))
    assert master.stop() == 0


def is_closed(sock):
    sock.settimeout(0.3)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("option", ["--client-connections", "--max-connections"])
def test_limits_survive_a_reload_and_an_upgrade(start, option):
    on_full = ("--on-full", "reject") if option == "--max-connections" else ()
    master = start("--workers", "2", option, "3", *on_full, "--probation", "0", app=APP)
    held = fill(master.port, 3)
    assert master.ask("reload") == {"ok": True}
    refused_by_all(master.port)  # the old workers still have theirs
    held.pop().close()
    held += free(master.port, 1)
    old = upgrade(master)
    refused_by_all(master.port)
    held.pop(0).close()
    held += free(master.port, 1)
    close(held)
    wait_until(lambda: not alive(old))
    close(free(master.port, 3))
    assert master.stop() == 0


def test_connections_counted_by_a_master_that_was_killed_are_given_back(start):
    master = start("--workers", "1", "--client-connections", "2", "--probation", "0", app=APP)
    held = fill(master.port, 2)
    old = upgrade(master)
    refused_by_all(master.port)
    os.kill(old, signal.SIGKILL)  # nobody waits for its workers, which end by themselves
    close(free(master.port, 2))
    close(held)
    master.send_signal(signal.SIGTERM)
    wait_until(lambda: not alive(master.pid))


def test_the_service_never_has_more_than_max_connections(start):
    master = start("--workers", str(FEWER), "--max-connections", "6", app=APP)
    times, refused = hammer(master.port, 0.002)
    assert refused == 0  # they wait in the kernel's queues
    assert len(times) == CLIENTS * (ATTEMPTS // 4) * 4
    assert 6 <= most_at_once(times) <= 6 + FEWER - 1
    assert master.stop() == 0


def test_a_connection_that_waits_is_served_when_another_worker_has_room(start):
    master = start("--workers", "2", "--max-connections", "1", app=APP)
    for _ in range(8):  # half of them in the other worker than the one before
        with socket.create_connection(("127.0.0.1", master.port), SOON) as one:
            assert one.recv(1) == b"+"
            two = socket.create_connection(("127.0.0.1", master.port), SOON)
        with two:
            assert two.recv(1) == b"+"
    assert master.stop() == 0


def test_the_service_accepts_max_accepts_connections_and_stops(start):
    master = start("--workers", str(FEWER), "--max-accepts", "30", app=APP)
    port = master.port
    served = 0
    while alive(master.pid) and served < 40:
        try:
            sock = come(port)
        except ConnectionRefusedError:
            break
        served += sock is not None
        if sock is not None:
            sock.close()
    assert 30 <= served <= 30 + FEWER - 1
    assert master.wait() == 0
    assert "max_accepts reached: stopping" in master.log()


ITS_OWN_CLIENT = """
import gevent
from gevent import socket

def handler(conn):
    conn.sendall(b"+")

def start(worker):
    with socket.create_connection(("127.0.0.1", worker.server.port)) as sock:  # accepts, and is not ready
        assert sock.recv(1) == b"+"
    gevent.sleep(0.05)
"""


def test_a_service_that_has_accepted_all_before_a_worker_is_ready_stops(tmp_path):
    (tmp_path / "app.py").write_text(ITS_OWN_CLIENT)
    worker = ("--workers", "1", "--max-accepts", "1", "--worker-start", "app:start")
    master = Master(tmp_path, ("serve", "app:handler", "--bind", "127.0.0.1:0", *worker))
    try:
        assert master.wait() == 0
        assert "max_accepts reached: stopping" in master.log()
    finally:
        master.kill_all()


CONFIG = """
[[listener]]
listen = "127.0.0.1:{port}"
[rules]
clients = ["allow from 127.0.0.0/8 to any with auth staff"]
[auth.staff]
users = {{ ada = "{hash}" }}
"""


def ask_proxy(port, user, password):
    """Return the status of the answer."""
    words = base64.b64encode(f"{user}:{password}".encode()).decode()
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        sock.sendall(f"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {words}\r\n\r\n".encode())
        return int(sock.recv(1000).split()[1])


def test_who_guesses_passwords_is_refused_by_all_workers_also_after_a_reload(tmp_path):
    pytest.importorskip("argon2")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    (tmp_path / "proxy.toml").write_text(CONFIG.format(port=port, hash=hash_password(b"right")))
    arguments = ("proxy", "--config", "proxy.toml", "--workers", "2", "--control", str(tmp_path / "ctl"))
    master = Master(tmp_path, (*arguments, "--probation", "0"))
    guesses = []
    try:
        master.wait_listening()
        assert ask_proxy(port, "ada", "right") == 403  # known, but that address is not for clients
        for number in range(10):
            words = base64.b64encode(f"user{number}:wrong".encode()).decode()
            sock = socket.create_connection(("127.0.0.1", port), SOON)
            sock.sendall(
                f"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {words}\r\n\r\n".encode()
            )
            guesses.append(sock)
        wait_until(lambda: ask_proxy(port, "ada", "right") == 407)
        assert [ask_proxy(port, "ada", "right") for _ in range(8)] == [407] * 8
        assert master.ask("reload") == {"ok": True}
        assert [ask_proxy(port, "ada", "right") for _ in range(8)] == [407] * 8
        for pid in master.pids():
            os.kill(pid, signal.SIGKILL)
        master.settled(2)
        assert [ask_proxy(port, "ada", "right") for _ in range(8)] == [407] * 8
        assert master.stop() == 0
    finally:
        for sock in guesses:
            sock.close()
        master.kill_all()
