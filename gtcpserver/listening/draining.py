"""Close a listening socket without resetting a connection that a client has already begun.

`close` on a listening TCP socket resets the connections in its accept queue, and the unfinished handshakes. So first
new connections are kept from starting on it, then all pending ones are accepted, then it is closed. How new connections
are kept away depends on who serves the port afterwards:

- another member of the same SO_REUSEPORT group: `steer` sends new connections to the remaining members;
- nobody, or the next server in a moment: `drop_new_connections` leaves new connection attempts unanswered. The client's
  kernel repeats its SYN after a second (RFC 6298 section 2), when the next server may listen; once the socket is closed
  and no process has taken the port, the repeated SYN is refused.

Then: accept until EAGAIN, wait `HANDSHAKE_SECONDS`, or somewhat longer if `handshakes_under_way` says that a distant
client's ACK is still expected, accept until EAGAIN, close.

Steering is a classic BPF program (linux/filter.h, Documentation/networking/filter.rst) and needs no privilege. Dropping
is one too, but kernels with commit 5d39580f68e6 ("tcp: restrict SO_ATTACH_FILTER to priv users", 2026, also in stable
series) only let processes with CAP_NET_ADMIN attach a filter to a TCP socket. If it is refused, `drop_new_connections`
requires a TTL on the listening socket that no client's packet has left; connections accepted from such a socket need
`accept_any_ttl`. Multipath TCP sockets support none of these.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from gevent import monkey

from gtcpserver.linux import (
    AF_NETLINK,
    IP_MINTTL,
    IPV6_MINHOPCOUNT,
    NO_OPTION,
    SO_ATTACH_FILTER,
    SO_ATTACH_REUSEPORT_CBPF,
    SO_DETACH_FILTER,
    SO_DETACH_REUSEPORT_BPF,
    TCP_DEFER_ACCEPT,
    TCP_INFO,
)

#: Seconds that a handshake in progress may still need on a local network. A distant client needs a round trip, and one
#: whose ACK was lost, or that TCP_DEFER_ACCEPT kept waiting, up to the next SYN-ACK a second later.
HANDSHAKE_SECONDS = 0.02

#: Hosts send with 64 (Linux, BSD, macOS) or 128 (Windows), and each router on the way decrements it.
HIGHEST_TTL = 255

# linux/bpf_common.h and linux/filter.h.
BPF_LOAD_BYTE = 0x30  # BPF_LD | BPF_B | BPF_ABS
BPF_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
BPF_MODULO = 0x94  # BPF_ALU | BPF_MOD | BPF_K
BPF_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
BPF_RETURN = 0x06  # BPF_RET | BPF_K
SKF_AD_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM: a load from here is a random number
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

TCP_FLAGS_OFFSET = 13  # RFC 9293 section 3.1; a TCP socket's filter sees the packet from its TCP header on
TCP_SYN = 0x02
TCP_ACK = 0x10

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; sock_diag(7).
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
TCP_SYN_RECV = 3

# The real one, even in a monkey-patched program: the kernel answers at once, and no other greenlet should run.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jump if true, jump if false, k


class HasSocket(Protocol):
    @property
    def socket(self) -> socket.socket: ...


Member = TypeVar("Member")


def drop_new_connections(listening: socket.socket) -> Literal["filter", "ttl"] | None:
    """Leave new connection attempts on this TCP socket unanswered; handshakes in progress still reach the accept queue.

    This affects the socket, not the process: every process that holds the socket stops getting connections. A SYN with
    data (TCP Fast Open, RFC 7413) is dropped too, and the client repeats it without data.

    Returns:
        "filter", or "ttl", in which case each connection accepted from now on needs `accept_any_ttl` before its client
        is heard. None if the system has neither, or the socket (multipath TCP, for one) supports neither.
    """
    if _drop_by_filter(listening):
        return "filter"
    return "ttl" if _drop_by_ttl(listening) else None


def hear_new_connections(listening: socket.socket) -> None:
    """Undo `drop_new_connections`, for a socket that another process may keep using; errors are ignored."""
    for level, option in ((socket.SOL_SOCKET, SO_DETACH_FILTER), (socket.IPPROTO_TCP, TCP_DEFER_ACCEPT)):
        try:
            listening.setsockopt(level, option, 0)
        except OSError:
            pass  # there was no filter
    try:
        _set_least_ttl(listening, 0)
    except OSError:
        pass


def accept_any_ttl(accepted: socket.socket) -> None:
    """Hear the client of a connection whose listening socket drops new connections by "ttl"; harmless for others."""
    _set_least_ttl(accepted, 0)


def steer(group: Sequence[HasSocket], stay: Sequence[int]) -> bool:
    """Send the new connections of a SO_REUSEPORT group only to some of its members.

    SO_ATTACH_REUSEPORT_CBPF, socket(7). The program belongs to the group, in whichever processes its sockets are, and
    replaces the previous one. Handshakes in progress stay with their member. Several remaining members share the
    connections at random.

    Args:
        group: every listening socket of the group, in the order of their listen() calls. When a member is closed, the
            kernel moves the last one into its place; `forget_member` does the same to a list.
        stay: indexes into `group` of the members that get connections from now on; at least one.

    Returns:
        False if the kernel refuses: Linux before 4.5, multipath TCP sockets, or no SO_REUSEPORT group of two or more.
    """
    if not stay:
        raise ValueError("stay must name at least one member of the group")
    if any(not 0 <= index < len(group) for index in stay):
        raise ValueError(f"stay must hold indexes from 0 to {len(group) - 1}, got {list(stay)}")
    program = _choose_one_of(list(dict.fromkeys(stay)))
    if len(program) > MAX_INSTRUCTIONS:
        raise ValueError(f"stay must name at most {MAX_INSTRUCTIONS // 2 - 1} members, got {len(stay)}")
    return attach_program(group[stay[0]].socket, SO_ATTACH_REUSEPORT_CBPF, program)


def unsteer(group: Sequence[HasSocket]) -> bool:
    """Let the kernel spread new connections over the whole group again, by a hash of the two addresses.

    Returns:
        False if there was no program, or the system (Linux before 5.3) cannot remove it.
    """
    try:
        group[0].socket.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    except OSError:
        return False
    return True


def attach_program(sock: socket.socket, option: int, program: Sequence[Instruction]) -> bool:
    """Give a socket a program of the kernel's packet filter, by SO_ATTACH_FILTER or SO_ATTACH_REUSEPORT_CBPF.

    Returns:
        False if the kernel refuses.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; }, with the padding of native alignment.
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, fprog)
    except OSError as exc:
        # EBADF and ENOTSOCK are mistakes of the caller; any other error means that the system does not support it.
        if exc.errno in (errno.EBADF, errno.ENOTSOCK):
            raise
        return False
    return True


def forget_member(group: list[Member], index: int) -> None:
    """Remove a closed member from a list as the kernel does: the last one moves into its place.

    (net/core/sock_reuseport.c, reuseport_detach_sock.) Call it when the last descriptor of the socket, in whichever
    process, is closed: until then the member keeps its place.
    """
    last = group.pop()
    if index < len(group):
        group[index] = last


def handshakes_under_way(listening: socket.socket) -> int | None:
    """Count the connections to this socket's port that clients have begun and that are not in an accept queue yet.

    The kernel counts by port, so those of the other members of a SO_REUSEPORT group are included.

    Returns:
        None if the kernel does not say (no sock_diag, or not a TCP socket).
    """
    if listening.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        return _count_handshakes(listening.getsockname()[1], listening.family)
    except OSError:
        return None


def queue_length(listening: socket.socket) -> int:
    """Count the connections that wait to be accepted (tcpi_unacked of a listener, linux/tcp.h); 0 if unknown."""
    try:
        info = listening.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 28)
    except OSError:
        return 0  # not TCP
    return int(struct.unpack_from("=I", info, 24)[0])


def _drop_by_filter(listening: socket.socket) -> bool:
    keep_all = 0xFFFFFFFF
    program = [
        (BPF_LOAD_BYTE, 0, 0, TCP_FLAGS_OFFSET),
        (BPF_AND, 0, 0, TCP_SYN | TCP_ACK),
        (BPF_JUMP_IF_EQUAL, 0, 1, TCP_SYN),
        (BPF_RETURN, 0, 0, 0),
        (BPF_RETURN, 0, 0, keep_all),
    ]
    if not attach_program(listening, SO_ATTACH_FILTER, program):
        return False
    # A connection that waits for its first byte is in no queue and would be lost. Once it is no longer deferred, the
    # kernel repeats its SYN-ACK within a second or two and the client's ACK puts the connection into the accept queue.
    _defer_accept(listening, 0)
    return True


def _drop_by_ttl(listening: socket.socket) -> bool:
    """Require the highest possible TTL.

    tcp_v4_rcv and tcp_v6_rcv (net/ipv4/tcp_ipv4.c, net/ipv6/tcp_ipv6.c) compare the TTL of packets for the listening
    socket itself, which are the SYNs. Packets for a handshake in progress (TCP_NEW_SYN_RECV, since Linux 4.4) are
    handled earlier. The resulting connection is a copy of the listening socket and inherits the option: its client's
    packets are dropped until `accept_any_ttl`, and repeated after 0.2 s or more. So the first data must come with the
    packet that completes the connection: TCP_DEFER_ACCEPT keeps a handshake in progress until its client sends, or, if
    the client waits for the server to speak, until the kernel's next SYN-ACK, a second after the first.

    Two kinds of handshakes are not covered: those of a SYN flood, which are kept in a cookie instead of a queue (their
    ACKs are for the listening socket), and those of clients on the same link that send with a TTL of 255.
    """
    try:
        _set_least_ttl(listening, HIGHEST_TTL)
    except OSError as exc:
        if exc.errno in (errno.EBADF, errno.ENOTSOCK):
            raise
        return False
    _defer_accept(listening, 1)
    return True


def _set_least_ttl(sock: socket.socket, ttl: int) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT, ttl)
    # Also for an IPv6 socket: it may have IPv4 clients.
    sock.setsockopt(socket.IPPROTO_IP, IP_MINTTL, ttl)


def _defer_accept(listening: socket.socket, seconds: int) -> None:
    if TCP_DEFER_ACCEPT != NO_OPTION:
        listening.setsockopt(socket.IPPROTO_TCP, TCP_DEFER_ACCEPT, seconds)


def _choose_one_of(indexes: list[int]) -> list[Instruction]:
    if len(indexes) == 1:
        return [(BPF_RETURN, 0, 0, indexes[0])]
    program = [(BPF_LOAD_WORD, 0, 0, SKF_AD_RANDOM), (BPF_MODULO, 0, 0, len(indexes))]
    for number, index in enumerate(indexes[:-1]):
        program += [(BPF_JUMP_IF_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, index)]
    return [*program, (BPF_RETURN, 0, 0, indexes[-1])]


def _count_handshakes(port: int, family: int) -> int:
    # struct inet_diag_req_v2 with an inet_diag_sockid that names nothing: the kernel dumps every socket in the
    # requested state, and the port is compared here. Handshakes are few; established connections are not included. An
    # IPv6 listener's family covers the IPv4 clients of a dual-stack one, whose request sockets are AF_INET6 as well.
    query = struct.pack("=BBBBI48x", family, socket.IPPROTO_TCP, 0, 0, 1 << TCP_SYN_RECV)
    header = struct.pack("=IHHII", 16 + len(query), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
    count = 0
    with _socket_class(AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(header + query)
        while True:
            answer = netlink.recv(65536)
            while answer:
                length, kind = struct.unpack_from("=IH", answer)
                if kind == NLMSG_DONE:
                    return count
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", answer, 16)[0], "sock_diag")
                # struct inet_diag_msg: four bytes, then the source port in network order.
                count += struct.unpack_from("!H", answer, 20)[0] == port
                answer = answer[(length + 3) & ~3 :]
