"""Which addresses are this host's own: services on them would be reached past the firewall that protects them.

The kernel is asked about each address when needed (RTM_GETROUTE, rtnetlink(7)): would it deliver a packet to it
locally? So the answer is current, however addresses come and go, and covers what no list of interfaces has: networks
that are local by route (``ip route add local``, AnyIP) and anycast. Measured: 2 to 3 us per question; checking a
subscription to changes for news would take 1 us. It does not wait for the lock of the kernel's network configuration,
as a list of the addresses would (RTNL: a second and more on hosts with thousands of interfaces).
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from ipaddress import IPv4Address

from gevent import monkey

from gtcpserver.errors import CAPACITY_ERRNOS
from gtcpserver.linux import AF_NETLINK, SOCK_CLOEXEC

from .dial import way_out
from .source import interfaces
from .target import IPAddress

log = logging.getLogger("gtcpserver")

# linux/netlink.h and linux/rtnetlink.h.
NETLINK_ROUTE = 0
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
RTM_NEWROUTE = 24
RTM_GETROUTE = 26
RTA_DST = 1
RTN_LOCAL = 2
RTN_ANYCAST = 4

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
# It, struct rtmsg (family, length of the destination, ..., type, flags), and struct rtattr (length, type, value).
_QUESTION = {version: struct.Struct(f"=IHHIIBB10xHH{size}s") for version, size in ((4, 4), (6, 16))}
_FAMILY = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
_TYPE_OF_ROUTE = _HEADER.size + 7
_ERROR = struct.Struct("=i")  # of struct nlmsgerr, after the header

#: There is no way to the address: no route, or a route that refuses (fib_props in net/ipv4/fib_semantics.c of Linux).
NO_WAY = frozenset((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL))

#: The kernel lacks a resource, and the question may succeed the next time.
_PASSING = CAPACITY_ERRNOS | {errno.EAGAIN, errno.EINTR}

_LOOPBACK = IPv4Address("127.0.0.1")

# The real one, even in a monkey-patched program: the kernel answers at once, and no other greenlet should run.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")


def question(ip: IPAddress, number: int) -> bytes:
    """Return the netlink message that asks for the route to an address."""
    version, packed = ip.version, ip.packed
    size, form = len(packed), _QUESTION[version]
    return form.pack(
        *(form.size, RTM_GETROUTE, NLM_F_REQUEST, number, 0), _FAMILY[version], 8 * size, 4 + size, RTA_DST, packed
    )


def answer(data: bytes, number: int) -> bool | None:
    """Return whether the kernel delivers packets locally; None: the message is about another question.

    Raises:
        OSError: the kernel does not say.
    """
    if len(data) < _HEADER.size + _ERROR.size:
        raise OSError(errno.EBADMSG, "netlink message cut short")
    _, kind, _, about, _ = _HEADER.unpack_from(data)
    if about != number:
        return None
    if kind == RTM_NEWROUTE and len(data) > _TYPE_OF_ROUTE:
        return data[_TYPE_OF_ROUTE] in (RTN_LOCAL, RTN_ANYCAST)
    if kind != NLMSG_ERROR:
        raise OSError(errno.EBADMSG, f"netlink message of type {kind}")
    code = -_ERROR.unpack_from(data, _HEADER.size)[0]
    if code in NO_WAY:
        return False
    raise OSError(code, os.strerror(code))


class ThisHost:
    """Tell whether an address is this host's.

    Holds one descriptor from the first question on, opened by the process that asks. If netlink is refused (seccomp:
    systemd's RestrictAddressFamilies), the interfaces are checked instead, at most five seconds late; addresses that
    are local by a route with a source of its own are then not recognized.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process = 0
        self._knows_loopback = False
        self._number = 0
        self._refused: set[int] = set()  # versions of IP

    def has(self, ip: IPAddress) -> bool:
        """Return whether a connection to an address ends on this host.

        Raises:
            OSError: unknown at the moment, because descriptors or memory ran out.
        """
        if ip.version not in self._refused:
            try:
                return self._ask(ip)
            except OSError as error:
                self.close()
                if error.errno in _PASSING:
                    raise
                # Without IPv6 (ipv6.disable=1) the kernel says so (EOPNOTSUPP), and goes on to tell of IPv4.
                self._refused |= {ip.version} if self._knows_loopback else {4, 6}
                what = " to say which IPv6 addresses are this host's" if self._refused == {6} else ""
                log.warning(
                    "netlink refused%s (%s); looking at the interfaces for this host's addresses", what, error.strerror
                )
        return _is_of_an_interface(ip)

    def close(self) -> None:
        """Close the descriptor; the next question opens another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, ip: IPAddress) -> bool:
        # Hot: once per connection. A child process has its own socket, or it would take its parent's answers.
        if self._socket is None or self._process != os.getpid():
            self.close()
            self._process = os.getpid()
            self._socket = _socket_class(AF_NETLINK, socket.SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE)
            self._socket.setblocking(False)
            if not self._ask_by(self._socket, _LOOPBACK):
                # An emulated kernel (gVisor calls every route unicast), or the interface lo is down.
                raise OSError(errno.EOPNOTSUPP, "it does not know 127.0.0.1")
            self._knows_loopback = True
        return self._ask_by(self._socket, ip)

    def _ask_by(self, sock: socket.socket, ip: IPAddress) -> bool:
        self._number = number = self._number + 1 & 0xFFFFFFFF
        sock.sendto(question(ip, number), (0, 0))
        while True:
            # The answer is there before sendto() returns. Answers to interrupted questions are skipped.
            found = answer(sock.recv(4096), number)
            if found is not None:
                return found


def _is_of_an_interface(ip: IPAddress) -> bool:
    try:
        if way_out(ip) == ip:  # the route to a local address begins there
            return True
    except OSError as error:
        if error.errno in _PASSING:
            raise
    return ip in interfaces()
