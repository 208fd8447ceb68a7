"""Steering: which member of a SO_REUSEPORT group gets a new connection, by hash, at random, or by the receiving CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gtcpserver.linux import SO_ATTACH_REUSEPORT_CBPF
from gtcpserver.listening.draining import (
    BPF_JUMP_IF_EQUAL,
    BPF_LOAD_WORD,
    BPF_RETURN,
    MAX_INSTRUCTIONS,
    HasSocket,
    Instruction,
    attach_program,
    steer,
    unsteer,
)

#: linux/filter.h: a load from here yields the number of the CPU that received the packet.
SKF_AD_CPU = 0xFFFFF000 + 36

#: An index that no group has: the kernel uses its hash instead (net/core/sock_reuseport.c).
NOBODY = 0xFFFFFFFF


def spread(group: Sequence[HasSocket], stay: Sequence[int], cpus: Mapping[int, int] | None) -> bool:
    """Send new connections to some members of a group.

    Args:
        group: all members, in the order of their listen() calls.
        stay: indexes of the members that get connections; none means all.
        cpus: index of the member for each receiving CPU, used if all members stay; None: by hash.

    Returns:
        False if the kernel refuses.
    """
    if len(group) < 2:
        return True
    if stay and len(set(stay)) < len(group):
        return steer(group, stay)
    if cpus:
        return attach_program(group[0].socket, SO_ATTACH_REUSEPORT_CBPF, by_cpu(cpus))
    unsteer(group)  # False: there was no program
    return True


def by_cpu(cpus: Mapping[int, int]) -> list[Instruction]:
    """Return the program that looks up the receiving CPU; the hash decides for a CPU without a member."""
    program: list[Instruction] = [(BPF_LOAD_WORD, 0, 0, SKF_AD_CPU)]
    for cpu, index in list(cpus.items())[: MAX_INSTRUCTIONS // 2 - 1]:
        program += [(BPF_JUMP_IF_EQUAL, 0, 1, cpu), (BPF_RETURN, 0, 0, index)]
    return [*program, (BPF_RETURN, 0, 0, NOBODY)]
