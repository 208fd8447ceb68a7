"""What ps(1), top(1) and the kernel's log call this process.

Linux has two names for a process:

- comm, 15 bytes, of each thread: prctl(2) sets it. top, pgrep(1) without -f and the kernel's log of killed processes
  have it.
- the command line, which ps, htop and pgrep -f read from /proc/PID/cmdline. The kernel shows the memory of the process
  where execve(2) has put the arguments. A title is written over them, within their bounds, which /proc/self/stat knows
  (proc(5), arg_start and arg_end). Nothing else has to be found or moved: setproctitle and others also take the space
  of the environment behind it, and for that move the environment, to which C libraries have pointers. PR_SET_MM, which
  could show other memory, needs a privilege or a kernel with checkpoints. Python has copied its arguments long before
  (`sys.argv`, `sys.orig_argv`); only glibc's name of the program, which its error messages begin with, points there.
  If the bounds cannot be right (an emulated /proc), or the title has no room, the command line stays.
"""

from __future__ import annotations

import ctypes

from gtcpserver.linux import name_process

#: Bytes of comm that the kernel keeps (TASK_COMM_LEN).
MOST_COMM = 15

# Indices of arg_start and arg_end in /proc/self/stat, from the state on, which is field 3 of proc(5).
_ARG_START, _ARG_END = 48 - 3, 49 - 3


def set_title(role: str, program: str = "") -> None:
    """Name this process: "gtcp:worker 0" as comm, "gtcpserver: worker 0 [app:handle]" as its command line.

    Without room for the program it is left out. Never fails.

    Args:
        role: what the process does, such as "worker 0".
        program: what it runs, such as "app:handle"; "": unknown.
    """
    name_process(f"gtcp:{role}".encode()[:MOST_COMM])
    titles = [f"gtcpserver: {role} [{program}]"] if program else []
    for title in (*titles, f"gtcpserver: {role}"):
        if _write(title.encode(errors="replace").replace(b"\0", b"?")):
            return


def _write(title: bytes) -> bool:
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
        start, size = int(fields[_ARG_START]), int(fields[_ARG_END]) - int(fields[_ARG_START])
    except (OSError, ValueError, IndexError):
        return True  # another title would not do better
    if start <= 0 or size != len(shown):
        return True
    if len(title) >= size:  # the last byte stays 0: otherwise the kernel shows the environment as well
        return False
    if ctypes.string_at(start, size) == shown:
        ctypes.memmove(start, title.ljust(size, b"\0"), size)
    return True
