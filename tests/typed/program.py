"""A user's program that uses every public name, for `mypy --strict` and pyright (test_typing.py). It is not run.

A comment `# revealed: T` says what type the checkers must see on its line, `# revealed: T or U` where they differ.
"""

from __future__ import annotations

import re
import socket
import socketserver
import ssl
from array import array
from collections.abc import Iterable
from typing import Any

from gtcpserver import (
    Acceptor,
    AccessLog,
    Address,
    BlockDetector,
    ClientLimits,
    ClientRefused,
    ConfigError,
    Connection,
    ConnectionPool,
    ConnectionTLS,
    CutConnection,
    DeadlineExceeded,
    EarlyEOF,
    Frames,
    FramingError,
    GtcpServerError,
    HandedOver,
    HandlerPool,
    LengthPrefix,
    LimitExceeded,
    Lines,
    ListenConfig,
    Netstrings,
    ProxyProtocol,
    RelayResult,
    Server,
    ServerStats,
    StartTLSError,
    State,
    StopReport,
    StreamServer,
    TLSConfig,
    TLSFlood,
    TruncatedStream,
    __version__,
    compiled,
    connect,
    from_socketserver,
    from_wsgi,
    is_client_error,
    parse_address,
    pipe,
    relay,
    run,
    run_coroutine,
    stay_connected,
    why_pure,
)
from gtcpserver.adapters import SocketServerHandler, WSGIHandler
from gtcpserver.forwarder import Forwarder, Target
from gtcpserver.proxy.build import Proxy, make_proxy
from gtcpserver.proxy.config import ProxyConfig, parse_config
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.proxy_protocol import ProxyHeader, parse_header
from gtcpserver.static_files import StaticFiles
from gtcpserver.supervisor import (
    CannotStart,
    ControlError,
    Hooks,
    LogStyle,
    Master,
    Program,
    SupervisorConfig,
    Worker,
    WorkersCannotStart,
    ask,
    current_worker,
)
from gtcpserver.testing import (
    FAULTS,
    Certificates,
    Client,
    FaultReport,
    HandlerFailed,
    Problem,
    ServerUnderTest,
    certificates,
    check_faults,
    in_thread,
    serving,
)
from gtcpserver.testing import connect as connect_client
from gtcpserver.tls import (
    CertificateFiles,
    Cipher,
    Credentials,
    HandshakeFailure,
    build_context,
    classify_handshake_error,
    self_signed,
)

# -- a handler ---------------------------------------------------------------------------------------------------------


def handle(conn: Connection) -> None:
    conn.settimeout(30)
    reveal_type(conn.recv(4096))  # revealed: bytes
    reveal_type(conn.recv_exactly(4))  # revealed: bytes
    reveal_type(conn.recv_into(bytearray(10)))  # revealed: int
    reveal_type(conn.fileno())  # revealed: int
    reveal_type(conn.makefile("rb"))  # revealed: BufferedReader
    reveal_type(conn.makefile("r", encoding="utf-8").readline())  # revealed: str
    reveal_type(conn.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))  # revealed: int
    reveal_type(conn.tls)  # revealed: ConnectionTLS | None
    reveal_type(conn.server)  # revealed: Server | None
    reveal_type(conn.client_address)  # revealed: tuple[str, int] | tuple[str, int, int, int] | str
    reveal_type(conn.server_address)  # revealed: tuple[str, int] | tuple[str, int, int, int] | str
    reveal_type(conn.peer_address)  # revealed: tuple[str, int] | tuple[str, int, int, int] | str
    reveal_type(conn.dup())  # revealed: Connection
    reveal_type(conn.timeout)  # revealed: float | None
    reveal_type(conn.closed)  # revealed: bool
    reveal_type(conn.family)  # revealed: AddressFamily
    reveal_type(conn.proxy_header)  # revealed: ProxyHeader | None
    reveal_type(conn.bytes_received + conn.bytes_sent)  # revealed: int
    reveal_type(conn.started_at)  # revealed: float
    try:
        with conn.idle():
            line = conn.recv_until(b"\n", limit=100)
        with conn.deadline(5):
            conn.sendall(line.upper())
            conn.sendall(memoryview(line), socket.MSG_MORE)
            conn.sendall(array("i", [1, 2, 3]))
            reveal_type(conn.send(bytearray(line)))  # revealed: int
    except EarlyEOF as early:
        reveal_type(early.partial)  # revealed: bytes
    except (DeadlineExceeded, LimitExceeded, TLSFlood, TruncatedStream) as error:
        print(error)
    except HandedOver:
        raise
    conn.unread(b"x")
    conn.log_fields["user"] = "ada"
    conn.session["user"] = "ada"
    reveal_type(conn.session)  # revealed: dict[str, Any]
    reveal_type(conn.resumed)  # revealed: bool
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sent: int = conn.sendfile("/etc/hostname") + conn.recv_to_file("/dev/null", count=10)
    print(conn.client_address, conn.server_address, conn.peer_address, conn.context, sent)
    conn.shutdown(socket.SHUT_WR)
    conn.abort()


class Session(Connection):
    """A connection class of one's own."""

    name: str

    __slots__ = ("name",)


def handle_session(conn: Session) -> None:
    conn.name = conn.recv_until(b"\n").decode()
    with conn as same:
        reveal_type(same)  # revealed: Session
        reveal_type(same.dup())  # revealed: Session


def admit_session(conn: Session) -> bool:
    return conn.name != ""


def handle_any_socket(sock: socket.socket) -> None:
    sock.sendall(sock.recv(10))


class Counting:
    """A handler that is an object."""

    def __init__(self) -> None:
        self.counters = {"served": 0}

    def __call__(self, conn: Connection) -> None:
        self.counters["served"] += 1

    def server_stopped(self) -> None:
        print(self.counters)


def upgrade(conn: Connection) -> None:
    try:
        tls = conn.start_tls(TLSConfig("cert.pem", "key.pem"), timeout=5)
    except StartTLSError:
        return
    reveal_type(tls)  # revealed: ConnectionTLS
    reveal_type(tls.cipher)  # revealed: tuple[str, int, fallback=Cipher] | None or Cipher | None
    show(tls)
    conn.stop_tls()


def show(tls: ConnectionTLS) -> None:
    cipher: Cipher | None = tls.cipher
    print(tls.version, tls.alpn, tls.server_name, cipher.bits if cipher else 0, tls.session_reused)


def forward(conn: Connection) -> None:
    with connect("127.0.0.1:5001", timeout=5) as upstream:
        reveal_type(upstream)  # revealed: Connection
        result: RelayResult = relay(conn, upstream, idle_timeout=300, on_bytes=lambda direction, size: None)
        reveal_type(result.reason)  # revealed: Literal
        reveal_type(pipe(conn, conn, count=10))  # revealed: int


def frame(conn: Connection) -> None:
    frames: Frames = conn.frames(prefix="varint", limit=100)
    try:
        for message in frames:
            reveal_type(message)  # revealed: bytes
            frames.send(message)
        conn.frames(Netstrings()).send_all([conn.frames(Lines(b"\0", limit=10)).recv()])
    except FramingError as error:
        print(error)


backend = ConnectionPool(("127.0.0.1", 5001), size=None, retry_for=5, tls=True, check=lambda conn: conn.send(b"ping"))


def ask_backend(conn: Connection) -> None:
    with backend.connection() as upstream:
        Frames(upstream, LengthPrefix(2, byteorder="little")).send(b"hello")
    reveal_type(backend.in_use)  # revealed: int


def subscribe(server: Server) -> None:
    server.spawn(stay_connected, "127.0.0.1:5002", frame)


Server(0, frame, on_start=subscribe, on_stop=lambda server: backend.close(), freeze_gc=True)


# -- servers -----------------------------------------------------------------------------------------------------------


def admit(conn: Connection) -> bool:
    return conn.client_address[0] != "192.0.2.1"


def failed(conn: Connection, error: BaseException) -> None:
    print(conn, error.reason if isinstance(error, ClientRefused) else error)


def main() -> None:
    pool = HandlerPool(500)
    pool.resize(800)
    server = Server(
        ["127.0.0.1:5000", "unix:/run/x.sock", ("::1", 5000), 5001],
        handle,
        listen=ListenConfig(defer_accept=2, backlog=1024),
        accept_loops=2,
        pool=pool,
        on_full="close_idle",
        max_connections=1000,
        timeout=60,
        handler_timeout=600,
        min_rate=100,
        tls=TLSConfig("cert.pem", "key.pem", alpn=["http/1.1"], sni={}),
        proxy_protocol=ProxyProtocol(["10.0.0.0/8"]),
        client_limits=ClientLimits(connections=50, new_per_second=20, deny=["192.0.2.0/24"]),
        context={"a": 1},
        access_log=AccessLog("json", "/var/log/access.json"),
        on_connect=admit,
        on_disconnect=lambda conn: print(conn.bytes_sent),
        on_error=failed,
    )
    try:
        server.start()
    except (ConfigError, OSError) as error:
        raise SystemExit(str(error)) from None
    stats: ServerStats = server.stats()
    reveal_type(stats.accepted)  # revealed: int
    reveal_type(server.address)  # revealed: str
    reveal_type(server.state)  # revealed: State
    assert server.state is State.SERVING
    report: StopReport = server.stop(timeout=10)
    for connection in report.cut:
        reveal_type(connection)  # revealed: CutConnection
        describe(connection)
    Server("*:0", handle_session, connection_class=Session, on_connect=admit_session, on_error=failed).halt()
    Server("*:0", lambda conn: print(conn.name), connection_class=Session)
    reveal_type(connect("127.0.0.1:5000", connection_class=Session))  # revealed: Session
    Server(0, handle_any_socket, on_error=report_fault)
    Server(0, Counting())
    Server(0, upgrade, tls=ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
    Server(0, lambda conn: conn.sendall(b"hello"))
    with Server(0, forward, pool=10) as other:
        reveal_type(other)  # revealed: Server
        other.serve_forever(stop_timeout=5)
    address: Address = parse_address("127.0.0.1:5000")
    reveal_type(address.port)  # revealed: int
    try:
        with BlockDetector(0.1):
            run(handle, "127.0.0.1:5000", pool=10, stop_timeout=None)
        run(handle, monkey_patch=True, block_detector=None)
        run(handle, block_detector=0.5)
        run("app:handle", bind="0.0.0.0:5000", workers="auto")
        run(handle_session, connection_class=Session, workers=2, pin_cpus=True, worker_start=started)
    except GtcpServerError as error:
        print(__version__, error, compiled, why_pure)
        reveal_type(compiled)  # revealed: bool


async def fetch(key: str) -> bytes:
    return key.encode()


def answer(conn: Connection) -> None:
    reveal_type(run_coroutine(fetch("name"), timeout=5))  # revealed: bytes
    conn.sendall(run_coroutine(fetch("name")))


def report_fault(conn: Connection, error: BaseException) -> None:
    if not is_client_error(error, conn):
        print(conn.client_address, error)


def describe(connection: CutConnection) -> None:
    print(connection.peer, connection.age, connection.where)


def drop_in() -> None:
    def serve(sock: Any, address: tuple[str, int]) -> None:
        sock.sendall(repr(address).encode())

    StreamServer(("127.0.0.1", 0), serve).serve_forever()
    Acceptor(("127.0.0.1", 0), serve, full=lambda: False).start()


# -- existing code, files, proxies -------------------------------------------------------------------------------------


class Old(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


def others(conn: Connection) -> None:
    Server(0, from_socketserver(Old))
    Server(0, from_wsgi(application, access_log=True))
    Server(0, SocketServerHandler(Old, None))
    Server(0, WSGIHandler(application, False))
    Server(0, StaticFiles("/srv/www", listing=True, cache_control="max-age=60"))
    forwarder = Forwarder(["10.0.0.1:80"], balance="least", send_proxy="v2")
    target: Target = forwarder.targets[0]
    Server(0, forwarder)
    print(target.active)
    gate = Gate(
        client_rules=[parse_client_rule("allow 127.0.0.0/8")],
        destination_rules=[parse_destination_rule("allow any:443")],
    )
    Server(0, ProxyHandler(gate, "socks"))
    config: ProxyConfig = parse_config("")
    proxy: Proxy = make_proxy(config)
    Server(list(proxy.addresses), proxy.handler)
    found: tuple[ProxyHeader, int] | None = parse_header(b"PROXY UNKNOWN\r\n")
    print(found)


# -- workers -----------------------------------------------------------------------------------------------------------


def started(worker: Worker) -> None:
    print(worker, current_worker())


def build(sockets: list[socket.socket]) -> tuple[Server, Hooks]:
    return Server(list(sockets), handle), Hooks(worker_start=started)


def supervise() -> None:
    program = Program(addresses=["127.0.0.1:0"], listen=ListenConfig(), build=build, log_style=LogStyle("info", "json"))
    try:
        Master(program, SupervisorConfig(workers=2, recycle_after=1000)).run()
        reveal_type(ask("/run/app.sock", {"command": "status"}))  # revealed: dict[str, Any]
    except (CannotStart, ControlError, WorkersCannotStart) as error:
        print(error)


# -- TLS ---------------------------------------------------------------------------------------------------------------


def tls() -> HandshakeFailure:
    files: CertificateFiles = self_signed(["localhost"])
    config = TLSConfig(*files)
    credentials = Credentials(config)
    credentials.reload()
    reveal_type(build_context(config))  # revealed: SSLContext
    return classify_handshake_error(TimeoutError())


# -- tests -------------------------------------------------------------------------------------------------------------


def test_it() -> None:
    with certificates() as made, serving(handle, tls=made.server) as server:
        reveal_type(made)  # revealed: Certificates
        reveal_type(server)  # revealed: ServerUnderTest
        with connect_client(server, tls=made.client, proxy="192.0.2.7:4000") as client:
            reveal_type(client)  # revealed: Client
            reveal_type(client.recv_until(b"\n"))  # revealed: bytes
        reveal_type(in_thread(len, "abc"))  # revealed: int
    report: FaultReport = check_faults(handle, [(b"a\n", b"A\n"), (b"b\n", re.compile(rb"B\n"))], timeout=5)
    assert report.ok, report
    assert report.played == tuple(FAULTS)
    keep(made, client, server, report.problems)


def keep(made: Certificates, client: Client, server: ServerUnderTest, problems: tuple[Problem, ...]) -> None:
    try:
        print(made, client, server.errors, problems)
    except HandlerFailed:
        pass


if __name__ == "__main__":
    main()
