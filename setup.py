"""Compiles the modules of gtcpserver._build.MODULES; where that fails, gtcpserver is installed in pure Python."""

from __future__ import annotations

import hashlib
import os
import runpy
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = Path("gtcpserver")
BUILD = runpy.run_path(str(PACKAGE / "_build.py"))

DIRECTIVES = {
    "language_level": "3",
    "annotation_typing": False,  # annotations are for type checkers: the .pxd files say what is a C type
    "binding": True,  # functions that inspect.signature and tracebacks know as usual
    "always_allow_keywords": True,
    "embedsignature": False,
    "profile": False,
    "linetrace": False,
}


#: Stands in the record for all that a build depends on besides the sources.
TOOLS = "(tools)"


class BuildModules(build_ext):
    """Compiles all modules or none, and leaves a record for gtcpserver._compiled."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or cpus()

    def run(self) -> None:
        folders = [Path(self.build_lib, PACKAGE), *([PACKAGE] if self.inplace else [])]
        if not self.extensions:
            remove(folders)
            return
        record = "".join(f"{BUILD['digest'](str(PACKAGE / path))} {path}\n" for path in sources())
        try:
            if os.uname().sysname != "Linux":
                raise RuntimeError("the compiled modules call what only Linux has, such as epoll(7)")
            record += f"{digest_of_tools()} {TOOLS}\n"
            if self.inplace and not self.force and is_built(record):
                self.extensions = []  # otherwise their files would be expected
                return
            self._forget_changed(folders[0] / BUILD["record"](), record)
            self._translate()
            super().run()
        except Exception as error:  # no compiler, no Python.h, no Cython, its errors and those of the compiler
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"gtcpserver: nothing is compiled, it is installed in pure Python: {reason}", file=sys.stderr)
            self.extensions = []  # otherwise their files would be expected
            record = f"{BUILD['FAILED']} {reason}\n"
            remove(folders)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BUILD["record"]()).write_text(record, encoding="utf-8")

    def _forget_changed(self, path: Path, record: str) -> None:
        """Remove the C files of sources that are not those of the last build: Cython compares times alone."""
        last = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        changed = [line.partition(" ")[2] for line in record.splitlines() if line not in last]
        self.force = self.force or TOOLS in changed
        for extension in self.extensions:
            source = BUILD["source"](extension.name)
            if source in changed or any(name.endswith(".pxd") for name in changed):
                Path(self.build_temp, PACKAGE, source).with_suffix(".c").unlink(missing_ok=True)

    def _translate(self) -> None:
        """Have Cython translate each .py file to C."""
        import greenlet
        from Cython.Build import cythonize

        # greenlet/greenlet.h lies in greenlet's package.
        include = os.path.dirname(os.path.dirname(greenlet.__file__))
        translated = cythonize(
            [Extension(extension.name, extension.sources) for extension in self.extensions],
            build_dir=self.build_temp,
            compiler_directives=DIRECTIVES,
            force=bool(self.force),
        )
        generated = {extension.name: extension.sources for extension in translated}
        for extension in self.extensions:
            extension.sources = generated[extension.name]
            extension.include_dirs.append(include)


class BuildPure(build_py):
    """Removes from a checkout what was compiled in it before: it would be used."""

    def run(self) -> None:
        super().run()
        if self.editable_mode and not self.distribution.ext_modules:
            remove([PACKAGE])


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove(folders: list[Path]) -> None:
    for folder in folders:
        for path in [BUILD["record"](), *map(BUILD["library"], BUILD["MODULES"])]:
            (folder / path).unlink(missing_ok=True)


def is_built(record: str) -> bool:
    """Return whether a checkout has the modules, compiled from the same sources in the same way."""
    paths = [PACKAGE / BUILD["record"](), *(PACKAGE / BUILD["library"](name) for name in BUILD["MODULES"])]
    return all(path.exists() for path in paths) and paths[0].read_text(encoding="utf-8") == record


def digest_of_tools() -> str:
    """Return a digest of what a build depends on besides the sources: without one, each extra that is installed in a
    checkout would compile it again, half a minute of CPU."""
    import Cython
    import greenlet

    header = Path(greenlet.__file__).with_name("greenlet.h").read_bytes()
    names = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED")
    flags = [(os.environ.get(name), sysconfig.get_config_var(name)) for name in names]
    return hashlib.sha256(
        repr((sys.version, Cython.__version__, header, flags, FLAGS, DIRECTIVES)).encode()
    ).hexdigest()


def sources() -> list[str]:
    """Return the paths of what is compiled, from the package's folder: the modules, and every .pxd file."""
    headers = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.pxd")]
    return sorted([BUILD["source"](name) for name in BUILD["MODULES"]] + headers)


#: Behind those of Python's own build. -g0: debugging information is four fifths of a library; names stay without it.
FLAGS = ["-O2", "-g0"]


def extensions() -> list[Extension]:
    if BUILD["forced_pure"]():
        print("gtcpserver: GTCPSERVER_PURE is set, nothing is compiled", file=sys.stderr)
        return []
    return [
        Extension(name, [str(PACKAGE / BUILD["source"](name))], extra_compile_args=FLAGS) for name in BUILD["MODULES"]
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildModules, "build_py": BuildPure})
