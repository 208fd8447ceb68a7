"""The number of CPUs this process may use: its affinity mask, and the quotas of its control groups (cgroups(7)).

A quota applies to all groups below. Of a systemd unit with CPUQuota=, its slice and a container around them, the
smallest
one decides. So each group is read, from this process's own up to the root of the mounted hierarchy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from gtcpserver import linux

V2 = "cgroup2"
V1 = "cgroup"


def count_cpus(root: str = "/") -> int:
    """Return the number of CPUs, at least 1. A quota of one and a half CPUs counts as two.

    Args:
        root: parent folder of /proc and the control groups.
    """
    cpus = len(linux.cpus())
    for folder in _groups(root):
        quota = _quota(folder)
        if quota is not None:
            cpus = min(cpus, math.ceil(quota))
    return max(1, cpus)


def _groups(root: str) -> Iterator[str]:
    """Yield the folders of all control groups that this process is in and that may have a CPU quota."""
    own = _own_groups(root)
    for line in _read(root, "/proc/self/mountinfo").splitlines():
        # proc_pid_mountinfo(5): ID, parent, device, root, mount point, options, ..., "-", type, source, options.
        mount, _, kind = line.partition(" - ")
        fields, (kind, _, *options) = mount.split(" "), [*kind.split(" "), "", ""]
        if kind not in own or len(fields) < 5 or (kind == V1 and "cpu" not in options[0].split(",")):
            continue
        top, folder = map(_unescaped, fields[3:5])
        folder = root.rstrip("/") + folder
        # Only a part of the hierarchy may be mounted (a container's). Its names are those of the whole or, in a
        # namespace (cgroup_namespaces(7)), names that do not match.
        path = own[kind]
        inside = path.removeprefix(top).strip("/") if path == top or path.startswith(top.rstrip("/") + "/") else ""
        names = inside.split("/") if inside and ".." not in inside.split("/") else []
        for depth in range(len(names), -1, -1):
            yield "/".join([folder, *names[:depth]])


def _own_groups(root: str) -> dict[str, str]:
    """Return the paths of this process's own groups, by the type of their file system."""
    found = {}
    for line in _read(root, "/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[V2] = path
        elif "cpu" in controllers.split(","):
            found[V1] = path
    return found


def _quota(folder: str) -> float | None:
    """Return the quota in CPUs; None if there is no limit."""
    try:
        words = _read(folder, "cpu.max").split()
        if not words:
            words = [_read(folder, f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quota, period = map(int, words)  # not a number: "max", or the file does not exist
        return quota / period if quota > 0 else None  # -1: no limit, in version 1
    except (ValueError, ZeroDivisionError):
        return None


def _read(folder: str, name: str) -> str:
    try:
        with open(f"{folder.rstrip('/')}/{name.lstrip('/')}", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _unescaped(text: str) -> str:
    # "\040" is a space.
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
