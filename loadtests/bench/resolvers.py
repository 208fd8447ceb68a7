"""How long a lookup takes while others wait for a silent name server: our two resolvers, and gevent's three.

    python -m loadtests.bench.resolvers [--slow 0,30,100,300,300/300]

It runs in a network namespace of its own (root, unshare(1), ip(8), dnsmasq): a dnsmasq knows every name below good.test
at once, and asks a server that never answers about those of slow domains. So many clients as --slow says ask for one of
these each, in one domain, or in so many as are named behind a "/"; beside them 20 look-ups of good names are begun, one
every 50 ms. A resolver that finds no good name even alone "fails"; gevent's dnspython resolver is left out where that
library is missing. To wait is not to work: a busy machine does not change the figures much.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..local_servers import ROOT

#: How each is chosen: GEVENT_RESOLVER (gevent's documentation, "Name Resolution (DNS)"); ours does not depend on it.
KINDS = {
    "gtcpserver dns": "thread",
    "gtcpserver system": "thread",
    "gevent thread": "thread",
    "gevent ares": "ares",
    "gevent dnspython": "dnspython",
}

GOOD_LOOKUPS, EVERY = 20, 0.05

#: Seconds after which a good look-up is taken for lost.
PATIENCE = 15.0

RESOLV_CONF = "nameserver 127.0.0.1\n"
SILENT = ("127.0.0.9", 5353)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench.resolvers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--slow", default="0,30,100,300,300/300", help="clients that wait for names that nobody answers for [/domains]"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SLOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], options.one[1])
    elif options.inside:
        with tempfile.TemporaryDirectory() as folder:
            inside(Path(folder), options.slow.split(","))
    else:
        if os.geteuid() != 0:
            sys.exit("python -m loadtests.bench.resolvers: needs root, for a network namespace")
        command = ["unshare", "--net", "--mount", sys.executable, "-m", "loadtests.bench.resolvers", "--inside"]
        sys.exit(subprocess.run([*command, "--slow", options.slow], cwd=ROOT).returncode)


def inside(folder: Path, slow: list[str]) -> None:
    """In the namespaces: a name server, and one process for each measurement."""
    (folder / "resolv.conf").write_text(RESOLV_CONF)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "--bind", folder / "resolv.conf", "/etc/resolv.conf"], check=True)
    names = ["--address=/good.test/192.0.2.1", "--local=/good.test/", f"--server=/test/{SILENT[0]}#{SILENT[1]}"]
    dnsmasq = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--dns-forward-max=10000"]
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(SILENT)
        server = subprocess.Popen([*dnsmasq, "--pid-file", "--conf-file=/dev/null", *names])
        try:
            print(f"{'':18}" + "".join(f"{number + ' slow':>27}" for number in slow))
            for kind, chosen in KINDS.items():
                if kind == "gevent dnspython" and importlib.util.find_spec("dns") is None:
                    print(f"{kind:18}dnspython is not installed")
                    continue
                found = []
                for number in slow:
                    command = [sys.executable, "-m", "loadtests.bench.resolvers", "--one", kind, number]
                    environment = {**os.environ, "GEVENT_RESOLVER": chosen}
                    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
                    found.append(done.stdout.strip() or "fails")
                print(f"{kind:18}" + "".join(f"{text:>27}" for text in found), flush=True)
        finally:
            server.kill()
            server.wait()


def measure(kind: str, slow: str) -> None:
    """Print the median and the longest of the good look-ups, seconds."""
    import gevent
    import gevent.socket

    look_up: Callable[[str], object]
    if kind.startswith("gtcpserver"):
        from gtcpserver.proxy.resolve import Resolver

        look_up = Resolver(kind="system" if kind.endswith("system") else "dns").resolve
    else:

        def look_up(name: str) -> object:
            return gevent.socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)

    def ask(name: str) -> float | None:
        began = time.monotonic()
        try:
            look_up(name)
        except OSError:
            return None
        return time.monotonic() - began

    for _ in range(50):  # dnsmasq may still be starting
        if ask("first.good.test") is not None:
            break
        gevent.sleep(0.1)
    else:
        print("fails", flush=True)
        os._exit(1)
    clients, _, domains = slow.partition("/")
    waiting = [gevent.spawn(ask, f"{number}.slow{number % int(domains or 1)}.test") for number in range(int(clients))]
    gevent.sleep(0.2)
    good = []
    for number in range(GOOD_LOOKUPS):
        good.append(gevent.spawn(ask, f"{number}.good.test"))
        gevent.sleep(EVERY)
    gevent.joinall(good, timeout=PATIENCE)
    took = [float("inf") if one.value is None else one.value for one in good]
    gevent.killall(waiting, block=False)
    print(" / ".join(shown(seconds) for seconds in (statistics.median(took), max(took))), flush=True)
    os._exit(0)  # threads may wait for slow names yet


def shown(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < PATIENCE else f"over {PATIENCE:g}"


if __name__ == "__main__":
    main()
