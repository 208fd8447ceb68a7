"""A rolling update of the Deployment in examples/deployment/kubernetes, on one machine: a program, run as root.

    unshare --net --mount --pid --fork --kill-child --mount-proc python tests/kit/rolling_update.py OPTIONS

Each pod is a process in network, mount and PID namespaces of its own, confined as its security context says, with the
command line of the YAML. This program plays the kubelet (probes, preStop, SIGTERM, SIGKILL), the Deployment's
controller (maxSurge 1, maxUnavailable 0), and the controller of endpoints, which learns late of a pod that goes.
haproxy stands for the nodes' packet filters: it checks nothing, retries nothing, and only does what it is told of
endpoints. Clients ask without retrying. The last line of the output is a JSON object: what they met.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = ROOT / "examples" / "deployment" / "kubernetes" / "deployment.yaml"

NODE = "10.244.0.1"
SERVICE = ("10.96.0.1", 80)
#: What the pods serve: an HTTP answer that names the pod. Keep-alive clients see that it is about to go.
APP = """
import socket
from gtcpserver import from_wsgi

name = socket.gethostname().encode()

def application(environ, start_response):
    start_response("200 OK", [("Content-Length", str(len(name)))])
    return [name]

handle = from_wsgi(application)
"""

HAPROXY = """
global
    maxconn 200
    stats socket /run/haproxy.sock level admin
defaults
    mode tcp
    retries 0
    timeout connect 10s
    timeout client 1m
    timeout server 1m
listen lines
    bind {service[0]}:{service[1]}
    balance roundrobin
{servers}
"""


def sh(script: str, *arguments: str) -> None:
    subprocess.run(["sh", "-ec", script, "sh", *arguments], check=True)


class Pod:
    """One pod of the Deployment.

    Args:
        number: from 1; its address, host name and network.
        spec: the pod's part of the Deployment.
        faster: the times of the YAML are divided by this.
    """

    def __init__(self, number: int, spec: dict[str, Any], faster: float) -> None:
        self.name = f"pod{number}"
        self.address = f"10.244.0.{10 + number}"
        self._spec = spec
        self._container = spec["containers"][0]
        self._faster = faster
        self._ports = {port["name"]: port["containerPort"] for port in self._container["ports"]}
        self._start()

    def _start(self) -> None:
        sh(
            """ip netns add $1
            ip link add $1 type veth peer name eth0 netns $1
            ip link set $1 master br0 up
            ip -n $1 link set lo up
            ip -n $1 addr add $2/24 dev eth0
            ip -n $1 link set eth0 up
            ip -n $1 route add default via $3""",
            *(self.name, self.address, NODE),
        )
        delay = next(word for word in self._container["command"] if word.startswith("--drain-delay="))
        seconds = float(delay.partition("=")[2]) / self._faster
        command = [f"--drain-delay={seconds}" if word == delay else word for word in self._container["command"]]
        assert command[0] == "gtcpserver"
        self._log = open(f"/run/{self.name}.log", "w+")  # noqa: SIM115
        user, group = (str(self._spec["securityContext"][key]) for key in ("runAsUser", "runAsGroup"))
        confined = [
            *("setpriv", "--reuid", user, "--regid", group, "--clear-groups"),
            *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
        ]
        script = f"""
            mount -t tmpfs -o size=1m,mode=1777 tmpfs {self._container["volumeMounts"][0]["mountPath"]}
            mount -o remount,bind,ro /
            hostname {self.name}
            cd /run/image
            exec "$@"
        """
        inside = [*confined, sys.executable, "-m", *command]
        self._process = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.name),
                *("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-ec", script, "sh", *inside),
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def probe(self, kind: str) -> bool:
        """Whether a probe of the YAML succeeds now."""
        probe = self._container[kind]
        wanted = probe["httpGet"]
        connection = http.client.HTTPConnection(
            self.address, self._ports[wanted["port"]], timeout=probe["timeoutSeconds"]
        )
        try:
            connection.request("GET", wanted["path"])
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()

    def wait_started(self) -> None:
        probe = self._container["startupProbe"]
        give_up = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        while not self.probe("startupProbe"):
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < give_up, self.log()
            time.sleep(probe["periodSeconds"] / self._faster / 4)
        assert self.probe("readinessProbe")
        assert self.probe("livenessProbe")

    def end(self) -> None:
        """End it as a kubelet does: preStop, SIGTERM, and SIGKILL at the end of the grace period."""
        give_up = time.monotonic() + self._spec["terminationGracePeriodSeconds"]
        time.sleep(self._container["lifecycle"]["preStop"]["sleep"]["seconds"] / self._faster)
        assert self.probe("readinessProbe"), "the kubelet has not said a word yet"
        os.kill(self._first(), signal.SIGTERM)
        for _ in range(50):
            if not self.probe("readinessProbe"):
                break
            time.sleep(0.01)
        else:
            raise AssertionError("it is ready after SIGTERM")
        self._process.wait(give_up - time.monotonic())
        assert self._process.returncode == 0, self.log()
        assert " 0 cut" in self.log(), self.log()

    def _first(self) -> int:
        """Its process 1, by the name it has here: below ip and unshare, which is one process."""
        (child,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(child)

    def log(self) -> str:
        self._log.seek(0)
        return f"{self.name}:\n{self._log.read()}"


class Endpoints:
    """The controller of endpoints and what the nodes make of it: haproxy, by its runtime API."""

    def __init__(self, pods: int, lag: float) -> None:
        self.lag = lag
        servers = "\n".join(f"    server pod{n} 10.244.0.{10 + n}:5000 disabled" for n in range(1, pods + 1))
        Path("/run/haproxy.cfg").write_text(HAPROXY.format(service=SERVICE, servers=servers))
        self._process = subprocess.Popen(["haproxy", "-db", "-q", "-f", "/run/haproxy.cfg"])
        give_up = time.monotonic() + 60
        while not Path("/run/haproxy.sock").exists():
            assert self._process.poll() is None, "haproxy has ended"
            assert time.monotonic() < give_up
            time.sleep(0.01)

    def set(self, pod: Pod, state: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("/run/haproxy.sock")
            sock.sendall(f"set server lines/{pod.name} state {state}\n".encode())
            answer = b"".join(iter(lambda: sock.recv(4096), b"")).strip()
        assert not answer, answer

    def remove(self, pod: Pod) -> threading.Thread:
        """Remove it, as late as the lag says."""
        timer = threading.Timer(self.lag, self.set, (pod, "maint"))
        timer.start()
        return timer


class Load:
    """Clients: half of them keep their connections, the others make one for each request. None tries again.

    Args:
        clients: their number.
        pause: seconds between two requests of a client.
    """

    def __init__(self, clients: int, pause: float) -> None:
        self._pause = pause
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.done = 0
        self.connections = 0
        self.pods: set[str] = set()
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=(number % 2 == 0,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _client(self, keeps: bool) -> None:
        while not self._stop.is_set():
            done, pods, local = 0, set(), 0
            try:
                with socket.create_connection(SERVICE, 30) as sock:
                    local = sock.getsockname()[1]
                    while True:
                        pod, kept = ask(sock)
                        done += 1
                        pods.add(pod)
                        if not (keeps and kept) or self._stop.is_set():
                            break
                        time.sleep(self._pause)
            except OSError as error:
                with self._lock:
                    self.failures.append(f"{'kept' if keeps else 'new'} {local} after {done}: {error!r}")
            with self._lock:
                self.done += done
                self.connections += 1
                self.pods |= pods
            time.sleep(self._pause)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def ask(sock: socket.socket) -> tuple[str, bool]:
    """The pod that answers, and whether it keeps the connection."""
    sock.sendall(b"GET / HTTP/1.1\r\nHost: lines\r\n\r\n")
    answer = b""
    while True:
        more = sock.recv(4096)
        if not more:
            raise ConnectionError(f"the connection ended after {answer!r}")
        answer += more
        head, found, body = answer.partition(b"\r\n\r\n")
        if found and (not head.startswith(b"HTTP/1.1 200") or body):
            break
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"answered {head!r}")
    return body.decode(), b"connection: close" not in head.lower()


def prepare_node() -> None:
    sh(
        """mount --make-rprivate /
        mount -t tmpfs -o mode=755 tmpfs /run
        mkdir -p /run/app /run/image /run/netns /run/home
        ip link set lo up
        ip addr add $2/32 dev lo
        ip link add br0 type bridge
        ip addr add $1/24 dev br0
        ip link set br0 up
        echo 1024 65535 > /proc/sys/net/ipv4/ip_local_port_range
        echo 1 > /proc/sys/net/ipv4/tcp_tw_reuse""",
        *(NODE, SERVICE[0]),
    )
    open_homes()
    Path("/run/image/app.py").write_text(APP)


def open_homes() -> None:
    """Let others than root come to this Python, if it is in root's home: by the way alone, and here only."""
    home = Path.home()
    real = [Path(sys.executable).resolve(), ROOT]
    if home.stat().st_mode & 0o001 or not any(home in path.parents for path in real):
        return
    entries = {path.relative_to(home).parts[0] for path in real if home in path.parents}
    sh("mount --bind $1 /run/home && mount -t tmpfs -o mode=755 tmpfs $1", str(home))
    for entry in entries:
        (home / entry).mkdir()
        sh("mount --bind /run/home/$2 $1/$2", str(home), entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=0, help="update again until this many are answered")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.004, help="seconds between two requests of a client")
    parser.add_argument("--faster", type=float, default=10, help="the times of the YAML are divided by this")
    parser.add_argument("--lag", type=float, default=0.8, help="of preStop and drain delay: how late endpoints are")
    options = parser.parse_args()
    spec = yaml.safe_load(DEPLOYMENT.read_text())["spec"]["template"]["spec"]
    container = spec["containers"][0]
    (drain,) = (float(word[14:]) for word in container["command"] if word.startswith("--drain-delay="))
    until_it_stops = (container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain) / options.faster
    prepare_node()
    most = 200
    endpoints = Endpoints(most, options.lag * until_it_stops)
    numbers = iter(range(1, most + 1))

    def start() -> Pod:
        pod = Pod(next(numbers), spec, options.faster)
        pod.wait_started()
        endpoints.set(pod, "ready")
        return pod

    pods = [start() for _ in range(options.replicas)]
    load = Load(options.clients, options.pause)
    errors: list[str] = []
    ending: list[threading.Thread] = []
    updates = 0

    def end(pod: Pod) -> None:
        try:
            pod.end()
        except Exception as error:
            errors.append(f"{pod.name}: {error!r}")

    while not errors and (updates == 0 or load.done < options.requests):
        for old in list(pods):
            pods.append(start())
            pods.remove(old)
            ending += [endpoints.remove(old), threading.Thread(target=end, args=(old,))]
            ending[-1].start()
        updates += 1
    for thread in ending:
        thread.join()
    load.end()
    told = {
        "updates": updates,
        "requests": load.done,
        "connections": load.connections,
        "pods": len(load.pods),
        "failures": load.failures[:20],
        "failed": len(load.failures),
        "errors": errors,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    # Not to outlive a test that is killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    main()
