"""Benchmarks of the proxy, in turn with others: short connections, bulk data, idle tunnels.

    python -m loadtests.proxies [--scenario NAME] [--rounds N] [--connections N] [--gib N] [--quick]

Every proxy runs on one CPU, its clients and the destination on the other. CPU is that of all of its processes, those
that have ended included. Servers take turns within a round; figures are medians, and ratios are medians of the rounds'
ratios. Proxies that are not installed are left out, and named: Debian has dante-server, haproxy, microsocks and
tinyproxy, PyPI pproxy and proxy.py.
"""

from __future__ import annotations

import argparse
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .measure import (
    CLIENT_CPU,
    ROOT,
    SERVER_CPU,
    START_TIMEOUT,
    BenchError,
    allow_descriptors,
    cpu_of_session,
    kill_all,
    memory_kib,
    prepare,
    processes,
)
from .servers import OURS, PYTHON, free_port
from .transfers import CHUNK, GIB, HAPROXY, Figures, Target, discard, table

ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 1024\r\n\r\n" + b"x" * 1024
REQUEST = b"GET / HTTP/1.0\r\n\r\n"

OURS_FILE = """
[[listener]]
listen = "127.0.0.1:{port}"
[rules]
destinations = ["allow loopback"]
"""

DANTED = """
logoutput: /dev/null
internal: 127.0.0.1 port = {port}
external: lo
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 }}
"""

TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 60
MaxClients 20000
LogLevel Critical
LogFile "{folder}/tinyproxy.log"
Allow 127.0.0.0/8
"""


# Its own start asks for an event loop in a way that Python 3.14 and uvloop 0.22 do not know any more.
PPROXY = """
import asyncio, {module}
loop = {module}.new_event_loop()
asyncio.get_event_loop = lambda: loop
from pproxy.server import main
main()
"""


@dataclass(frozen=True)
class Proxy:
    """A server to be measured.

    Attributes:
        speaks: what its clients say: "socks5", "http" (CONNECT), or "" for a relay to one target.
        program: that must be installed, or the Python module.
        command: of (port, the destination's port, folder).
    """

    speaks: str
    program: str
    command: Callable[[int, int, str], list[str]]

    @property
    def is_there(self) -> bool:
        if self.program.startswith("-m "):
            found = subprocess.run([PYTHON, *self.program.split(), "--help"], capture_output=True, check=False)
            return found.returncode == 0
        return shutil.which(self.program) is not None


def _file(folder: str, name: str, text: str) -> str:
    path = Path(folder, name)
    path.write_text(text)
    return str(path)


def _ours(port: int, _target: int, folder: str) -> list[str]:
    path = _file(folder, f"proxy-{port}.toml", OURS_FILE.format(port=port))
    return [PYTHON, "-m", "gtcpserver", "proxy", "--config", path, "--log-level", "warning"]


def _with_file(template: str, arguments: list[str]) -> Callable[[int, int, str], list[str]]:
    def command(port: int, target: int, folder: str) -> list[str]:
        path = _file(folder, f"{arguments[0]}-{port}.conf", template.format(port=port, target=target, folder=folder))
        return [*arguments, path]

    return command


def _pproxy(module: str) -> Callable[[int, int, str], list[str]]:
    # It takes uvloop where it finds it.
    hide = "import sys; sys.modules['uvloop'] = None\n" if module == "asyncio" else ""
    return lambda port, _, __: [PYTHON, "-c", hide + PPROXY.format(module=module), "-l", f"socks5://127.0.0.1:{port}"]


PROXIES: dict[str, Proxy] = {
    OURS: Proxy("socks5", PYTHON, _ours),
    "danted": Proxy("socks5", "danted", _with_file(DANTED, ["danted", "-f"])),
    "haproxy, splice forced, to one target": Proxy("", "haproxy", _with_file(HAPROXY, ["haproxy", "-db", "-f"])),
    "microsocks": Proxy("socks5", "microsocks", lambda port, _, __: ["microsocks", "-i", "127.0.0.1", "-p", str(port)]),
    "3proxy": Proxy("socks5", "3proxy", lambda port, _, __: ["3proxy", f"socks -i127.0.0.1 -p{port}"]),
    "pproxy": Proxy("socks5", "-m pproxy", _pproxy("asyncio")),
    "pproxy on uvloop": Proxy("socks5", "-m pproxy", _pproxy("uvloop")),
    "proxy.py, HTTP": Proxy(
        "http",
        "-m proxy",
        lambda port, _, __: [
            *(PYTHON, "-m", "proxy", "--hostname", "127.0.0.1", "--port", str(port)),
            *("--num-workers", "1", "--num-acceptors", "1", "--log-level", "ERROR"),
        ],
    ),
    f"{OURS}, HTTP": Proxy("http", PYTHON, _ours),
    "tinyproxy, HTTP": Proxy("http", "tinyproxy", _with_file(TINYPROXY, ["tinyproxy", "-d", "-c"])),
}


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A proxy that runs; `session` is that of all of its processes."""

    speaks: str
    port: int
    session: int


@contextmanager
def running(proxy: Proxy, target: int, folder: str) -> Iterator[Running]:
    port = free_port()
    process = subprocess.Popen(
        proxy.command(port, target, folder),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=prepare(SERVER_CPU),
        start_new_session=True,
    )
    try:
        give_up = time.monotonic() + START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > give_up:
                    raise BenchError(f"{proxy.program} did not start") from None
                time.sleep(0.05)
        time.sleep(0.3)  # danted listens before its children are there
        yield Running(proxy.speaks, port, process.pid)
    finally:
        kill_all(process.pid)
        process.wait()


def cpu_of(server: Running) -> float:
    """Seconds of all processes, and of their children that have ended."""
    return sum(cpu_of_session(server.session))


def memory_of(server: Running) -> int:
    """KiB of all processes."""
    return sum(memory_kib(pid) for pid in processes(server.session))


# -- a client ----------------------------------------------------------------------------------------------------------


def greeting(speaks: str, port: int, name: bytes = b"") -> list[tuple[bytes, int]]:
    """What a client says, and how many bytes it gets for that; 0: up to an empty line."""
    if speaks == "socks5":
        where = b"\x03%c%b" % (len(name), name) if name else b"\x01\x7f\0\0\x01"
        return [(b"\x05\x01\x00", 2), (b"\x05\x01\x00" + where + struct.pack("!H", port), 10)]
    if speaks == "http":
        host = name or b"127.0.0.1"
        return [(b"CONNECT %b:%d HTTP/1.1\r\nHost: %b:%d\r\n\r\n" % (host, port, host, port), 0)]
    return []


class Client:
    """One connection after another through a proxy, driven by a selector; counts those that went wrong."""

    def __init__(self, server: Running, target: int, left: list[int], name: bytes) -> None:
        self._server = server
        self._left = left
        self._script = [*greeting(server.speaks, target, name), (REQUEST, -1)]
        self.errors = 0

    def begin(self, selector: selectors.BaseSelector) -> bool:
        """Connect again, unless there were enough connections."""
        if not self._left[0]:
            return False
        self._left[0] -= 1
        self._sock = socket.socket()
        # 250 source addresses: ports that were used a minute ago are still in TIME-WAIT.
        self._sock.bind((f"127.0.0.{2 + self._left[0] % 250}", 0))
        self._sock.connect(("127.0.0.1", self._server.port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setblocking(False)
        self._step = -1
        self._data = b""
        selector.register(self._sock, selectors.EVENT_READ, self)
        self._say()
        return True

    def _say(self) -> None:
        self._step += 1
        self._data = b""
        self._sock.send(self._script[self._step][0])

    def readable(self, selector: selectors.BaseSelector) -> bool:
        """Take what has come; False when there is nothing more to do."""
        wanted = self._script[self._step][1]
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._data += data
        if not data or (wanted < 0 and len(self._data) >= len(ANSWER)):
            if self._data != ANSWER:
                self.errors += 1
            selector.unregister(self._sock)
            self._sock.close()
            return self.begin(selector)
        if (wanted > 0 and len(self._data) >= wanted) or (wanted == 0 and self._data.endswith(b"\r\n\r\n")):
            self._say()
        return True


#: Seconds that one run may take: a proxy that waits for something at each connection would take minutes.
LONGEST_RUN = 8.0


def short_connections(server: Running, target: int, count: int, at_once: int, name: bytes) -> int:
    """Make so many connections, or as many as LONGEST_RUN allows; returns how many there were.

    Raises:
        BenchError: one of them went wrong.
    """
    left = [count]
    give_up = time.monotonic() + LONGEST_RUN
    clients = [Client(server, target, left, name) for _ in range(at_once)]
    with selectors.DefaultSelector() as selector:
        busy = sum(client.begin(selector) for client in clients)
        while busy:
            found = selector.select(20)
            if not found:
                raise BenchError("no answer for 20 seconds")
            if time.monotonic() > give_up:
                count -= left[0]
                left[0] = 0
                give_up = float("inf")
            for key, _ in found:
                busy -= not key.data.readable(selector)
    errors = sum(client.errors for client in clients)
    if errors:
        raise BenchError(f"{errors} of {count} connections were not answered")
    return count


def through(server: Running, target: int) -> socket.socket:
    """A tunnel to the target."""
    sock = socket.create_connection(("127.0.0.1", server.port), 60)
    for said, wanted in greeting(server.speaks, target):
        sock.sendall(said)
        data = b""
        while (len(data) < wanted) if wanted else not data.endswith(b"\r\n\r\n"):
            more = sock.recv(wanted - len(data) if wanted else 1)
            if not more:
                raise BenchError("the proxy closed")
            data += more
    return sock


class ShortTarget:
    """Behind the proxies: answers one request, and closes. A process of its own, on the clients' CPU."""

    SOURCE = """
import socket, sys
answer = bytes.fromhex(sys.argv[1])
with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
    print(listening.getsockname()[1], flush=True)
    while True:
        sock, _ = listening.accept()
        try:
            sock.recv(4096)
            sock.send(answer)
        except OSError:
            pass
        sock.close()
"""

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            [PYTHON, "-c", self.SOURCE, ANSWER.hex()], stdout=subprocess.PIPE, preexec_fn=prepare(CLIENT_CPU)
        )
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Holder:
    """Behind the proxies: accepts, and says nothing."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = int(self._listening.getsockname()[1])
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._held.append(self._listening.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in self._held:
            sock.close()


# -- scenarios ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    rounds: int
    connections: int
    gib: float
    folder: str
    proxies: dict[str, Proxy]


def one_after_another(options: Options) -> Figures:
    return _short(options, 1, options.connections // 2)


def fifty_at_once(options: Options) -> Figures:
    return _short(options, 50, options.connections)


def fifty_by_name(options: Options) -> Figures:
    """As browsers ask: the proxy looks the name up (here in /etc/hosts)."""
    return _short(options, 50, options.connections, b"localhost")


def _short(options: Options, at_once: int, count: int, name: bytes = b"") -> Figures:
    with ShortTarget() as target:

        def run(server: Running) -> float:
            short_connections(server, target, 200, at_once, name)  # warm, and checked
            before = cpu_of(server)
            done = short_connections(server, target, count, at_once, name)
            return (cpu_of(server) - before) / done * 1e6

        return _in_turn(options, target, run)


def bulk(options: Options) -> Figures:
    target = Target()
    count = int(options.gib * GIB)

    def run(server: Running) -> float:
        with through(server, target.port) as sock:
            before = cpu_of(server)
            sock.sendall(struct.pack("!Q", count))
            discard(sock, count)
            return (cpu_of(server) - before) / (count / GIB)

    return _in_turn(options, target.port, run)


def _in_turn(options: Options, target: int, run: Callable[[Running], float]) -> Figures:
    found: Figures = {name: [] for name in options.proxies}
    for _ in range(options.rounds):
        for name in random.sample(list(options.proxies), len(options.proxies)):
            try:
                with running(options.proxies[name], target, options.folder) as server:
                    found[name].append(run(server))
            except BenchError as problem:
                raise BenchError(f"{name}: {problem}") from None
    return found


def idle_tunnels(options: Options, number: int = 10_000) -> None:
    """Memory of tunnels in which nothing moves."""
    # A tunnel takes two in the proxy, and two here.
    number = min(number, (allow_descriptors() - 200) // 2)
    print(f"### {number:,} idle tunnels: KiB of memory each\n\n| server | KiB |\n| --- | ---: |")
    for name in (OURS, "danted", "microsocks"):
        proxy = options.proxies.get(name)
        # danted wants three processes for each thousand of clients; it is not asked for as many.
        count = number if name == OURS else 200
        if proxy is None:
            continue
        holder = Holder()
        with running(proxy, holder.port, options.folder) as server, ExitStack() as stack:
            for _ in range(50):
                through(server, holder.port).close()
            time.sleep(0.5)
            before = memory_of(server)
            for _ in range(count):
                stack.enter_context(through(server, holder.port))
            time.sleep(0.5)
            used = (memory_of(server) - before) / count
            print(f"| {name}{'' if count == number else f', {count} tunnels'} | {used:.1f} |", flush=True)
        holder.close()
    print()


SCENARIOS = {
    "sequential": ("Short connections, one after another (1 kB): CPU us a connection", one_after_another),
    "short": ("Short connections, 50 at once (1 kB): CPU us a connection", fifty_at_once),
    "names": ("The same, with the name of the destination", fifty_by_name),
    "bulk": ("Bulk data through one tunnel: CPU s a GiB", bulk),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.proxies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, "idle"], help="default: all")
    parser.add_argument("--proxy", action="append", choices=list(PROXIES), help="compare with these; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=6000, help="in each run")
    parser.add_argument("--gib", type=float, default=1.0, help="moved in each run of bulk data")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all of it works")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.connections < 100 or not 0 < given.gib <= 1024:
        parser.error("--rounds must be 1 or more, --connections 100 or more, and --gib more than 0")
    wanted = {name: PROXIES[name] for name in PROXIES if not given.proxy or name == OURS or name in given.proxy}
    there = {name: proxy for name, proxy in wanted.items() if proxy.is_there}
    missing = [name for name in wanted if name not in there]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}\n")
    os.sched_setaffinity(0, {CLIENT_CPU})
    allow_descriptors()
    try:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            os.chmod(folder, 0o777)
            quick = given.quick
            options = Options(
                1 if quick else given.rounds,
                400 if quick else given.connections,
                CHUNK * 64 / GIB if quick else given.gib,
                folder,
                there,
            )
            for name in given.scenario or [*SCENARIOS, "idle"]:
                if name in SCENARIOS:
                    title, scenario = SCENARIOS[name]
                    print(table(title, scenario(options)), flush=True)
                else:
                    idle_tunnels(options, 500 if quick else 10_000)
    except (BenchError, OSError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
