"""The peers in Go (loadtests/peers/go), compiled when they are first asked for; without Go there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from ..local_servers import ROOT

SOURCES = ROOT / "loadtests" / "peers" / "go"

#: Where Debian's packages of Go libraries put their sources.
LIBRARIES = "/usr/share/gocode"

#: Row -> program.
PROGRAMS = {"Go net": "net", "Go net/http": "nethttp", "Go fasthttp": "fasthttp"}

#: Seconds for one of them, with the standard library.
BUILD_SECONDS = 300


def command(name: str) -> list[str]:
    """Return what runs a peer that was built."""
    return [str(SOURCES / "bin" / PROGRAMS[name])]


@cache
def why_missing(name: str) -> str:
    """Compile a peer; return why that cannot be done, or "" when it is done."""
    if shutil.which("go") is None:
        return "Go is missing (Debian: golang-go)"
    sources = [f"{PROGRAMS[name]}.go", "common.go"]
    # Without modules: nothing is downloaded.
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": LIBRARIES, "GOFLAGS": "", "CGO_ENABLED": "0"}
    binary = Path(command(name)[0])
    try:
        done = subprocess.run(
            ["go", "build", "-o", binary, *sources],
            cwd=SOURCES,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"go build: {problem}"
    if "cannot find package" in done.stdout:
        return f"{name.split()[1]} is missing (Debian: golang-github-valyala-{name.split()[1]}-dev)"
    return "" if done.returncode == 0 else f"go build: {' '.join(done.stdout.split())}"
