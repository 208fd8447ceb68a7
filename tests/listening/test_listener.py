"""Opening, adopting, sharing and draining listening sockets."""

import errno
import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from gevent import socket as gevent_socket

from gtcpserver.address import Address, parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.linux import NO_OPTION
from gtcpserver.listening import config as listen_config
from gtcpserver.listening import draining, listener
from gtcpserver.listening.listener import (
    ListenConfig,
    Listener,
    forget_member,
    handshakes_under_way,
    open_listeners,
    steer,
    unsteer,
)
from kit.ports import free_port
from kit.programs import needs_ipv6

TCP = socket.IPPROTO_TCP
SO_DETACH_FILTER = 27


@pytest.fixture
def opened():
    """open_listeners, whose sockets are closed at the end; `opened.keep(thing)` closes other things too."""
    things = []

    def open_and_keep(*args, **kwargs):
        listeners = open_listeners(*args, **kwargs)
        things.extend(listeners)
        return listeners

    def keep(thing):
        things.append(thing)
        return thing

    open_and_keep.keep = keep
    yield open_and_keep
    for thing in things:
        thing.close()


@pytest.fixture
def connect(opened):
    def connect_to(listening, count=1):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening.sockaddr[0], listening.sockaddr[0])
        return [opened.keep(socket.create_connection((host, listening.sockaddr[1]), timeout=60)) for _ in range(count)]

    return connect_to


def accept_all(listening):
    """Accept until EAGAIN; the handshakes of connected loopback clients are complete."""
    accepted = []
    while True:
        try:
            accepted.append(listening.socket.accept()[0])
        except BlockingIOError:
            return accepted


def count_and_close(listening):
    accepted = accept_all(listening)
    for connection in accepted:
        connection.close()
    return len(accepted)


def accept_one(listening):
    listening.socket.settimeout(60)
    try:
        return listening.socket.accept()[0]
    finally:
        listening.socket.setblocking(False)


def run_python(code, *args, **kwargs):
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


OPEN_ELSEWHERE = """
import sys
from gtcpserver.listening.listener import ListenConfig, open_listeners
try:
    open_listeners(sys.argv[1], ListenConfig(shared="shared" in sys.argv), count=2)
    print("opened")
except OSError as exc:
    print(exc)
"""


# --- addresses ---------------------------------------------------------------------------------------------------


def test_an_ipv4_address_is_opened_non_blocking_and_not_inheritable(opened):
    (one,) = opened("127.0.0.1:0")
    assert one.family == socket.AF_INET
    assert one.sockaddr[1] > 0
    assert one.address == f"127.0.0.1:{one.sockaddr[1]}"
    assert one.owned
    assert one.socket.gettimeout() == 0
    assert not one.socket.get_inheritable()
    assert one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


@needs_ipv6
def test_an_ipv6_address_is_opened(opened, connect):
    (one,) = opened("[::1]:0")
    assert one.family == socket.AF_INET6
    assert one.address == f"[::1]:{one.sockaddr[1]}"
    connect(one)
    assert count_and_close(one) == 1


@needs_ipv6
def test_the_wildcard_takes_ipv4_and_ipv6(opened):
    (one,) = opened("*:0")
    port = one.sockaddr[1]
    assert one.address == f"*:{port}"
    assert one.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    for host in ("127.0.0.1", "::1"):
        opened.keep(socket.create_connection((host, port), timeout=60))
    assert count_and_close(one) == 2


def test_the_wildcard_is_ipv4_where_the_system_has_no_ipv6(opened, monkeypatch):
    monkeypatch.setattr(listener, "_can_bind", lambda _address: False)
    (one,) = opened("*:0")
    assert one.family == socket.AF_INET
    assert one.sockaddr[0] == "0.0.0.0"
    assert one.address == f"0.0.0.0:{one.sockaddr[1]}"


def resolve_to(monkeypatch, *addresses):
    def getaddrinfo(host, port, type, flags):
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, type, 6, "", (a, port, 0, 0) if ":" in a else (a, port))
            for a in addresses
        ]

    monkeypatch.setattr(listener, "_getaddrinfo", getaddrinfo)


def test_every_address_of_a_host_name_is_bound_once_and_on_one_port(opened, monkeypatch):
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.1")
    listeners = opened("some.name:0", count=2)
    assert [one.sockaddr[0] for one in listeners] == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]
    assert len({one.sockaddr[1] for one in listeners}) == 1


def test_a_port_that_is_taken_on_the_second_address_is_drawn_again(opened, monkeypatch):
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    real_bind, taken = listener._bind, []  # noqa: SLF001  replaced below

    def bind_where_the_first_port_is_taken(family, sockaddr, config, **kwargs):
        if sockaddr[0] == "127.0.0.2" and not taken:
            taken.append(opened.keep(real_bind(family, sockaddr, config, **kwargs)).getsockname()[1])
        return real_bind(family, sockaddr, config, **kwargs)

    monkeypatch.setattr(listener, "_bind", bind_where_the_first_port_is_taken)
    first, second = opened("some.name:0")
    assert first.sockaddr[1] == second.sockaddr[1]


def test_a_name_keeps_its_ipv4_address_where_the_system_has_no_ipv6(opened, monkeypatch):
    resolve_to(monkeypatch, "::1", "127.0.0.1")
    monkeypatch.setattr(listener, "_can_bind", lambda _address: False)
    (one,) = opened("localhost:0")
    assert one.sockaddr[0] == "127.0.0.1"


def test_a_name_that_does_not_resolve_is_named(monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(listener, "_getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror, match=r"no\.such\.name:80: Name or service not known"):
        open_listeners("no.such.name:80")


def test_an_address_the_host_does_not_have_is_named():
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0: .*no network interface has this address") as caught:
        open_listeners("192.0.2.1:0")
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run a process that may not bind low ports")
def test_a_port_for_the_privileged_is_named():
    # The user may not be able to read Python's own files: getaddrinfo's codec is loaded before.
    code = OPEN_ELSEWHERE.replace("try:", "import os\n'x'.encode('idna')\nos.setuid(65534)\ntry:", 1)
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 1:
            pytest.skip("sysctl net.ipv4.ip_unprivileged_port_start lets everybody bind low ports")
    assert "127.0.0.1:1: Permission denied; ports below 1024 need CAP_NET_BIND_SERVICE" in run_python(
        code, "127.0.0.1:1"
    )


@pytest.mark.parametrize("count", [0, -1, True, 1.0, None])
def test_a_count_that_is_no_number_of_sockets_is_a_config_error(count):
    with pytest.raises(ConfigError, match="count must be 1 or more"):
        open_listeners("127.0.0.1:0", count=count)


def test_an_open_socket_is_taken_over_and_closed_with_the_listener(opened):
    given = opened.keep(socket.create_server(("127.0.0.1", 0)))
    (one,) = opened(given)
    assert one.socket is given
    assert not one.owned
    assert given.gettimeout() == 0
    one.close()
    assert given.fileno() == -1
    assert one.closed


def test_a_bound_socket_is_made_to_listen(opened):
    given = opened.keep(socket.socket())
    given.bind(("127.0.0.1", 0))
    (one,) = opened(given)
    assert one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_gevent_socket_is_taken_over_as_a_plain_one(opened):
    given = opened.keep(gevent_socket.socket())
    given.bind(("127.0.0.1", 0))
    given.listen()
    (one,) = opened(given)
    assert type(one.socket) is socket.socket
    assert one.sockaddr == given.getsockname()
    one.close()
    assert given.fileno() == -1


def test_sockets_that_cannot_listen_are_config_errors(opened):
    with pytest.raises(ConfigError, match="bound"):
        open_listeners(opened.keep(socket.socket()))
    with pytest.raises(ConfigError, match="stream"):
        open_listeners(opened.keep(socket.socket(type=socket.SOCK_DGRAM)))


def test_an_inherited_descriptor_is_adopted(opened, connect):
    given = opened.keep(socket.create_server(("127.0.0.1", 0)))
    fd = os.dup(given.fileno())
    (one,) = opened(f"fd:{fd}")
    assert one.fileno() == fd
    assert not one.owned
    assert not one.socket.get_inheritable()
    assert one.address == f"127.0.0.1:{given.getsockname()[1]}"
    assert not one.mute(), "another process may hold it"
    connect(one)
    assert count_and_close(one) == 1


def test_connections_of_an_adopted_socket_get_the_configured_options(opened, connect):
    (one,) = opened(socket.create_server(("127.0.0.1", 0)), ListenConfig(keepalive_idle=77))
    connect(one)
    accepted = opened.keep(accept_one(one))
    assert accepted.getsockopt(TCP, socket.TCP_NODELAY)
    assert accepted.getsockopt(TCP, socket.TCP_KEEPIDLE) == 77


def test_descriptors_that_are_no_listening_stream_socket_are_config_errors_and_stay_open(opened, tmp_path):
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(ConfigError, match="no socket"):
            open_listeners(f"fd:{file.fileno()}")
        number = os.dup(file.fileno())
    os.close(number)
    with pytest.raises(ConfigError, match="open file descriptor"):
        open_listeners(Address("fd", fd=number))
    for sock, what in ((socket.socket(), "does not listen"), (socket.socket(type=socket.SOCK_DGRAM), "stream")):
        opened.keep(sock)
        with pytest.raises(ConfigError, match=what):
            open_listeners(f"fd:{sock.fileno()}")
        os.fstat(sock.fileno())


# --- unix sockets ------------------------------------------------------------------------------------------------


def connect_unix(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(path)
    return sock


def test_a_unix_socket_is_opened_and_its_path_removed_at_close(opened, tmp_path):
    path = str(tmp_path / "s")
    (one,) = opened(f"unix:{path}", count=3)
    assert one.address == f"unix:{path}"
    assert one.family == socket.AF_UNIX
    opened.keep(connect_unix(path))
    assert count_and_close(one) == 1
    one.close()
    assert not os.path.lexists(path)
    one.close()


def test_the_mode_of_a_unix_path_is_set(opened, tmp_path):
    path = str(tmp_path / "s")
    opened(f"unix:{path}", ListenConfig(unix_mode=0o640))
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o640


@pytest.mark.slow
def test_a_stale_unix_path_is_taken_over(opened, tmp_path):
    path = str(tmp_path / "s")
    run_python("import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()", path)
    assert stat.S_ISSOCK(os.lstat(path).st_mode)
    (one,) = opened(f"unix:{path}")
    opened.keep(connect_unix(path))
    assert count_and_close(one) == 1


@pytest.mark.slow
def test_a_unix_path_with_a_server_behind_it_is_an_error_that_names_the_process(opened, tmp_path):
    path = str(tmp_path / "s")
    (one,) = opened(f"unix:{path}")
    said = run_python(OPEN_ELSEWHERE, f"unix:{path}")
    assert f"[Errno {errno.EADDRINUSE}] unix:{path} is already in use by another server (pid {os.getpid()})" == said
    opened.keep(connect_unix(path))
    assert count_and_close(one) >= 1


def test_a_unix_path_that_is_no_socket_is_never_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="is no socket") as caught:
        open_listeners(f"unix:{path}")
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "data"


def test_a_unix_path_in_no_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"unix:{tmp_path}/none/s"):
        open_listeners(f"unix:{tmp_path}/none/s")


def test_a_path_that_somebody_replaced_is_left_at_close(opened, tmp_path):
    path = str(tmp_path / "s")
    (one,) = opened(f"unix:{path}")
    os.rename(path, path + ".old")  # keeps the inode in use, so that it is not given to the next one
    opened.keep(socket.socket(socket.AF_UNIX)).bind(path)
    one.close()
    assert os.path.lexists(path)


def test_a_path_is_kept_on_request_and_by_a_forked_child(opened, tmp_path):
    path = str(tmp_path / "s")
    (one,) = opened(f"unix:{path}")
    child = os.fork()
    if child == 0:
        muted = one.mute()
        one.close()
        os._exit(bool(muted))
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.lexists(path)
    one.close(keep_path=True)
    assert os.path.lexists(path)


def test_muting_a_unix_socket_removes_its_path_and_keeps_its_queue(opened, tmp_path):
    path = str(tmp_path / "s")
    (one,) = opened(f"unix:{path}")
    opened.keep(connect_unix(path))
    assert one.mute()
    with pytest.raises(FileNotFoundError):
        connect_unix(path)
    assert count_and_close(one) == 1


def test_servers_that_start_at_once_do_not_remove_each_others_unix_path(opened, tmp_path):
    path = str(tmp_path / "s")
    for _ in range(10):
        opened.keep(socket.socket(socket.AF_UNIX)).bind(path)  # a stale path: nobody listens
        assert race(lambda: open_listeners(f"unix:{path}"), 4) == 1


def race(open_one, racers):
    """How many of the racers got their listeners, before any of them is closed."""
    barrier, won, lost = threading.Barrier(racers), [], []

    def run():
        barrier.wait()
        try:
            won.append(open_one())
        except OSError as exc:
            lost.append(exc)

    threads = [threading.Thread(target=run) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for listeners in won:
        for one in listeners:
            one.close()
    assert all(exc.errno == errno.EADDRINUSE for exc in lost), lost
    assert len(won) + len(lost) == racers
    return len(won)


def test_an_abstract_unix_socket_has_no_path(opened):
    name = f"@gtcpserver-test-{os.getpid()}"
    (one,) = opened(f"unix:{name}")
    assert one.address == f"unix:{name}"
    opened.keep(connect_unix("\0" + name[1:]))
    assert count_and_close(one) == 1
    with pytest.raises(OSError, match=f"unix:{name}"):
        open_listeners(f"unix:{name}")
    assert not one.mute()


def test_tcp_options_are_not_applied_to_unix_sockets(opened, tmp_path):
    config = ListenConfig(
        defer_accept=5, user_timeout=5, congestion="reno", receive_buffer=30000, extra=((TCP, socket.TCP_NODELAY, 1),)
    )
    (one,) = opened(f"unix:{tmp_path}/s", config)
    assert one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 60000


# --- ListenConfig ------------------------------------------------------------------------------------------------


def read_back(opened, level, option, address="127.0.0.1:0", size=0, **fields):
    (one,) = opened(address, ListenConfig(**fields))
    return one.socket.getsockopt(level, option, size) if size else one.socket.getsockopt(level, option)


@pytest.mark.parametrize(
    ("level", "option", "expected", "fields"),
    [
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1, {}),
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 0, {"reuse_port": False}),
        (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1, {"shared": True}),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1, {}),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 0, {"reuse_address": False}),
        (TCP, socket.TCP_FASTOPEN, 256, {}),
        (TCP, socket.TCP_FASTOPEN, 0, {"fast_open": 0}),
        (TCP, socket.TCP_FASTOPEN, 17, {"fast_open": 17}),
        # The kernel counts retransmissions of its SYN-ACK: 1, 3, 7 ... seconds.
        (TCP, socket.TCP_DEFER_ACCEPT, 0, {}),
        (TCP, socket.TCP_DEFER_ACCEPT, 1, {"defer_accept": 0.2}),
        (TCP, socket.TCP_DEFER_ACCEPT, 7, {"defer_accept": 5}),
        (TCP, socket.TCP_NODELAY, 1, {}),
        (TCP, socket.TCP_NODELAY, 0, {"no_delay": False}),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1, {}),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0, {"keepalive": False}),
        (TCP, socket.TCP_KEEPIDLE, 60, {}),
        (TCP, socket.TCP_KEEPIDLE, 11, {"keepalive_idle": 11}),
        (TCP, socket.TCP_KEEPINTVL, 15, {}),
        (TCP, socket.TCP_KEEPINTVL, 12, {"keepalive_interval": 12}),
        (TCP, socket.TCP_KEEPCNT, 4, {}),
        (TCP, socket.TCP_KEEPCNT, 13, {"keepalive_count": 13}),
        (TCP, socket.TCP_USER_TIMEOUT, 2500, {"user_timeout": 2.5}),
        (TCP, socket.TCP_USER_TIMEOUT, 1, {"user_timeout": 0.00001}),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 60000, {"receive_buffer": 30000}),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 60000, {"send_buffer": 30000}),
        (socket.IPPROTO_IP, listen_config.IP_FREEBIND, 1, {"free_bind": True}),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 5, {"extra": ((socket.SOL_SOCKET, socket.SO_PRIORITY, 5),)}),
        (TCP, socket.TCP_LINGER2, 5, {"extra": ((TCP, socket.TCP_LINGER2, b"\5\0\0\0"),)}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_option_is_read_back(opened, level, option, expected, fields):
    assert read_back(opened, level, option, **fields) == expected


def test_the_device_is_read_back(opened):
    assert read_back(opened, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, size=16, device="lo").rstrip(b"\0") == b"lo"


def test_the_congestion_control_is_read_back(opened):
    assert read_back(opened, TCP, socket.TCP_CONGESTION, size=16, congestion="reno").rstrip(b"\0") == b"reno"


@needs_ipv6
@pytest.mark.parametrize("value", [True, False])
def test_ipv6_only_is_read_back(opened, value):
    for address in ("[::]:0", "*:0"):
        option = read_back(opened, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address, ipv6_only=value)
        assert option == value


@needs_ipv6
def test_free_bind_lets_an_address_be_bound_that_the_host_does_not_have(opened):
    for address in ("192.0.2.1:0", "[2001:db8::1]:0"):
        assert opened(address, ListenConfig(free_bind=True))


def test_transparent_is_read_back(opened):
    try:
        ListenConfig(transparent=True)
    except ConfigError as exc:
        pytest.skip(str(exc))
    assert read_back(opened, socket.IPPROTO_IP, listen_config.IP_TRANSPARENT, transparent=True) == 1


def test_multipath_is_read_back_and_serves_plain_clients(opened, connect):
    try:
        config = ListenConfig(multipath=True)
    except ConfigError as exc:
        pytest.skip(str(exc))
    one, other = opened("127.0.0.1:0", config, count=2)
    protocol = one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL if hasattr(socket, "SO_PROTOCOL") else 38)
    assert protocol == listen_config.IPPROTO_MPTCP
    connect(one, 8)
    assert count_and_close(one) + count_and_close(other) == 8


@pytest.mark.parametrize(("backlog", "expected"), [(7, 7), (None, None)])
def test_the_backlog_is_read_back(opened, backlog, expected):
    (one,) = opened("127.0.0.1:0", ListenConfig(backlog=backlog))
    if expected is None:
        with open("/proc/sys/net/core/somaxconn") as file:
            expected = int(file.read())
    # struct tcp_info of a listening socket: tcpi_sacked, at offset 28, is its maximum backlog (tcp_get_info).
    info = one.socket.getsockopt(TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], sys.byteorder) == expected


def test_accepted_connections_inherit_the_options(opened, connect):
    config = ListenConfig(
        user_timeout=9, keepalive_idle=21, keepalive_interval=22, keepalive_count=23, receive_buffer=30000,
        send_buffer=40000, congestion="reno",
    )  # fmt: skip
    (one,) = opened("127.0.0.1:0", config)
    connect(one)
    accepted = opened.keep(accept_one(one))
    assert accepted.getsockopt(TCP, socket.TCP_NODELAY) == 1
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert accepted.getsockopt(TCP, socket.TCP_KEEPIDLE) == 21
    assert accepted.getsockopt(TCP, socket.TCP_KEEPINTVL) == 22
    assert accepted.getsockopt(TCP, socket.TCP_KEEPCNT) == 23
    assert accepted.getsockopt(TCP, socket.TCP_USER_TIMEOUT) == 9000
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 60000
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 80000
    assert accepted.getsockopt(TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"


def test_a_deferred_connection_is_accepted_when_its_data_comes(opened, connect):
    (one,) = opened("127.0.0.1:0", ListenConfig(defer_accept=30))
    (client,) = connect(one)
    assert accept_all(one) == []
    client.sendall(b"x")
    assert opened.keep(accept_one(one)).recv(1) == b"x"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *[(name, 1) for name in ("reuse_port", "reuse_address", "shared", "no_delay", "keepalive", "transparent")],
        ("free_bind", None), ("multipath", "yes"), ("ipv6_only", 1),
        ("fast_open", -1), ("fast_open", True), ("fast_open", 65536), ("fast_open", 1.0), ("fast_open", None),
        ("defer_accept", 0), ("defer_accept", -1), ("defer_accept", True), ("defer_accept", "5"),
        ("defer_accept", 3601), ("defer_accept", float("nan")), ("user_timeout", 0), ("user_timeout", float("inf")),
        ("user_timeout", False), ("backlog", 0), ("backlog", True), ("backlog", 1 << 31), ("keepalive_idle", 0),
        ("keepalive_idle", 32768), ("keepalive_interval", 1.5), ("keepalive_count", 128), ("keepalive_count", True),
        ("receive_buffer", 0), ("receive_buffer", True), ("send_buffer", -1), ("send_buffer", 1 << 31),
        ("device", ""), ("device", "x" * 16), ("device", b"lo"), ("device", "no-such-device"), ("congestion", "ü"),
        ("congestion", 1), ("congestion", "no-such-cc"), ("unix_mode", -1), ("unix_mode", 0o1777),
        ("unix_mode", True), ("unix_mode", "660"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_a_config_error_that_names_field_and_value(name, wrong):
    with pytest.raises(ConfigError) as caught:
        ListenConfig(**{name: wrong})
    assert str(caught.value).startswith(name)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", [[], (1,), ((1, 2),), ((1, 2, "x"),), ((1, True, 1),), ([1, 2, 3],), ((6, 9999, 1),)])
def test_wrong_extra_options_are_config_errors(wrong):
    with pytest.raises(ConfigError, match=r"^extra "):
        ListenConfig(extra=wrong)


def test_options_that_exclude_each_other_are_config_errors():
    with pytest.raises(ConfigError, match="reuse_port"):
        ListenConfig(shared=True, reuse_port=False)
    with pytest.raises(ConfigError, match=r"reuse_port must be True .* count=2"):
        open_listeners("127.0.0.1:0", ListenConfig(reuse_port=False), count=2)


def test_a_congestion_control_the_kernel_lacks_is_told_with_those_it_has():
    with pytest.raises(ConfigError, match=r"^congestion='none-such': .*expected one of: .*reno"):
        ListenConfig(congestion="none-such")


def test_an_option_this_python_lacks_is_a_config_error_only_if_it_is_asked_for(opened, monkeypatch):
    monkeypatch.setattr(listen_config, "TCP_FASTOPEN", NO_OPTION)
    monkeypatch.setattr(listen_config, "TCP_USER_TIMEOUT", NO_OPTION)
    assert opened("127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"^fast_open=255: the system refuses it"):
        ListenConfig(fast_open=255)
    with pytest.raises(ConfigError, match=r"^user_timeout=1\.25: the system refuses it"):
        ListenConfig(user_timeout=1.25)


@pytest.mark.parametrize("number", [errno.EPROTONOSUPPORT, errno.ENOPROTOOPT])
def test_a_system_without_multipath_tcp_is_a_config_error(monkeypatch, number):
    def no_such_protocol(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(listen_config, "_try_options", lambda config: None)
    with pytest.raises(ConfigError, match=r"^multipath=True: this system has no multipath TCP"):
        listen_config.create_socket(ListenConfig(multipath=True), socket.AF_INET, no_such_protocol)


# --- one port, several sockets -----------------------------------------------------------------------------------


def test_several_sockets_on_one_port_share_its_connections(opened, connect):
    group = opened("127.0.0.1:0", count=4)
    assert len({one.sockaddr for one in group}) == 1
    assert all(one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for one in group)
    connect(group[0], 200)
    counts = [count_and_close(one) for one in group]
    assert sum(counts) == 200
    # A spread of 200 over 4 by a hash: fewer than 10 on one has a chance of one in 10**13.
    assert min(counts) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", "*"])
def test_a_second_process_on_the_port_is_an_error_that_names_the_first(opened, connect, host, count):
    group = opened("127.0.0.1:0", count=count)
    port = group[0].sockaddr[1]
    said = run_python(OPEN_ELSEWHERE, f"{host}:{port}")
    where = f"127.0.0.1:{port}" if host != "*" else f":{port}"
    assert f"[Errno {errno.EADDRINUSE}] " in said
    assert f"{where} is already in use by another server (pid {os.getpid()} " in said
    assert "to share the port on purpose use ListenConfig(shared=True)" in said
    connect(group[0], 20)
    assert sum(count_and_close(one) for one in group) == 20


def test_a_second_server_in_the_same_process_is_told_so(opened):
    (one,) = opened("127.0.0.1:0")
    with pytest.raises(OSError, match="is already in use by this process: given twice") as caught:
        open_listeners(one.address)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_holder_that_cannot_be_seen_is_told_with_how_to_find_it(opened, monkeypatch):
    monkeypatch.setattr("gtcpserver.listening.port_holder._processes", list)
    (one,) = opened("127.0.0.1:0")
    with pytest.raises(OSError, match=r"another server .*`ss -ltnp`"):
        open_listeners(one.address)


def test_a_port_that_a_connection_has_is_not_blamed_on_a_server(opened, connect):
    (one,) = opened("127.0.0.1:0")
    (client,) = connect(one)
    with pytest.raises(OSError, match=r"no server was found to listen there") as caught:
        open_listeners(client.getsockname(), ListenConfig(reuse_address=False))
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.slow
def test_processes_share_a_port_if_both_ask_for_it(opened):
    (one,) = opened("127.0.0.1:0", ListenConfig(shared=True))
    assert run_python(OPEN_ELSEWHERE, one.address, "shared") == "opened"
    assert "already in use" in run_python(OPEN_ELSEWHERE, one.address)


@pytest.mark.slow
def test_sharing_with_a_server_that_does_not_share_says_so(opened):
    (one,) = opened("127.0.0.1:0", ListenConfig(reuse_port=False))
    assert "every server on it needs SO_REUSEPORT" in run_python(OPEN_ELSEWHERE, one.address, "shared")


@pytest.mark.slow
def test_of_servers_that_start_at_once_on_a_port_one_gets_it(opened):
    address = f"127.0.0.1:{free_port()}"
    for _ in range(20):
        assert race(lambda: open_listeners(address, count=2), 4) == 1


def test_the_port_of_a_server_that_ended_is_free_although_connections_linger(opened, connect):
    (one,) = opened("127.0.0.1:0")
    (client,) = connect(one)
    accept_one(one).close()  # the side that closes first keeps TIME-WAIT
    assert client.recv(1) == b""
    one.close()
    client.close()
    assert opened(one.address)


def test_nothing_stays_open_when_a_later_socket_fails(opened, monkeypatch):
    real_bind, made = listener._bind, []  # noqa: SLF001  replaced below

    def fail_at_the_third(*args, **kwargs):
        if len(made) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(real_bind(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(listener, "_bind", fail_at_the_third)
    with pytest.raises(OSError, match="Too many"):
        open_listeners("127.0.0.1:0", count=3)
    assert [sock.fileno() for sock in made] == [-1, -1]


# --- draining ----------------------------------------------------------------------------------------------------


def can_filter():
    with socket.socket() as sock:
        return draining.drop_new_connections(sock) == "filter"


needs_filter = pytest.mark.skipif(not can_filter(), reason="no SO_ATTACH_FILTER: an old system, or not privileged")


@pytest.fixture(params=[pytest.param("filter", marks=needs_filter), "ttl"])
def way(request, monkeypatch):
    """How a listener is muted: both ways a kernel may have, whatever this one would choose."""
    if request.param == "ttl":
        if sys.platform != "linux":
            pytest.skip("the TTL is asked for on Linux")
        monkeypatch.setattr(draining, "_drop_by_filter", lambda listening: False)
    return request.param


def begin_connect(sockaddr, family):
    sock = socket.socket(family)
    sock.setblocking(False)
    assert sock.connect_ex(sockaddr) == errno.EINPROGRESS
    return sock


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)])
def test_a_muted_listener_keeps_its_queue_and_answers_no_new_connection(opened, connect, host, way):
    (one,) = opened(f"{host}:0")
    clients = connect(one, 10)
    assert one.mute()
    assert one.muted_by_ttl is (way == "ttl")
    assert one.socket.getsockopt(TCP, socket.TCP_DEFER_ACCEPT) == (1 if way == "ttl" else 0)
    late = opened.keep(begin_connect(one.sockaddr, one.family))
    accepted = accept_all(one)
    assert len(accepted) == 10
    for client, connection in zip(clients, accepted, strict=True):
        client.sendall(b"x")
        assert connection.recv(1) == b"x", "a connection that was accepted from a muted listener works"
        connection.close()
    assert late.connect_ex(one.sockaddr) == errno.EALREADY, "no answer: neither connected nor refused"
    one.close()
    # Its kernel asks again after a second and is refused: it never was connected.
    assert select.select([], [late], [], 10)[1]
    assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


@pytest.mark.slow
def test_a_client_that_a_muted_listener_left_waiting_gets_the_next_server(opened, way):
    (one,) = opened("127.0.0.1:0")
    one.mute()
    late = opened.keep(begin_connect(one.sockaddr, one.family))
    one.close()
    (following,) = opened(one.address)
    assert opened.keep(accept_one(following)).getpeername() == late.getsockname()


@pytest.mark.slow
@needs_filter  # for the client's own
def test_a_handshake_under_way_at_mute_is_completed_and_counted_until_then(opened, way):
    (one,) = opened("127.0.0.1:0")
    # The client drops the SYN-ACK, as a far one has not got it yet.
    client = opened.keep(socket.socket())
    drop_all = [(draining.BPF_RETURN, 0, 0, 0)]
    draining.attach_program(client, draining.SO_ATTACH_FILTER, drop_all)
    client.setblocking(False)
    client.connect_ex(one.sockaddr)
    if handshakes_under_way(one.socket) is None:
        pytest.skip("this kernel has no sock_diag")
    assert handshakes_under_way(one.socket) == 1
    assert one.mute()
    client.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    accepted = opened.keep(accept_one(one))
    assert accepted.getpeername() == client.getsockname()
    assert handshakes_under_way(one.socket) == 0


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:0", pytest.param("*:0", marks=needs_ipv6)])
def test_connections_deferred_until_their_data_come_to_a_muted_listeners_queue(opened, address, way):
    (one,) = opened(address, ListenConfig(defer_accept=60))
    client = opened.keep(socket.create_connection(("127.0.0.1", one.sockaddr[1]), timeout=60))
    assert handshakes_under_way(one.socket) in (1, None)
    assert accept_all(one) == []
    assert one.mute()
    opened.keep(accept_one(one)).sendall(b"x")
    assert client.recv(1) == b"x"


LOOPBACKS = [
    ("127.0.0.1", "127.0.0.1"),
    pytest.param("[::1]", "::1", marks=needs_ipv6),
    pytest.param("*", "127.0.0.1", marks=needs_ipv6),
    pytest.param("*", "::1", marks=needs_ipv6),
]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "client_host"), LOOPBACKS)
def test_what_a_client_sends_first_makes_its_connection_on_a_listener_muted_by_ttl(
    opened, monkeypatch, host, client_host
):
    monkeypatch.setattr(draining, "_drop_by_filter", lambda listening: False)
    # Its last ACK is not taken, as if it were still on its way.
    (one,) = opened(f"{host}:0", ListenConfig(defer_accept=60))
    client = opened.keep(socket.create_connection((client_host, one.sockaddr[1]), timeout=60))
    assert one.mute()
    client.sendall(b"x")
    connection = opened.keep(accept_one(one))
    assert connection.recv(1, socket.MSG_DONTWAIT) == b"x"
    # But nothing more is heard until it is asked for.
    client.sendall(b"y")
    with pytest.raises(BlockingIOError):
        connection.recv(1, socket.MSG_DONTWAIT)
    draining.accept_any_ttl(connection)
    connection.settimeout(60)
    assert connection.recv(1) == b"y"


def test_a_listener_that_was_handed_on_is_not_muted(opened, connect):
    (one,) = opened("127.0.0.1:0")
    one.owned = False
    assert not one.mute()
    connect(one)
    assert count_and_close(one) == 1


def test_a_forked_child_does_not_mute_its_parents_listener(opened, connect):
    (one,) = opened("127.0.0.1:0")
    child = os.fork()
    if child == 0:
        os._exit(bool(one.mute()))
    assert os.waitpid(child, 0)[1] == 0
    connect(one)
    assert count_and_close(one) == 1


def test_handshakes_are_not_counted_for_a_unix_socket(opened, tmp_path):
    (one,) = opened(f"unix:{tmp_path}/s")
    assert handshakes_under_way(one.socket) is None


@pytest.mark.slow
@pytest.mark.parametrize("stay", [[0], [1], [2], [3], [1, 3], [0, 2, 3]])
def test_steering_gives_new_connections_to_the_members_that_stay(opened, connect, stay):
    group = opened("127.0.0.1:0", count=4)
    if not steer(group, stay):
        pytest.skip("this kernel has no SO_ATTACH_REUSEPORT_CBPF")
    connect(group[0], 90)
    counts = [count_and_close(one) for one in group]
    assert sum(counts) == 90
    assert [index for index, count in enumerate(counts) if count] == stay


def test_unsteering_spreads_new_connections_over_all_again(opened, connect):
    group = opened("127.0.0.1:0", count=2)
    if not steer(group, [1]):
        pytest.skip("this kernel has no SO_ATTACH_REUSEPORT_CBPF")
    assert unsteer(group)
    assert not unsteer(group)
    connect(group[0], 60)
    assert min(count_and_close(one) for one in group) > 0


def test_the_last_member_takes_the_place_of_a_closed_one(opened, connect):
    group = opened("127.0.0.1:0", count=4)
    last = group[3]
    group[1].close()
    forget_member(group, 1)
    assert group[1] is last
    for index in range(3):
        if not steer(group, [index]):
            pytest.skip("this kernel has no SO_ATTACH_REUSEPORT_CBPF")
        connect(group[0], 10)
        assert [count_and_close(one) for one in group] == [10 * (index == number) for number in range(3)]


def test_forgetting_the_last_member_leaves_the_others_in_their_places():
    group = ["a", "b", "c"]
    forget_member(group, 2)
    assert group == ["a", "b"]


def test_steering_to_nobody_or_to_a_stranger_is_an_error(opened):
    group = opened("127.0.0.1:0", count=2)
    for stay in ([], [2], [-1]):
        with pytest.raises(ValueError, match="stay must"):
            steer(group, stay)


def test_sockets_that_are_no_group_cannot_be_steered(opened):
    assert not steer(opened("127.0.0.1:0", ListenConfig(reuse_port=False)), [0])


HAMMER = """
import selectors, socket, sys
host, port, bursts, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
served = refused = 0
broken = []
for burst in range(bursts):
    if burst == 2:
        print("hammering", flush=True)
    waiting = selectors.DefaultSelector()
    for _ in range(size):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((host, port))
        waiting.register(sock, selectors.EVENT_WRITE)
    while waiting.get_map():
        for key, _ in waiting.select(10):
            sock = key.fileobj
            try:
                if key.events == selectors.EVENT_WRITE:
                    sock.send(b"x")
                    waiting.modify(sock, selectors.EVENT_READ)
                    continue
                if sock.recv(1):
                    served += 1
                else:
                    broken.append("EOF")
            except ConnectionRefusedError:
                refused += 1
            except OSError as exc:
                broken.append(repr(exc))
            waiting.unregister(sock)
            sock.close()
    if refused:
        break
print(served, refused, broken)
"""


def echo(connection):
    with connection:
        connection.settimeout(60)
        connection.sendall(connection.recv(1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mute", "mute by ttl", "steer to the first", "steer to the second"])
def test_no_client_is_reset_when_a_listener_is_drained_under_bursts(opened, monkeypatch, how):
    if how == "mute by ttl":
        monkeypatch.setattr(draining, "_drop_by_filter", lambda listening: False)
    muting = how.startswith("mute")
    group = opened("127.0.0.1:0", count=1 if muting else 2)
    leaving = group[1] if how == "steer to the first" else group[0]
    staying = [one for one in group if one is not leaving]
    client = subprocess.Popen(
        [sys.executable, "-c", HAMMER, "127.0.0.1", str(group[0].sockaddr[1]), "12", "300"],
        stdout=subprocess.PIPE,
        text=True,
    )
    hammering, ended = threading.Event(), threading.Event()
    said = []

    def read():
        for line in client.stdout:
            said.append(line)
            hammering.set()
        hammering.set()
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    served = 0

    def serve(listeners):
        count = 0
        for one in listeners:
            for connection in accept_all(one):
                if one.muted_by_ttl:
                    draining.accept_any_ttl(connection)
                echo(connection)
                count += 1
        return count

    while not hammering.is_set():
        served += serve(group)
    begun = leaving.mute() if muting else steer(group, [group.index(staying[0])])
    if begun:
        served += serve([leaving])
        until = time.monotonic() + listener.HANDSHAKE_SECONDS
        while time.monotonic() < until:
            served += serve(staying)
        served += serve([leaving])
    leaving.close()
    while not ended.is_set():
        served += serve(staying)
    client.wait()
    reader.join()
    if not begun:
        pytest.skip("this kernel has no way to do it")
    answered, refused, broken = said[-1].split(" ", 2)
    assert broken.strip() == "[]"
    assert int(answered) == served
    assert int(refused) > 0 if muting else int(answered) == 12 * 300


def test_the_address_of_a_listener_reads_back(opened, tmp_path):
    for address in ("127.0.0.1:0", "*:0", f"unix:{tmp_path}/s"):
        for one in opened(address):
            assert str(parse_address(one.address)) == one.address
            assert isinstance(one, Listener)
            assert one.address in repr(one)
