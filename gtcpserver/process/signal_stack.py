"""The alternate stack that Python's signal handlers run on, once the faulthandler module has set one."""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import suppress

from gtcpserver.linux import IS_LINUX

#: Bytes: room for all 31 signals inside each other. A frame has the registers: 3.4 KB with AVX-512, 12 KB with AMX
#: (AT_MINSIGSTKSZ, getauxval(3)). Only what is used becomes memory.
SIZE = 512 * 1024

#: There is no alternate stack (ss_flags, sigaltstack(2)).
_SS_DISABLE = 2

_stack: tuple[mmap.mmap, ctypes.Array[ctypes.c_char]] | None = None


class _StackT(ctypes.Structure):
    """stack_t, sigaltstack(2); not that of macOS, where nothing is changed."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def enlarge_signal_stack() -> None:
    """Give the main thread an alternate stack on which signals can pile up, if it has a smaller one.

    Python runs its handlers on the alternate stack where there is one (SA_ONSTACK), and that of ``faulthandler``, 16 to
    20 KiB, ends below the fifth signal that comes before the first has been handled: the process dies by SIGSEGV. Call
    after ``faulthandler.enable()``. Without memory, nothing changes.
    """
    global _stack
    if not IS_LINUX or threading.current_thread() is not threading.main_thread():
        return
    with suppress(OSError, MemoryError, ValueError, AttributeError):
        libc = ctypes.CDLL(None)
        now = _StackT()
        if libc.sigaltstack(None, ctypes.byref(now)) or now.ss_flags & _SS_DISABLE or now.ss_size >= SIZE:
            return
        if _stack is None:
            memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _stack = memory, (ctypes.c_char * SIZE).from_buffer(memory)  # for as long as the process
        libc.sigaltstack(ctypes.byref(_StackT(ctypes.addressof(_stack[1]), 0, SIZE)), None)
