"""Tell the program's own frames from those of libraries, which do not show what the program does."""

from __future__ import annotations

import os
import sys
import sysconfig
from traceback import walk_stack, walk_tb
from types import CodeType, FrameType

from gtcpserver import errors

_LIBRARIES = (
    "<frozen ",
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")),
    os.path.dirname(os.path.abspath(errors.__file__)) + os.sep,  # this package, wherever it has been put
)

_PACKAGE = errors.__name__.partition(".")[0] + "."


def is_library(code: CodeType) -> bool:
    """Return whether it is code of Python, of an installed package, or of this one, rather than of the program."""
    path = code.co_filename
    return path.startswith(_LIBRARIES) or "/site-packages/" in path or "/dist-packages/" in path


def raised_by_library(error: BaseException) -> bool:
    """Return whether no code of the program is between the place that catches an error and the one that raised it."""
    return all(_is_library_frame(frame) for frame, _ in walk_tb(error.__traceback__))


def _is_library_frame(frame: FrameType) -> bool:
    # By its module as well: the `__init__` of a dataclass has no file.
    return is_library(frame.f_code) or str(frame.f_globals.get("__name__")).startswith(_PACKAGE)


def calls_of_program(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    """Return the calls that lead to a frame: code and line of each, outermost first.

    Only the program's own code; all of it if there is none, as in a proxy of this library.
    """
    # Not extract_stack, which would look into the source file of each of them.
    calls = [] if frame is None else [(one.f_code, line) for one, line in walk_stack(frame)]
    calls.reverse()
    return [call for call in calls if not is_library(call[0])] or calls


def call_of_program(frame: FrameType | None) -> tuple[CodeType, int] | None:
    """Return the innermost call of the program's own code, or if there is none, the innermost one; None: no frame."""
    for one, line in walk_stack(frame) if frame is not None else ():
        if not is_library(one.f_code):
            return one.f_code, line
    return None if frame is None else (frame.f_code, frame.f_lineno)


def frames_of_threads() -> dict[int, FrameType]:
    """Return the innermost frame of each thread, by thread ident."""
    return sys._current_frames()  # noqa: SLF001 - Python's name for it
