"""The proxies that are compared, and how they are run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .measure import SERVER_CPU, cpu_of_session, memory_kib, processes
from .results import OURS
from .starting import PYTHON, free_port, started, wait_until_it_accepts
from .transfer_peers import HAPROXY

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

# Without a cache: it stores nothing, and asks its origin for each request.
SQUID = """
http_port 127.0.0.1:{port}
http_access allow all
cache deny all
cache_mem 0
access_log none
cache_log /dev/null
cache_store_log none
pid_filename none
pinger_enable off
shutdown_lifetime 0 seconds
coredump_dir {folder}
visible_hostname squid
max_filedescriptors 16384
"""

PRIVOXY = """
listen-address 127.0.0.1:{port}
logdir {folder}
logfile privoxy.log
debug 0
toggle 0
keep-alive-timeout 60
default-server-timeout 60
connection-sharing 0
tolerate-pipelining 1
socket-timeout 60
max-client-connections 4096
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
    "squid, HTTP": Proxy("http", "squid", _with_file(SQUID, ["squid", "-N", "-f"])),
    "privoxy, HTTP": Proxy("http", "privoxy", _with_file(PRIVOXY, ["privoxy", "--no-daemon"])),
    "tinyproxy, HTTP": Proxy("http", "tinyproxy", _with_file(TINYPROXY, ["tinyproxy", "-d", "-c"])),
}


@dataclass(frozen=True)
class Running:
    """A proxy that runs; `session` is that of all of its processes."""

    speaks: str
    port: int
    session: int


@contextmanager
def running(proxy: Proxy, target: int, folder: str) -> Iterator[Running]:
    port = free_port()
    with started(proxy.program, proxy.command(port, target, folder), {SERVER_CPU}) as process:
        wait_until_it_accepts(proxy.program, process, port)
        time.sleep(0.3)  # danted listens before its children are there
        yield Running(proxy.speaks, port, process.pid)


def cpu_of(server: Running) -> float:
    """Seconds of all processes, and of their children that have ended."""
    return sum(cpu_of_session(server.session))


def memory_of(server: Running) -> int:
    """KiB of all processes."""
    return sum(memory_kib(pid) for pid in processes(server.session))
