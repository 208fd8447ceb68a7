"""gtcpserver check: what this system actually allows a TCP server.

Each finding is the kernel's answer to a test socket, wherever a socket can find out; a sysctl is read only for what no
socket shows.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import click
import gevent
import greenlet

from gtcpserver._build import forced_pure
from gtcpserver._compiled import why_pure
from gtcpserver.linux import IS_LINUX, TCP_CONGESTION
from gtcpserver.listening import draining
from gtcpserver.strict_json import to_json

#: Connections: 600 simultaneous clients overflow the old default of 128; Linux has allowed 4096 since 5.4.
BACKLOG_WANTED = 4096

#: 10,000 connections relayed with zero copy take two sockets and a pipe of two descriptors for each direction.
DESCRIPTORS_WANTED = 65_536

#: Linux's default, 32768 to 60999: simultaneous connections from one local address to one upstream address.
EPHEMERAL_WANTED = 28_000

#: Bytes: the pipe size at which a spliced relay costs least; fs.pipe-max-size allows this much by default.
PIPE_WANTED = 1024 * 1024

#: Seconds to wait for what should happen on loopback within microseconds.
WAIT = 0.2

# Not in every Python's socket module: linux/tcp.h, linux/mptcp.h, linux/fcntl.h.
TCP_FASTOPEN = 23
TCP_INFO = 11
MSG_FASTOPEN = 0x20000000
IPPROTO_MPTCP = 262
SOL_MPTCP = 284
MPTCP_INFO = 1
F_SETPIPE_SZ = 1031
F_GETPIPE_SZ = 1032
# struct tcp_info: eight bytes, then 32 bit words.
TCP_INFO_OPTIONS = 5
TCPI_OPT_SYN_DATA = 32
TCP_INFO_MAX_BACKLOG = 28  # tcpi_sacked, which is the granted backlog of a listening socket
# capabilities(7): a process with one of these is not bound by the limits on pipes.
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was probed, what the system allows, and what to change (None: all is well)."""

    name: str
    value: str
    advice: str | None = None

    @property
    def verdict(self) -> str:
        return "ok" if self.advice is None else "advice"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects: name, value, verdict, advice.")
def check(as_json: bool) -> None:
    """Check what the kernel allows a TCP server and suggest changes.

    The exit status is always 0.
    """
    findings = [probe_safely(probe) for probe in (PROBES if IS_LINUX else PROBES_ELSEWHERE)]
    if as_json:
        click.echo(to_json([{**asdict(finding), "verdict": finding.verdict} for finding in findings], indent=2))
        return
    names = max(len(finding.name) for finding in findings)
    values = max(len(finding.value) for finding in findings)
    for finding in findings:
        verdict = "ok" if finding.advice is None else f"advice: {finding.advice}"
        click.echo(f"{finding.name:{names}}  {finding.value:{values}}  {verdict}")


def probe_safely(probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except OSError as error:
        name = probe.__name__.replace("_", " ")
        return Finding(name, f"cannot be probed: {error.strerror or error}", "run it where the server will run")


def backlog() -> Finding:
    with listener(backlog=65_535) as listening:
        (granted,) = struct.unpack_from("=I", tcp_info(listening), TCP_INFO_MAX_BACKLOG)
    # listen(2): the backlog is silently capped to net.core.somaxconn.
    return Finding(
        "backlog",
        f"{granted} granted of 65535 (net.core.somaxconn)",
        advise(granted < BACKLOG_WANTED, f"sysctl -w net.core.somaxconn={BACKLOG_WANTED}"),
    )


def syn_backlog() -> Finding:
    size, cookies = int(sysctl("net.ipv4.tcp_max_syn_backlog")), int(sysctl("net.ipv4.tcp_syncookies"))
    # With SYN cookies tcp_max_syn_backlog drops nothing: tcp_conn_request, net/ipv4/tcp_input.c.
    return Finding(
        "handshakes in progress",
        f"tcp_max_syn_backlog {size}, SYN cookies {'on' if cookies else 'off'}",
        advise(
            not cookies and size < BACKLOG_WANTED,
            f"sysctl -w net.ipv4.tcp_syncookies=1 net.ipv4.tcp_max_syn_backlog={BACKLOG_WANTED}",
        ),
    )


def fast_open() -> Finding:
    bits = int(sysctl("net.ipv4.tcp_fastopen"))
    sides = [side for side, bit in (("client", 1), ("server", 2)) if bits & bit]
    value = f"{bits:#x} ({', '.join(sides) or 'off'})"
    advice = advise(not bits & 2, f"sysctl -w net.ipv4.tcp_fastopen={bits | 3:#x}, for ListenConfig(fast_open=...)")
    if bits & 3 == 3:  # testing needs a client, too
        carried = data_in_syn()
        value += f", data in the SYN {'accepted' if carried else 'not accepted'} on loopback"
        advice = advise(
            not carried, "see TcpExtTCPFastOpen* in /proc/net/netstat: something on the way drops the option"
        )
    return Finding("TCP Fast Open", value, advice)


def data_in_syn() -> bool:
    with listener() as listening:
        listening.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
        # The first connection fetches the cookie, the second uses it (RFC 7413 section 3).
        for _ in range(2):
            with socket.socket() as client:
                client.settimeout(WAIT)
                try:
                    client.sendto(b"x", MSG_FASTOPEN, listening.getsockname())
                except BlockingIOError:
                    # No cookie yet: an ordinary handshake has begun, and we must send the data after it (tcp(7)).
                    send_when_connected(client)
                accepted, _address = listening.accept()
                with accepted:
                    accepted.settimeout(WAIT)
                    accepted.recv(1)
                    options = tcp_info(accepted)[TCP_INFO_OPTIONS]
    return bool(options & TCPI_OPT_SYN_DATA)


def send_when_connected(client: socket.socket) -> None:
    poller = select.poll()
    poller.register(client, select.POLLOUT)
    poller.poll(WAIT * 1000)
    client.send(b"x")


def descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return Finding(
        "file descriptors",
        f"soft limit {soft}, hard limit {hard} (serve raises the soft one to it)",
        advise(
            hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_WANTED,
            f"LimitNOFILE={DESCRIPTORS_WANTED} in the systemd unit, or nofile in /etc/security/limits.conf",
        ),
    )


def ephemeral_ports() -> Finding:
    first, last = map(int, sysctl("net.ipv4.ip_local_port_range").split())
    with listener() as listening:
        port = listening.getsockname()[1]
    count = last - first + 1
    return Finding(
        "ephemeral ports",
        f"{count}, {first} to {last} (port 0 gave {port})",
        advise(
            count < EPHEMERAL_WANTED,
            'sysctl -w net.ipv4.ip_local_port_range="32768 60999", for a proxy\'s connections to one upstream',
        ),
    )


def steering() -> Finding:
    with listener(reuse_port=True) as first, listener(reuse_port=True, port=first.getsockname()[1]) as second:
        attached = draining.steer([Member(first), Member(second)], [1])
        steered = attached and all(arrives_at(second, first) for _ in range(8))
    return Finding(
        "BPF steering",
        "works: 8 of 8 connections went to the chosen member" if steered else "does not work",
        advise(not steered, "Linux 4.5 or newer; until then closing one of several accept loops may reset connections"),
    )


def listener_filter() -> Finding:
    with listener() as listening, socket.socket() as client:
        way = draining.drop_new_connections(listening)
        client.setblocking(False)
        client.connect_ex(listening.getsockname())
        answered = readable(listening, WAIT)
    if way is not None and not answered:
        works = "works" if way == "filter" else "refused without CAP_NET_ADMIN, IP_MINTTL works instead"
        return Finding("listener filter", f"{works}: a new connection was left unanswered")
    value = "refused by the system (SO_ATTACH_FILTER, and IP_MINTTL as well)"
    if way is not None:
        value = f"{'attached' if way == 'filter' else 'IP_MINTTL set'}, but a new connection was answered"
    return Finding(
        "listener filter",
        value,
        "run with CAP_NET_ADMIN if the system requires it; without, a stop may reset connections that have just begun",
    )


def migrate_requests() -> Finding:
    try:
        value = int(sysctl("net.ipv4.tcp_migrate_req"))
    except FileNotFoundError:
        return Finding("tcp_migrate_req", "not available (Linux before 5.14); BPF steering does the same")
    return Finding("tcp_migrate_req", f"{value} ({'on' if value else 'off; BPF steering does the same'})")


def splice_pipe() -> Finding:
    maximum = int(sysctl("fs.pipe-max-size"))
    soft, hard = int(sysctl("fs.pipe-user-pages-soft")), int(sysctl("fs.pipe-user-pages-hard"))
    granted, refused = pipe_size(PIPE_WANTED)
    privileged = has_capability(CAP_SYS_ADMIN) or has_capability(CAP_SYS_RESOURCE)
    pages = [limit for limit in (soft, hard) if limit]
    pipes = min(pages) * resource.getpagesize() // PIPE_WANTED if pages else None
    value = f"{granted} bytes granted of {PIPE_WANTED}{f' ({refused})' if refused else ''}, pipe-max-size {maximum}, "
    value += f"pipe-user-pages-soft {soft}, hard {hard}: "
    if pipes is None or privileged:
        value += "no limit on the number" + (" for this user" if pipes is not None else "")
    else:
        value += f"{pipes} such pipes per user, smaller ones after that"
    advice = None
    if granted < PIPE_WANTED and maximum < PIPE_WANTED:
        advice = f"sysctl -w fs.pipe-max-size={PIPE_WANTED}"
    elif granted < PIPE_WANTED or (pipes is not None and not privileged):
        advice = "sysctl -w fs.pipe-user-pages-soft=0, for more simultaneous relays by an unprivileged user"
    return Finding("splice pipe", value, advice)


def pipe_size(wanted: int) -> tuple[int, str]:
    """Return the size a new pipe actually gets, and the error if `wanted` was refused (fcntl(2), F_SETPIPE_SZ)."""
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb"):
        refused = ""
        try:
            fcntl.fcntl(pipe, F_SETPIPE_SZ, wanted)
        except OSError as error:
            refused = error.strerror or str(error)
        return fcntl.fcntl(pipe, F_GETPIPE_SZ), refused


def multipath() -> Finding:
    advice = "sysctl -w net.mptcp.enabled=1 (CONFIG_MPTCP)"
    try:
        with (
            socket.socket(proto=IPPROTO_MPTCP) as listening,
            socket.socket(proto=IPPROTO_MPTCP) as client,
        ):
            listening.settimeout(WAIT)
            client.settimeout(WAIT)
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            client.connect(listening.getsockname())
            accepted, _ = listening.accept()
            with accepted:
                accepted.getsockopt(SOL_MPTCP, MPTCP_INFO, 256)
    except OSError as error:
        return Finding("multipath TCP", f"not available: {error.strerror or error}", advice)
    return Finding("multipath TCP", "works: made a multipath connection on loopback")


def congestion_control() -> Finding:
    names = sysctl("net.ipv4.tcp_available_congestion_control").split()
    usable = []
    with socket.socket() as sock:
        default = sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0").decode()
        for name in names:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
            except OSError:
                continue
            usable.append(name)
    value = f"{default} by default; usable here: {', '.join(usable) or 'none'}"
    refused = [name for name in names if name not in usable]
    if refused:
        value += f"; refused: {', '.join(refused)}"
    advice = f'sysctl -w net.ipv4.tcp_allowed_congestion_control="{" ".join(names)}"' if refused else None
    return Finding("congestion control", value, advice)


def dual_stack() -> Finding:
    advice = "sysctl -w net.ipv6.conf.all.disable_ipv6=0, or listen on 0.0.0.0 instead of *"
    try:
        with socket.socket(socket.AF_INET6) as listening, socket.socket() as client:
            listening.settimeout(WAIT)
            client.settimeout(WAIT)
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listening.bind(("::", 0))
            listening.listen()
            client.connect(("127.0.0.1", listening.getsockname()[1]))
            listening.accept()[0].close()
    except OSError as error:
        return Finding("IPv6 dual-stack", f"does not work: {error.strerror or error}", advice)
    return Finding("IPv6 dual-stack", "works: an IPv4 client reached a listener on [::]")


def gevent_loop() -> Finding:
    loop = gevent.get_hub().loop
    library = type(loop).__module__
    backend = getattr(loop, "backend", "")
    version = f"gevent {gevent.__version__}, greenlet {greenlet.__version__}"
    good = "libev" in library and backend in ("epoll", "linuxaio", "iouring", "kqueue")
    return Finding(
        "event loop",
        f"{version}, {library}{f' {backend}' if backend else ''}, {platform.python_implementation()} "
        f"{platform.python_version()}, {platform.system()} {platform.release()}",
        advise(
            not good, "unset GEVENT_LOOP and GEVENT_BACKEND: libev with epoll is the loop this library is measured on"
        ),
    )


def hot_path() -> Finding:
    if why_pure is None:
        return Finding("hot path", "compiled")
    advice = (
        "where a C compiler and Python's headers are: pip install --force-reinstall --no-cache-dir --no-deps gtcpserver"
    )
    return Finding("hot path", f"pure Python: {why_pure}", advise(IS_LINUX and not forced_pure(), advice))


# In the order of the report.
PROBES = (
    backlog,
    syn_backlog,
    fast_open,
    descriptors,
    ephemeral_ports,
    steering,
    listener_filter,
    migrate_requests,
    splice_pipe,
    multipath,
    congestion_control,
    dual_stack,
    gevent_loop,
    hot_path,
)


def system() -> Finding:
    return Finding("system", f"{os.uname().sysname}: to develop on, without what Linux alone has", "serve on Linux")


#: Of a system whose kernel has none of the rest.
PROBES_ELSEWHERE = (system, descriptors, dual_stack, gevent_loop, hot_path)


@dataclass(frozen=True)
class Member:
    """One socket of a SO_REUSEPORT group, as `draining` expects it."""

    socket: socket.socket


@contextmanager
def listener(backlog: int = 16, reuse_port: bool = False, port: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.settimeout(WAIT)
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen(backlog)
        yield listening


@contextmanager
def connected_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with listener() as listening, socket.create_connection(listening.getsockname(), WAIT) as client:
        accepted, _ = listening.accept()
        with accepted:
            yield client, accepted


def arrives_at(wanted: socket.socket, other: socket.socket) -> bool:
    """Connect to the port that both sockets share, and return whether `wanted` got the connection."""
    with socket.create_connection(wanted.getsockname(), WAIT):
        if readable(other, 0):
            other.accept()[0].close()
            return False
        wanted.accept()[0].close()
        return True


def readable(sock: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)


def sysctl(name: str) -> str:
    with open("/proc/sys/" + name.replace(".", "/")) as file:
        return file.read().strip()


def has_capability(number: int) -> bool:
    with open("/proc/self/status") as file:
        mask = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    return bool(int(mask, 16) >> number & 1)


def advise(needed: bool, advice: str) -> str | None:
    return advice if needed else None
