"""What is measured on what; and the programs that must be there."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from ..local_servers import ROOT

PACKAGES = ("gtcpserver", "gevent", "greenlet", "uvloop", "trio", "twisted", "cryptography")

#: Program -> its Debian package.
DEBIAN = {"haproxy": "haproxy", "nginx": "nginx-light", "openssl": "openssl", "wrk": "wrk"}

#: Programs by what needs them.
NEEDED = {
    "bench": ("openssl", "wrk"),
    "transfers": ("haproxy", "nginx", "wrk"),
    "workers": ("wrk",),
    "monitoring": ("wrk",),
}


def machine(seed: int) -> dict[str, str]:
    """What was measured on what."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": said_by(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], r"(\S+)"),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "kernel": platform.release(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "openssl": ssl.OPENSSL_VERSION.split()[1],
        "go": said_by(["go", "version"], r"go version go(\S+)"),
        "wrk": said_by(["wrk", "-v"], r"wrk (?:debian/)?(\S+)"),
        "seed": str(seed),
    }


def said_by(command: list[str], pattern: str) -> str:
    """What of a program's words is in the pattern's first group; "missing"."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return "missing"
    # wrk -v ends with status 1.
    found = re.match(pattern, done.stdout) if "fatal" not in done.stdout else None
    return found[1] if found else "missing"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def lacking(programs: Iterable[str]) -> str:
    """One line that names all of them which are missing; "" if none is."""
    missing = sorted({DEBIAN[name] for name in programs if shutil.which(name) is None})
    return f"the benchmarks need {', '.join(missing)}: apt-get install {' '.join(missing)}" if missing else ""


def need(program: str) -> None:
    """Exit with status 2 unless what a benchmark needs is there."""
    missing = lacking(NEEDED[program])
    if missing:
        print(missing, file=sys.stderr)
        sys.exit(2)


def install() -> int:
    """Install what any of the benchmarks needs, as root where there is apt-get; else say what is missing."""
    programs = {name for names in NEEDED.values() for name in names}
    missing = lacking(programs)
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        packages = missing.rpartition("apt-get install ")[2].split()
        print(f"installing {' '.join(packages)}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-qq", *command], env=environment, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                break
        missing = lacking(programs)
    if missing:
        print(missing, file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(install())
