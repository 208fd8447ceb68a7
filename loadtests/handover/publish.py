"""Put the figures into docs/performance.md, between the marks there."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path

import gevent

from ..local_servers import ROOT

PAGE = ROOT / "docs" / "performance.md"


def publish(figures: Mapping[str, float], connections: int, tunnels: int, rounds: int) -> None:
    """Put a table of the figures into the page.

    Raises:
        OSError, ValueError: the page cannot be read or written, or has no marks.
    """
    text = table(figures, connections, tunnels) + f"\n\n({machine()}; medians of {rounds} rounds.)"
    PAGE.write_text(put(PAGE.read_text(), text))
    print(f"published in {PAGE}", flush=True)


def put(page: str, text: str) -> str:
    begin, end = "<!-- handover -->\n", "<!-- end of handover -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE} has no marks for handover")
    before, rest = page.split(begin)
    return f"{before}{begin}{text}\n{end}{rest.split(end)[1]}"


def table(figures: Mapping[str, float], connections: int, tunnels: int) -> str:
    rates = f"{figures['bulk_rate'] / 1e9:.2f} and {figures['bulk_rate_after'] / 1e9:.2f} GB/s"
    rows = {
        f"{connections:,} idle connections: until all have moved": f"{figures['wall_seconds']:.2f} s",
        "CPU a connection, in both workers together": f"{figures['cpu_us']:.0f} µs",
        "99th percentile of a request's latency, without a move": _ms(figures["latency_p99"]),
        "the same during one": _ms(figures["latency_p99_moving"]),
        f"{tunnels:,} idle tunnels: until all have moved": f"{figures['tunnels_wall_seconds']:.2f} s",
        "CPU a tunnel, in the old worker": f"{figures['tunnel_cpu_old_us']:.0f} µs",
        "CPU a tunnel, in the new worker": f"{figures['tunnel_cpu_new_us']:.0f} µs",
        "a tunnel at full speed among them: longest pause": _ms(figures["bulk_pause"]),
        "the same without a move": _ms(figures["bulk_longest_wait"]),
        "its rate before and after": rates,
    }
    return "\n".join(["| move | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def machine() -> str:
    """Say what was measured on what."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    versions = f"Linux {platform.release()}, Python {platform.python_version()}, gevent {gevent.__version__}"
    load = f"load average before it {os.getloadavg()[2]:.2f}"
    return f"{os.cpu_count()} CPUs of {cpu}, {versions}; {load}, {time.strftime('%Y-%m-%d')}"
