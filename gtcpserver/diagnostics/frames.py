"""Whose code a frame runs: the program's, or that of a library, which does not show what the program does there."""

from __future__ import annotations

import os
import sys
import sysconfig
from traceback import walk_stack
from types import CodeType, FrameType

from gtcpserver import errors

_LIBRARIES = (
    "<frozen ",
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")),
    os.path.dirname(os.path.abspath(errors.__file__)) + os.sep,  # this package, wherever it has been put
)


def is_library(code: CodeType) -> bool:
    """Whether it is code of Python's, of an installed package, or of this one, and not of the program."""
    path = code.co_filename
    return path.startswith(_LIBRARIES) or "/site-packages/" in path or "/dist-packages/" in path


def calls_of_program(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    """What leads to a frame: code and line of each call, outermost first.

    The program's own code alone; where there is none, as in a proxy of this library's, all of it.
    """
    # Not extract_stack, which looks into the source files for each of them.
    calls = [] if frame is None else [(one.f_code, line) for one, line in walk_stack(frame)]
    calls.reverse()
    return [call for call in calls if not is_library(call[0])] or calls


def frames_of_threads() -> dict[int, FrameType]:
    """The innermost frame of each thread, by its ident."""
    return sys._current_frames()  # noqa: SLF001 - Python's name for it
