"""What many connections take: the table of docs/how-to/many-machines.md, computed from docs/performance.md.

python -m loadtests.bench.sizing              # prints it
python -m loadtests.bench.sizing --publish    # puts it into the page; loadtests.bench --publish does so, too
python -m loadtests.bench.sizing --kernel     # the kernel's memory of a connection on this machine (root)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from ..local_servers import ROOT

PAGE = ROOT / "docs" / "how-to" / "many-machines.md"
PERFORMANCE = ROOT / "docs" / "performance.md"

COUNTS = (1_000, 10_000, 100_000, 1_000_000)

#: Objects that the kernel has for each connection of a process (/proc/slabinfo).
OBJECTS = ("TCP", "sock_inode_cache", "dentry", "filp", "eventpoll_epi")
TRACKED = "nf_conntrack"

#: Bytes of all of them, and of one tracked connection: Linux 6.18, x86-64, by --kernel.
KERNEL_BYTES = 3901
TRACKED_BYTES = 256

#: KiB of an idle connection over TLS: docs/how-to/tls.md.
TLS_KIB = 21.0

#: Ports of outgoing connections from one address to one other (net.ipv4.ip_local_port_range): by default, and all.
PORTS = 60_999 - 32_768 + 1
ALL_PORTS = 65_535 - 1_024 + 1


@dataclass
class Costs:
    """Figures of docs/performance.md.

    Attributes:
        idle: KiB of an idle connection in the process.
        request: CPU µs of a keep-alive request.
        connection: CPU µs of a new connection with one request.
        handshake: the same with TLS 1.3.
    """

    idle: float
    request: float
    connection: float
    handshake: float


def read_costs(page: str) -> Costs:
    """Find them on the page. Raises ValueError if one is missing."""
    return Costs(
        _cell(page, "Memory of 10,000 idle keep-alive connections", "KiB each"),
        _cell(page, "Keep-alive, 1 kB, 1,000 connections (test 2", "CPU µs a request"),
        _cell(page, "New connections, 1 kB, 1,000 clients (test 1", "CPU µs a request"),
        _cell(page, "TLS 1.3, new connections, 1 kB, 100 clients", "CPU µs a request"),
    )


def _cell(page: str, title: str, column: str) -> float:
    section = re.search(rf"^### {re.escape(title)}.*?(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")] for line in (section[0] if section else "").splitlines()]
    for row in rows:
        if row[1:2] == ["gtcpserver"]:
            head = next(other for other in rows if column in other)
            return float(row[head.index(column)].replace(",", ""))
    raise ValueError(f"docs/performance.md has no {column} of gtcpserver in {title!r}")


def table(costs: Costs) -> str:
    """Return the table as Markdown."""
    rows = {
        "memory of the workers": lambda n: size(n * costs.idle * 1024),
        "the same over TLS": lambda n: size(n * TLS_KIB * 1024),
        "memory of the kernel": lambda n: size(n * KERNEL_BYTES),
        "memory of connection tracking, where there is any": lambda n: size(n * TRACKED_BYTES),
        "addresses of a balancer in front, with its system's 28,232 ports": lambda n: str(ceil(n / PORTS)),
        "the same with 64,512 ports": lambda n: str(ceil(n / ALL_PORTS)),
        "CPUs, if each sends a request of 1 kB a minute": lambda n: figure(n / 60 * costs.request / 1e6),
        "CPU seconds until all have connected again": lambda n: figure(n * costs.connection / 1e6),
        "the same over TLS, without resumption": lambda n: figure(n * costs.handshake / 1e6),
    }
    lines = [
        f"| idle connections | {' | '.join(f'{count:,}' for count in COUNTS)} |",
        f"| --- |{' ---: |' * len(COUNTS)}",
    ]
    lines += [f"| {name} | {' | '.join(map(value, COUNTS))} |" for name, value in rows.items()]
    return "\n".join(lines)


def size(count: float) -> str:
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{figure(count)} {unit}"
    return f"{figure(count / 1024)} GiB"


def figure(value: float) -> str:
    """Two significant digits, and all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def put_into_page() -> None:
    """Renew the table. Raises ValueError if a figure or the page's marks are missing."""
    text = PAGE.read_text()
    begin, end = "<!-- sizing -->\n", "<!-- end of sizing -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{PAGE} has no marks for sizing")
    before, rest = text.split(begin)
    PAGE.write_text(f"{before}{begin}{table(read_costs(PERFORMANCE.read_text()))}\n{end}{rest.split(end)[1]}")


def object_sizes(slabinfo: str) -> Iterator[tuple[str, float]]:
    """Yield the objects of a connection and the bytes of each, with its part of what its pages leave over."""
    for line in slabinfo.splitlines():
        words = line.split()
        if words and words[0] in (*OBJECTS, TRACKED):
            yield words[0], int(words[5]) * 4096 / int(words[4])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.sizing", description=__doc__.split("\n")[0])
    parser.add_argument("--publish", action="store_true", help="put the table into the documentation")
    parser.add_argument("--kernel", action="store_true", help="print the sizes of this kernel's objects")
    options = parser.parse_args(arguments)
    try:
        if options.kernel:
            sizes = dict(object_sizes(Path("/proc/slabinfo").read_text()))
            for name, count in sizes.items():
                print(f"{name} {count:.0f}")
            print(f"a connection: {sum(count for name, count in sizes.items() if name != TRACKED):.0f} bytes")
        elif options.publish:
            put_into_page()
        else:
            print(table(read_costs(PERFORMANCE.read_text())))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
