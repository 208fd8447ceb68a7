"""A newcomer's machine, for the pages that are typed from an empty folder: nothing is there but what a page installs.

There may be no package index where the tests run. `python3 -m venv` makes an environment without pip then, and `pip`
in it is this file: it links what the tests' own environment has of the distributions that are asked for, and of those
that they depend on. Whatever the page did not install can be neither imported nor called.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]  # not of kit, which is not there where this file is pip


#: Where Debian has programs; what the tests' environment has is not among them.
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

#: A `python3` whose `-m venv` is quick, and brings this file as pip.
PYTHON3 = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec {python} "$@"
{python} -m venv --without-pip "$3" || exit
printf '#!/bin/sh\\nexec {ours} {pip} %s "$@"\\n' "$(cd "$3" && pwd)" >"$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def make_machine(folder: Path) -> dict[str, str]:
    """A home with a checkout named gtcpserver in it; returns the variables of its environment."""
    (folder / "gtcpserver").symlink_to(ROOT)
    tools = folder / ".tools"
    tools.mkdir()
    python3 = tools / "python3"
    base = getattr(sys, "_base_executable", sys.executable)
    python3.write_text(PYTHON3.format(python=base, ours=sys.executable, pip=__file__))
    python3.chmod(0o755)
    return {
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "PATH": f"{tools}{os.pathsep}{SYSTEM_PATH}",
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",  # no colours
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
    }


def run_setup(commands: str, folder: Path, environment: dict[str, str], seconds: float) -> tuple[Path, dict[str, str]]:
    """Run the lines that begin a page; returns the folder and the variables that they lead to.

    Raises:
        CalledProcessError: one of the lines failed.
    """
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as told:
        try:
            subprocess.run(
                ["bash", "-e", "-c", f"{commands}\nprintf '%s\\0' \"$PWD\" >&{write_end}\nenv -0 >&{write_end}"],
                cwd=folder,
                env=environment,
                check=True,
                pass_fds=[write_end],
                stdin=subprocess.DEVNULL,
                timeout=seconds,
            )
        finally:
            os.close(write_end)
        where, *variables = told.read().decode().rstrip("\0").split("\0")
    return Path(where), dict(variable.split("=", 1) for variable in variables)


def run_in_terminal(
    words: list[str], folder: Path, environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a terminal of its own: some programs say other things to people than to pipes.

    Raises:
        TimeoutExpired: with what was said until then.
    """
    give_up = time.monotonic() + seconds
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
    finally:
        os.close(theirs)
    said = b""
    try:
        while data := read_terminal(ours, give_up - time.monotonic()):
            said += data
        return subprocess.CompletedProcess(words, process.wait(max(0, give_up - time.monotonic())), said)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise subprocess.TimeoutExpired(words, seconds, said) from None
    finally:
        os.close(ours)  # only now: it would hang up


def read_terminal(fd: int, seconds: float) -> bytes:
    """What comes next; nothing when nobody has the terminal any more, or when there is no time left."""
    if not select.select([fd], [], [], max(0, seconds))[0]:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO: the end
        return b""


# -- pip ---------------------------------------------------------------------------------------------------------------


def install(words: list[str], environment: Path) -> None:
    """Link what `pip install WORDS` would bring.

    Raises:
        SystemExit: a distribution is nowhere, or the checkout is not where the words say.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    for word in words:
        if re.match(r"\.{0,2}/", word):
            path, extras = re.fullmatch(r"([^\[]+)(\[.*\])?", word).groups()
            if not (Path(path) / "pyproject.toml").is_file():
                sys.exit(f"ERROR: Invalid requirement: {word!r}: there is no project in {path}")
            word = f"gtcpserver{extras or ''}"
        elif word.startswith("gtcpserver") and not (site / "gtcpserver").exists():
            sys.exit(f"ERROR: {word}: gtcpserver is on no index; install it from the checkout first")
        add(Requirement(word), site, set())


def add(requirement: Requirement, site: Path, seen: set[str]) -> None:
    if str(requirement) in seen:
        return
    seen.add(str(requirement))
    try:
        found = distribution(requirement.name)
    except PackageNotFoundError:
        sys.exit(f"ERROR: No matching distribution found for {requirement}")
    if requirement.name == "gtcpserver":
        # It may be installed as a link to the checkout.
        paths = [ROOT / "gtcpserver", ROOT / "pytest_gtcpserver.py", *find_metadata(found)]
    else:
        paths = [Path(found.locate_file(name)) for name in top_names(found)]
    base = Path(found.locate_file(""))
    for path in paths:
        target = site / (path.relative_to(base) if path.is_relative_to(base) else path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(path)
    for entry in found.entry_points:
        if entry.group == "console_scripts":
            script = site.parents[2] / "bin" / entry.name
            call = f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
            script.write_text(f"#!{script.parent}/python\n{call}")
            script.chmod(0o755)
    for text in found.requires or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": name}) for name in ("", *requirement.extras)):
            needed.marker = None
            add(needed, site, seen)


def find_metadata(found: Distribution) -> list[Path]:
    return [Path(found.locate_file(file.parent)) for file in found.files or () if file.name == "METADATA"]


def top_names(found: Distribution) -> set[str]:
    """What to link: packages as a whole; of a directory that it shares with others (`zope`), its part."""
    names = set()
    for file in found.files or ():
        if file.parts[0] in ("..", "/", "__pycache__"):
            continue  # scripts, which are made from the entry points
        depth = 1
        while depth < len(file.parts) and not is_whole(Path(found.locate_file("/".join(file.parts[:depth])))):
            depth += 1
        names.add("/".join(file.parts[:depth]))
    return names


def is_whole(directory: Path) -> bool:
    return (directory / "__init__.py").exists() or directory.suffix == ".dist-info"


if __name__ == "__main__":
    _, prefix, command, *arguments = sys.argv
    if command != "install":
        sys.exit(f"pip {command} is not known here")
    install(arguments, Path(prefix))
