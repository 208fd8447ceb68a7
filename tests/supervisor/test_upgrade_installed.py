"""An upgrade between two installed versions of the package, there and back, with connections that stay open.

GTCPSERVER_OTHER=DIR takes the second version from another checkout, such as of an older commit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from gtcpserver import __version__
from kit import supervised
from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import alive, wait_until

OTHER = Path(os.environ.get("GTCPSERVER_OTHER", ROOT))

#: Of the second version.
NUMBER = f"{__version__}.post99"

APP = """
import gtcpserver

def handler(conn):
    conn.session.setdefault("requests", 0)
    while True:
        with conn.idle():
            conn.recv_until(b"\\n")
        conn.session["requests"] += 1
        conn.sendall(f"{gtcpserver.__version__} {conn.session['requests']} {int(conn.resumed)}\\n".encode())
"""


def install(checkout: Path, version: str, folder: Path) -> Path:
    """Build a wheel of a checkout, with another version number, and install it in an environment of its own."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pytest_gtcpserver.py"):
        shutil.copy(checkout / name, source)
    left_out = shutil.ignore_patterns("*.so", "_build.*", "__pycache__")
    shutil.copytree(checkout / "gtcpserver", source / "gtcpserver", ignore=left_out)
    shutil.copy(checkout / "gtcpserver" / "_build.py", source / "gtcpserver")
    about = source / "gtcpserver" / "_version.py"
    about.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', about.read_text()))
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    pure = {**os.environ, "GTCPSERVER_PURE": "1"}
    subprocess.run(build, cwd=source, env=pure, check=True, capture_output=True, timeout=SOON)
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=SOON)
    (packages,) = venv.glob("lib/python3*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # What it depends on is the tests' own; the package itself is found before that.
    others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return venv


class Releases:
    """Two environments, and a link to the one that is current, as operators have them."""

    def __init__(self, folder: Path) -> None:
        self._link = folder / "current"
        self._venvs = {
            __version__: install(ROOT, __version__, folder / "one"),
            NUMBER: install(OTHER, NUMBER, folder / "two"),
        }
        self.use(__version__)

    def use(self, version: str) -> None:
        new = self._link.with_suffix(".new")
        new.symlink_to(self._venvs[version])
        new.replace(self._link)

    @property
    def command(self) -> list[str]:
        return [str(self._link / "bin" / "python"), "-m", "gtcpserver"]


class Client:
    def __init__(self, master) -> None:
        self.sock = master.connect()
        self.lines = self.sock.makefile("rb")
        self.requests = 0

    def ask(self) -> tuple[str, bool]:
        """The version that answers, and whether the connection has moved."""
        self.sock.sendall(b"x\n")
        version, requests, resumed = self.lines.readline().decode().split()
        self.requests += 1
        assert int(requests) == self.requests
        return version, resumed == "1"

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


@pytest.mark.slow
def test_connections_survive_an_upgrade_to_another_version_and_back(start, tmp_path, monkeypatch):
    pytest.importorskip("setuptools", "77")
    releases = Releases(tmp_path)
    monkeypatch.setattr(supervised, "COMMAND", releases.command)
    monkeypatch.setenv("GTCPSERVER_PURE", "1")
    master = start("--workers", "1", "--handover", "--probation", "0.2", app=APP)
    master.settled(1)
    clients = [Client(master) for _ in range(10)]
    assert {one.ask() for one in clients} == {(__version__, False)}
    master.ask("maint", on=True)
    for number, version in enumerate((NUMBER, __version__), 1):
        releases.use(version)
        old = master.pid
        assert master.ask("upgrade") == {"ok": True}
        master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready", number))
        wait_until(lambda pid=old: not alive(pid))
        master.settled(1)
        assert {one.ask() for one in clients} == {(version, True)}
        assert master.ask("status")["stats"]["active"] == len(clients)
        if OTHER == ROOT:
            assert master.ask("status")["maintenance"]
    for one in clients:
        one.close()
    if OTHER == ROOT:
        assert "begins anew" not in master.log()
    assert "Traceback" not in master.log()
    assert master.stop() == 0
