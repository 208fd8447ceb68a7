"""The compiled form of the package: built where it can be, used where it fits, and pure Python everywhere else.

Copies of the package are built, with two small modules in the list instead of those of the hot path.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from gtcpserver._build import SUFFIX
from kit.paths import ROOT

#: Seconds for a build on a busy machine.
BUILD = 120

MODULES = ("gtcpserver.plural", "gtcpserver.networks")
LIBRARIES = [f"gtcpserver/{name.partition('.')[2]}{SUFFIX}" for name in MODULES]
RECORD = f"gtcpserver/_build{SUFFIX.removesuffix('.so')}.txt"
TELL = """
import sys, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import gtcpserver
from gtcpserver import networks, plural
print(gtcpserver.compiled)
print(gtcpserver.why_pure)
print(*(module.__file__.rpartition("/")[2] for module in (plural, networks)))
print(plural.counted(2, "client"))
print(*(f"{warning.category.__name__} {warning.message}" for warning in told), sep="\\n")
"""


class Checkout:
    """A copy of the sources."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.path,
            env={**os.environ, "GTCPSERVER_PURE": "", **environment},
            text=True,
            capture_output=True,
            timeout=BUILD,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("setup.py", "-q", "build_ext", "--inplace", **environment)

    def state(self, **environment: str) -> tuple[bool, str, list[str]]:
        """Import it. Return whether it is compiled, why not, and the warnings."""
        result = self.run("-c", TELL, **environment)
        assert result.returncode == 0, result.stderr
        compiled, why, files, used, *told = result.stdout.splitlines()
        suffix = SUFFIX if compiled == "True" else ".py"
        assert files == f"plural{suffix} networks{suffix}"  # all or none
        assert used == "2 clients"
        return compiled == "True", why, [line for line in told if line]

    def edit(self, path: str, text: str) -> None:
        with open(self.path / path, "a") as file:
            file.write(text)


def copy_sources(target: Path) -> Checkout:
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pytest_gtcpserver.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("*.so", "*.pxd", "_build.*.txt", "__pycache__")
    shutil.copytree(ROOT / "gtcpserver", target / "gtcpserver", ignore=ignored)
    listed = target / "gtcpserver" / "_build.py"
    text, changed = re.subn(
        r"^MODULES: (.*?) = \(.*?\)$", rf"MODULES: \1 = {MODULES}", listed.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert changed == 1
    listed.write_text(text)
    for name in MODULES:
        (target / name.replace(".", "/")).with_suffix(".pxd").touch()
    return Checkout(target)


@pytest.fixture(scope="session")
def need_compiler() -> None:
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools", "77")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C compiler {compiler}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("there is no Python.h")


@pytest.fixture(scope="session")
def built(need_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the list is compiled, made once for all processes of a run: it takes 3 s of CPU."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "built.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "built" / "done"
        if not done.exists():
            shutil.rmtree(done.parent, ignore_errors=True)  # of one that failed
            done.parent.mkdir()
            result = copy_sources(done.parent / "checkout").build()
            assert result.returncode == 0, result.stderr
            done.touch()
    return done.parent / "checkout"


@pytest.fixture
def compiled(built: Path, tmp_path: Path) -> Checkout:
    """A checkout in which the list is compiled."""
    shutil.copytree(built, tmp_path / "checkout", symlinks=True)
    return Checkout(tmp_path / "checkout")


@pytest.fixture
def sources(tmp_path: Path) -> Checkout:
    """A checkout in which nothing is compiled."""
    return copy_sources(tmp_path / "checkout")


def version_line(checkout: Checkout, **environment: str) -> str:
    result = checkout.run("-m", "gtcpserver", "--version", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.rstrip()


# -- at run time -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_modules_are_used_and_said(compiled: Checkout) -> None:
    assert compiled.state() == (True, "None", [])
    assert version_line(compiled).endswith(", compiled")
    assert re.search(r"^hot path +compiled +ok$", compiled.run("-m", "gtcpserver", "check").stdout, re.MULTILINE)


@pytest.mark.slow
def test_compiled_functions_have_signatures(compiled: Checkout) -> None:
    result = compiled.run("-c", "import inspect, gtcpserver.plural as m; print(inspect.signature(m.counted))")
    pure = compiled.run(
        "-c", "import inspect, gtcpserver.plural as m; print(inspect.signature(m.counted))", GTCPSERVER_PURE="1"
    )
    assert (result.stdout, result.stderr) == (pure.stdout, "")
    assert result.stdout.startswith("(number: ")


@pytest.mark.slow
def test_the_environment_asks_for_pure_python(compiled: Checkout) -> None:
    assert compiled.state(GTCPSERVER_PURE="1") == (False, "GTCPSERVER_PURE is set", [])
    assert compiled.state(GTCPSERVER_PURE="off")[0]
    assert version_line(compiled, GTCPSERVER_PURE="1").endswith(", pure Python (GTCPSERVER_PURE is set)")
    found = compiled.run("-m", "gtcpserver", "check", GTCPSERVER_PURE="1").stdout
    assert re.search(r"^hot path +pure Python: GTCPSERVER_PURE is set +ok$", found, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["networks.py", "plural.pxd"])
def test_an_edited_source_is_not_ignored(compiled: Checkout, path: str) -> None:
    before = os.stat(compiled.path / "gtcpserver" / path)
    compiled.edit(f"gtcpserver/{path}", "EDITED = True\n" if path.endswith(".py") else "# edited\n")
    os.utime(compiled.path / "gtcpserver" / path, ns=(before.st_atime_ns, before.st_mtime_ns))  # content counts
    is_compiled, why, told = compiled.state()
    assert not is_compiled
    assert why == f"{path} has changed since it was compiled; install gtcpserver again, or `make compiled`"
    assert told == [f"RuntimeWarning gtcpserver runs in pure Python: {why}"]
    assert compiled.build().returncode == 0
    assert compiled.state() == (True, "None", [])
    found = compiled.run("-c", "from gtcpserver import networks; print(hasattr(networks, 'EDITED'))")
    assert found.stdout == f"{path.endswith('.py')}\n"


@pytest.mark.slow
def test_another_time_of_the_sources_means_nothing(compiled: Checkout) -> None:
    for name in MODULES:
        os.utime((compiled.path / name.replace(".", "/")).with_suffix(".py"))
    assert compiled.state() == (True, "None", [])


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_one_missing_module_makes_all_pure(compiled: Checkout, library: str) -> None:
    (compiled.path / library).unlink()
    is_compiled, why, told = compiled.state()
    assert not is_compiled
    assert why == f"{library.partition('/')[2]} is missing"
    assert told == [f"RuntimeWarning gtcpserver runs in pure Python: {why}"]


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_one_module_that_cannot_be_loaded_makes_all_pure(compiled: Checkout, library: str) -> None:
    (compiled.path / library).write_bytes(b"not ELF\n" * 100)
    is_compiled, why, told = compiled.state()
    assert not is_compiled
    assert why.startswith("ImportError: ")
    assert library in why
    assert told == [f"RuntimeWarning gtcpserver runs in pure Python: {why}"]


@pytest.mark.slow
def test_one_module_that_fails_while_it_is_imported_makes_all_pure(compiled: Checkout) -> None:
    """As one does that was built for another layout of greenlet's objects, after all that it imports was imported."""
    source = compiled.path / "gtcpserver" / "networks.py"
    text = source.read_text()
    failing = (
        "\nimport gtcpserver.address\nif not __file__.endswith('.py'): raise ValueError('greenlet size changed')\n"
    )
    source.write_text(text + failing)
    assert compiled.build().returncode == 0
    is_compiled, why, told = compiled.state()
    assert not is_compiled
    assert why == "ValueError: greenlet size changed"
    assert told == [f"RuntimeWarning gtcpserver runs in pure Python: {why}"]


@pytest.mark.slow
def test_nothing_holds_a_class_of_a_module_that_was_given_up(compiled: Checkout) -> None:
    (compiled.path / LIBRARIES[1]).write_bytes(b"not ELF\n" * 100)
    result = compiled.run(
        "-W",
        "ignore",
        "-c",
        "import gtcpserver, sys; import gtcpserver.plural as plural, gtcpserver.run_log as user\n"
        "assert not gtcpserver.compiled\n"
        "assert user.counted is plural.counted is gtcpserver.plural.counted\n"
        "assert not [m.__file__ for n, m in sys.modules.items() if n.startswith('gtcpserver') and '.so' in m.__file__]",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_checkout_without_a_build_is_pure_without_a_word(sources: Checkout) -> None:
    assert sources.state() == (False, "nothing is compiled for this Python", [])


# -- the build ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "built"])
def test_without_a_compiler_the_build_succeeds_in_pure_python(
    before: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools", "77")
    sources = request.getfixturevalue("compiled" if before else "sources")
    missing = str(tmp_path / "no-cc")
    result = sources.run("setup.py", "-q", "build_ext", "--inplace", CC=missing)
    assert result.returncode == 0
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("gtcpserver: "))
    assert line.startswith("gtcpserver: nothing is compiled, it is installed in pure Python: ")
    assert missing in line
    is_compiled, why, told = sources.state()
    assert (is_compiled, told) == (False, [])
    assert why.startswith("compiling failed: ")
    assert missing in why
    assert not list(sources.path.glob("gtcpserver/**/*.so"))


@pytest.mark.slow
def test_what_is_built_is_not_built_again(compiled: Checkout) -> None:
    """By each extra that is installed in a checkout; with another compiler it is (above)."""
    times = [os.stat(compiled.path / library).st_mtime_ns for library in LIBRARIES]
    assert compiled.build().returncode == 0
    assert [os.stat(compiled.path / library).st_mtime_ns for library in LIBRARIES] == times
    (compiled.path / LIBRARIES[0]).unlink()
    assert compiled.build().returncode == 0
    assert compiled.state() == (True, "None", [])


@pytest.mark.slow
def test_a_type_that_cython_refuses_makes_all_pure(need_compiler: None, sources: Checkout) -> None:
    sources.edit("gtcpserver/networks.pxd", "cdef class Nobody(:\n")
    assert sources.build().returncode == 0
    is_compiled, why, told = sources.state()
    assert (is_compiled, why, told) == (False, "compiling failed: gtcpserver/networks.py", [])


@pytest.mark.slow
def test_the_environment_asks_for_a_pure_build(compiled: Checkout) -> None:
    result = compiled.build(GTCPSERVER_PURE="1")
    assert (result.returncode, result.stderr) == (0, "gtcpserver: GTCPSERVER_PURE is set, nothing is compiled\n")
    assert not list(compiled.path.glob("gtcpserver/**/*.so"))
    assert compiled.state() == (False, "nothing is compiled for this Python", [])


@pytest.mark.slow
@pytest.mark.parametrize(("pure", "tag"), [("", "linux"), ("1", "any")], ids=["compiled", "pure"])
def test_a_wheel_has_sources_and_what_was_compiled_from_them(compiled: Checkout, pure: str, tag: str) -> None:
    options = ("wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", "dist", ".")
    result = compiled.run("-m", "pip", *options, GTCPSERVER_PURE=pure)
    assert result.returncode == 0, result.stderr
    (wheel,) = (compiled.path / "dist").glob("*.whl")
    assert f"-{tag}" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gtcpserver/plural.py", "gtcpserver/plural.pxd", "gtcpserver/networks.pxd"} <= names
    assert {RECORD, *LIBRARIES} <= names or pure
    assert not (pure and [name for name in names if name == RECORD or name.endswith(".so")])
