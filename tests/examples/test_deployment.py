"""The deployment examples, with the programs they are for."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port

DEPLOYMENT = ROOT / "examples" / "deployment"


class Instance:
    """One server behind the balancer."""

    def __init__(self, directory, port):
        self._command = [sys.executable, "-m", "gtcpserver", "files", str(directory), "--bind", f"127.0.0.1:{port}"]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        while "listening" not in (line := self.process.stderr.readline()):
            assert line, "it did not start"

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=SOON)
        assert self.process.returncode == 0


def ask(sock, size):
    sock.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer.split(b"\r\n\r\n", 1)[1]) < size:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError(f"the connection ended after {answer[:200]!r}")
        answer += more
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"answered {answer[:200]!r}")


def load(port, size, stop, keep, failures, counts):
    """Requests until `stop`, on one connection or on one each."""
    done, sock = 0, None
    try:
        while not stop.is_set():
            if sock is None:
                sock = socket.create_connection(("127.0.0.1", port), SOON)
            ask(sock, size)
            done += 1
            if not keep:
                sock.close()
                sock = None
    except OSError as error:
        failures.append(repr(error))
    finally:
        counts.append(done)
        if sock is not None:
            sock.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is missing")
def test_two_instances_behind_haproxy_are_replaced_without_a_lost_request(tmp_path, need_descriptors):
    need_descriptors(8192)  # haproxy's, for its maxconn
    (tmp_path / "index.html").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    ports = [free_port() for _ in range(3)]
    instances = [Instance(tmp_path, port) for port in ports[:2]]
    names = dict(zip(("ONE", "TWO", "LISTEN"), (f"127.0.0.1:{port}" for port in ports), strict=True))
    haproxy = subprocess.Popen(
        ["haproxy", "-db", "-q", "-f", str(DEPLOYMENT / "haproxy" / "haproxy.cfg")], env=os.environ | names
    )
    stop, failures, counts = threading.Event(), [], []
    try:
        wait_for_port(ports[2])
        clients = [
            threading.Thread(target=load, args=(ports[2], 1000, stop, keep, failures, counts))
            for keep in (True, True, False, False)
        ]
        for client in clients:
            client.start()
        for _ in range(2):
            for instance, port in zip(instances, ports, strict=False):
                instance.stop()
                instance.start()
                wait_for_port(port)
                wait_until_haproxy_knows(ports[2])
        stop.set()
        for client in clients:
            client.join(SOON)
        assert failures == []
        assert min(counts) > 10
    finally:
        stop.set()
        haproxy.kill()
        haproxy.wait()
        for instance in instances:
            instance.process.kill()
            instance.process.communicate()


def wait_for_port(port):
    give_up = time.monotonic() + SOON
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < give_up
            time.sleep(0.01)


def wait_until_haproxy_knows(port):
    """Until the check has seen the new instance (inter 500ms): before that haproxy has only the other one."""
    time.sleep(1.1)
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        ask(sock, 1000)


def test_the_unit_files_name_commands_and_options_that_exist():
    from gtcpserver.cli.commands import gtcpserver

    commands = [
        line.split("=", 1)[1].split()
        for path in (DEPLOYMENT / "systemd").glob("*.service")
        for line in path.read_text().splitlines()
        if line.startswith("ExecStart=")
    ]
    assert commands
    for _program, name, *arguments in commands:
        command = gtcpserver.get_command(None, name)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {re.split("[= ]", argument)[0] for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_systemd_understands_the_unit_files(tmp_path):
    units = []
    for path in (DEPLOYMENT / "systemd").iterdir():
        text = re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text())
        (tmp_path / path.name).write_text(text)
        units.append(str(tmp_path / path.name))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=SOON)
    assert "Unknown" not in done.stderr


CONTAINER = DEPLOYMENT / "container"


def instruction(name):
    """The JSON array behind an instruction of the Containerfile."""
    (line,) = (line for line in (CONTAINER / "Containerfile").read_text().splitlines() if line.startswith(name))
    return json.loads(line[line.index("[") :])


def test_the_containerfile_copies_what_is_there_and_is_not_root():
    text = (CONTAINER / "Containerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for path in line.split()]
    assert "gtcpserver" in copied
    assert all((ROOT / path).exists() for path in copied)
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("workers", [True, False])
def test_the_container_s_process_1_is_healthy_serves_and_stops_at_its_stop_signal(tmp_path, workers):
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let root make a PID namespace")
    # As it stands there, but for where it listens and where its control socket is.
    here = {"0.0.0.0:5000": "127.0.0.1:0", "/run/app/control": str(tmp_path / "control"), "auto": "2"}
    program = [sys.executable, "-m", "gtcpserver"]
    entry = [here.get(word, word) for word in instruction("ENTRYPOINT")[1:]]
    environment = {**os.environ, "GTCPSERVER_CONTROL": str(tmp_path / "control")}
    if not workers:
        del environment["GTCPSERVER_CONTROL"]
        for option in ("--workers", "--control"):
            at = entry.index(option)
            del entry[at : at + 2]
    healthy = [*program, *instruction("HEALTHCHECK")[1:]]
    process = subprocess.Popen(
        [*unshare, *program, *entry], cwd=CONTAINER, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while not (found := re.search(r"listening on 127.0.0.1:(\d+) \(pid 1\b", line := process.stderr.readline())):
            assert line, "it did not start"
        if workers:
            assert subprocess.run(healthy, env=environment, capture_output=True).returncode == 0
        with socket.create_connection(("127.0.0.1", int(found[1])), SOON) as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(100) == b"hello\n"
            (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            assert sock.recv(100) == b""
        _, log = process.communicate(timeout=SOON)
        assert process.returncode == 0, log
        assert "0 cut" in log
        if workers:
            assert subprocess.run(healthy, env=environment, capture_output=True).returncode == 1
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
