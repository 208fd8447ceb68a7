"""A module's types (.pxd) and its source (.py) cannot drift apart, and the list of compiled modules is whole."""

from __future__ import annotations

import configparser

import pytest

from gtcpserver._build import MODULES, source
from kit.paths import ROOT
from kit.pxd import Class, Function, compare, read_pxd

PACKAGE = ROOT / "gtcpserver"


def test_types_and_sources_say_the_same() -> None:
    problems = []
    for name in MODULES:
        path = PACKAGE / source(name)
        problems += [
            f"{source(name)}: {problem}" for problem in compare(path.with_suffix(".pxd").read_text(), path.read_text())
        ]
    assert problems == []


def test_each_module_with_types_is_compiled() -> None:
    typed = {path.relative_to(PACKAGE).with_suffix(".py") for path in PACKAGE.rglob("*.pxd")}
    # Others are headers, which modules share.
    assert {str(path) for path in typed if (PACKAGE / path).exists()} == {source(name) for name in MODULES}


def test_only_modules_that_may_be_compiled_are() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    assert set(MODULES) <= set(contracts["importlinter:contract:compiled"]["source_modules"].split())


# -- the comparison itself ---------------------------------------------------------------------------------------------

PXD = '''
cimport cython
from libc.errno cimport errno, EINTR

cdef extern from *:
    """
    static int nobody(void) { return 0; }
    """
    int nobody()
    ssize_t c_recv "recv"(int fd, void* buf) nogil

cdef inline double now() noexcept:
    cdef double seconds = nobody()
    return seconds

cdef object _closed
cpdef object make(int fd, bint certain=*)

@cython.final
cdef class Stream(Base):
    cdef object __weakref__
    cdef public object io, _raw
    cdef readonly long long received  # bytes
    cdef unsigned char* start
    cdef int[2] ends
    cdef char scratch[16]
    cdef list[bytes] parts

    cdef inline bint more(self):
        return self.received > 0

    @cython.locals(size=Py_ssize_t, data=bytes)
    cpdef recv(self, Py_ssize_t bufsize,
               int flags=*)
    cpdef bint goes_on(self) except -1
    cdef _wait(self, object watcher not None)

cdef class Timed(Stream):
    cdef double until
'''

SOURCE = """
def make(fd: int, certain: bool = False): ...

class Stream:
    __slots__ = ("io", "_raw", "received", "start", "ends", "scratch", "parts")
    def recv(self, bufsize, flags=0): ...
    def goes_on(self): ...
    def _wait(self, watcher): ...

class Timed(Stream):
    def __init__(self):
        self.io = None
        self.until: float = 0.0
"""


def test_a_file_of_types_is_read() -> None:
    found = read_pxd(PXD)
    assert found.functions == {"make": Function(["fd", "certain"], 1)}
    slots = {"__weakref__", "io", "_raw", "received", "start", "ends", "scratch", "parts"}
    recv = Function(["self", "bufsize", "flags"], 1)
    methods = {"recv": recv, "goes_on": Function(["self"], 0), "_wait": Function(["self", "watcher"], 0)}
    assert found.classes == {"Stream": Class(["Base"], slots, methods), "Timed": Class(["Stream"], {"until"})}
    assert compare(PXD, SOURCE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"_raw", ', "", "Stream._raw: not in __slots__"),
        ('"_raw", ', '"_raw", "fd", ', "Stream.fd: not in the .pxd file"),
        ("flags=0", "flags", "Stream.recv: the .pxd file has"),
        ("bufsize", "size", "Stream.recv: the .pxd file has"),
        ("def goes_on", "def goes", "Stream.goes_on: no such function"),
        ("class Timed", "class Late", "Timed: no such class"),
        ("def make(fd: int", "def make(fd: int, x: int", "make: the .pxd file has"),
        ("self.until: float", "self.end: float", "Timed.end: not in the .pxd file"),
        ("self.until: float", "until: float", "Timed.until: not in the class"),
    ],
)
def test_a_difference_is_found(old: str, new: str, problem: str) -> None:
    assert old in SOURCE
    found = compare(PXD, SOURCE.replace(old, new, 1))
    assert found[0].startswith(problem)


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="what is this"):
        read_pxd("cdef class A:\n    cdef:\n        int x\n")
