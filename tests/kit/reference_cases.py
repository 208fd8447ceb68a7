"""What surrounds the examples of the reference (docs/test_reference_examples.py): code before each, and behind it.

In all of them are `echo` (a handler; `handle` is the same), `exchange` (a client that sends, and must be answered so),
`made` (certificates of gtcpserver.testing) and `folder` (the working directory). Servers that an example has made are
started before the check, and stopped after it.
"""

from __future__ import annotations

#: Serve until SIGTERM in a process of their own, or end it.
ALONE = (
    "gtcpserver.run",
    "gtcpserver.Server",
    "gtcpserver.StreamServer",
    "gtcpserver.supervisor.Master",
)

_PAIR = """
from gtcpserver import connect, relay

backend = connect("10.0.0.5:7000")
conn = connect("10.0.0.5:7000")
conn.shutdown(1)
"""

_APPLICATION = """
def application(environment, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Hello\\n"]
"""

_SERVED = """
from gtcpserver import Server
from gtcpserver.testing import connect

def handle(conn):
    conn.recv(100)

server = Server("127.0.0.1:0", handle)
server.start()
"""

_OVER_TLS = """
from gtcpserver.testing import serving

with serving(handle, tls=made.server) as server:
    exchange(server, b"", None, tls=made.client)
"""

_PAGE = """
import urllib.request
from gtcpserver.testing import in_thread

with in_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.port}/") as page:
    assert page.read() == b"Hello\\n"
"""

GIVEN = {
    "gtcpserver.connection.Deadline": "def answer(message): return message.upper()",
    "gtcpserver.RelayResult": _PAIR,
    "gtcpserver.Acceptor": """
def serve(connection):
    connection.sendall(b"served")
    connection.end()
""",
    "gtcpserver.ServerStats": _SERVED,
    "gtcpserver.StopReport": _SERVED,
    "gtcpserver.State": _SERVED,
    "gtcpserver.CutConnection": _SERVED
    + """
client = connect(server)
gevent.sleep(0.01)
while not server.stats().handlers: gevent.sleep(0.01)
""",
    "gtcpserver.is_client_error": "def handle(conn): 1 / 0",
    "gtcpserver.TruncatedStream": "import io; file = io.BytesIO()",
    "gtcpserver.testing.in_thread": _APPLICATION,
    "gtcpserver.testing.FaultReport": """
from gtcpserver.testing import FaultReport

report = FaultReport((), ("reset", "half-close"), 12, 0, 0.5)
""",
    "gtcpserver.testing.Problem": """
from gtcpserver.testing import FaultReport, Problem

report = FaultReport((Problem("reset", "memory", "it grows"),), ("reset",), 12, 0, 0.5)
""",
    "gtcpserver.proxy.authenticate.CommandAuthenticator": """
(folder / "ask_directory.py").write_text("while True: print('OK' if input() == 'ada secret' else 'ERR', flush=True)")
""",
    "gtcpserver.proxy.authenticate.HashedUsers": """
# "secret"
(folder / "users.htpasswd").write_text(
    "ada:$argon2id$v=19$m=65536,t=3,p=4$Q7qPnztqccsdO9GcHWSt7Q$F7qyFAZZK8fvZ3v6Ih8o01Ii4cPPbaKy+500MLGqy9E\\n"
)
""",
    # The real one ends a process.
    "gtcpserver.supervisor.WorkersCannotStart": """
from unittest.mock import Mock
import gtcpserver
from gtcpserver.supervisor import WorkersCannotStart

replaced, gtcpserver.run = gtcpserver.run, Mock(side_effect=WorkersCannotStart(Mock(text="no")))
""",
    "gtcpserver.supervisor.LogStyle": "def build(sockets): pass",
}

CHECKS = {
    "gtcpserver.Connection": 'exchange(handle, b"Ada\\n", b"Hello, Ada\\n!\\n")',
    "gtcpserver.connection.Deadline": 'exchange(handle, b"\\0\\2hi", b"HI")',
    "gtcpserver.connection.Idle": 'exchange(handle, b"one\\n", b"one\\n")',
    "gtcpserver.LengthPrefix": 'exchange(handle, b"\\2\\0hi", b"\\2\\0HI")',
    "gtcpserver.Netstrings": 'exchange(handle, b"2:hi,", b"2:HI,")',
    "gtcpserver.Lines": 'exchange(handle, b"hi\\r\\n", b"HI\\r\\n")',
    "gtcpserver.framing.Framing": 'exchange(handle, b"a" * 16 + b"b" * 16, b"a" * 16 + b"b" * 16)',
    "gtcpserver.connect": 'exchange(handle, b"hello", b"hello")',
    "gtcpserver.ConnectionPool": 'exchange(handle, b"hello\\n", b"hello\\n")',
    "gtcpserver.stay_connected": 'exchange(server, b"hello", b"hello")',
    "gtcpserver.forwarder.Forwarder": 'exchange(server, b"hello", b"hello")',
    "gtcpserver.static_files.StaticFiles": """
import urllib.request
from gtcpserver.testing import in_thread

with in_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.port}/") as page:
    assert page.read() == b"<p>hello</p>"
    assert page.headers["Cache-Control"] == "max-age=3600"
""",
    "gtcpserver.adapters.SocketServerHandler": 'exchange(server, b"a\\nb\\n", b"a\\nb\\n")',
    "gtcpserver.from_socketserver": 'exchange(server, b"a\\nb\\n", b"a\\nb\\n")',
    "gtcpserver.adapters.WSGIHandler": _PAGE,
    "gtcpserver.from_wsgi": _PAGE,
    "gtcpserver.ListenConfig": 'exchange(server, b"hello", b"hello")',
    "gtcpserver.relay": 'exchange(handle, b"hello", b"hello")',
    "gtcpserver.pipe": 'exchange(echo, b"hello", b"hello")',
    "gtcpserver.HandlerPool": """
exchange(plain, b"hello", b"hello")
from gtcpserver.testing import connect
with connect("unix:app.sock") as client:
    client.sendall(b"hello")
    assert client.recv_exactly(5) == b"hello"
""",
    "gtcpserver.ClientLimits": 'exchange(server, b"hello", b"hello")',
    "gtcpserver.ProxyProtocol": 'exchange(server, b"hello", b"hello", proxy="192.0.2.7:40000")',
    "gtcpserver.Acceptor": """
from gtcpserver.testing import connect
with connect(f"127.0.0.1:{acceptor.server_port}") as client:
    assert client.recv_all() == b"served"
acceptor.stop()
""",
    "gtcpserver.AccessLog": """
exchange(server, b"", None)
server.stop(5)
assert '"user": "ada"' in open("access.log").read()
""",
    "gtcpserver.monitoring.Monitor": """
import urllib.request
from gtcpserver.testing import in_thread

with in_thread(urllib.request.urlopen, f"http://{monitor.address}/healthz") as page:
    assert page.status == 200
""",
    "gtcpserver.BlockDetector": """
exchange(server, b"hello", b"hello")
detector.stop()
""",
    "gtcpserver.run_coroutine": 'exchange(handle, b"hello", b"HELLO")',
    "gtcpserver.is_client_error": 'exchange(server, b"", None)',
    "gtcpserver.GtcpServerError": 'exchange(handle, b"no newline", None)',
    "gtcpserver.DeadlineExceeded": """
from gtcpserver.testing import connect, serving
with serving(handle) as late, connect(late) as client:
    assert client.recv_all() == b"too slow\\n"
""",
    "gtcpserver.EarlyEOF": 'exchange(handle, b"12345", None)',
    "gtcpserver.HandedOver": """
class Moves:
    def idle(self): raise HandedOver

try:
    handle(Moves())
except HandedOver:
    pass
""",
    "gtcpserver.LimitExceeded": 'exchange(handle, b"x" * 600, b"longer than 512 bytes\\n")',
    "gtcpserver.FramingError": 'exchange(handle, b"hello", b"15:not a netstring,")',
    "gtcpserver.TruncatedStream": """
from gtcpserver.testing import connect, serving
with serving(handle, tls=made.server) as server, connect(server, tls=made.client) as client:
    client.sendall(b"some")
    client.socket.shutdown(1)  # without close_notify
    client.socket.recv(1000)
    while server.stats().handlers: gevent.sleep(0.01)
assert file.getvalue() == b"some"
""",
    "gtcpserver.TLSFlood": """
class Floods:
    client_address = ("192.0.2.7", 40000)
    def recv(self, size): raise TLSFlood("too many", "key_update")

try:
    handle(Floods())
except TLSFlood:
    pass
""",
    "gtcpserver.StartTLSError": 'exchange(handle, b"STARTTLS\\n", None)',
    "gtcpserver.ClientRefused": """
from gtcpserver import ClientLimits, Server
server = Server("127.0.0.1:0", handle, client_limits=ClientLimits(deny=["192.0.2.0/24"]))
server.start()
from gtcpserver.testing import connect
with connect(server, proxy="192.0.2.7:40000") as client:
    try:
        client.recv_all()
    except ConnectionResetError:
        pass
""",
    "gtcpserver.proxy_protocol.Transport": 'exchange(handle, b"", None)',
    "gtcpserver.proxy_protocol.Type": """
from ipaddress import ip_address
from gtcpserver import ProxyProtocol, Server
from gtcpserver.proxy_protocol import TLV, ProxyHeader
server = Server("127.0.0.1:0", handle, proxy_protocol=ProxyProtocol(["127.0.0.1"]))
server.start()
one = (ip_address("192.0.2.7"), 40000)
header = ProxyHeader(one, one, tlvs=(TLV(Type.AUTHORITY, b"example.com"),))
exchange(server, b"", b"example.com", proxy=header)
""",
    "gtcpserver.proxy.gate.Authenticator": """
assert gate.authenticators["staff"].check(b"ada", b"secret", None)
""",
    "gtcpserver.proxy.authenticate.HashedUsers": 'assert users.check(b"ada", b"secret", None)',
    "gtcpserver.proxy.authenticate.CommandAuthenticator": """
assert users.check(b"ada", b"secret", None)
assert not users.check(b"ada", b"guess", None)
""",
    "gtcpserver.TLSConfig": 'exchange(server, b"hello", b"hello", tls=made.client)',
    "gtcpserver.tls.Credentials": 'exchange(server, b"hello", b"hello", tls=made.client)',
    "gtcpserver.tls.self_signed": """
import ssl
trust = ssl.create_default_context(cafile=files.certfile)
exchange(server, b"hello", b"hello", tls=trust)
""",
    "gtcpserver.ConnectionTLS": _OVER_TLS,
    "gtcpserver.tls.Cipher": _OVER_TLS,
    "gtcpserver.supervisor.Hooks": """
import socket
server, hooks = build([socket.create_server(("127.0.0.1", 0))])
from gtcpserver.supervisor import Worker
hooks.worker_start(Worker(0, 0))
""",
    "gtcpserver.supervisor.Worker": """
from gtcpserver import Server
from gtcpserver.supervisor import Worker
server = Server("127.0.0.1:0", handle, context={})
started(Worker(3, 0, server=server))
assert server.context == {"worker": 3}
""",
    "gtcpserver.supervisor.Program": """
import socket, sys
sys.path.insert(0, ".")
server, hooks = program.build([socket.create_server(("127.0.0.1", 0))])
sys.path.remove(".")
del sys.modules["app"]
""",
    "gtcpserver.supervisor.WorkersCannotStart": "gtcpserver.run = replaced",
    "gtcpserver.supervisor.CannotStart": """
try:
    started(None)
except CannotStart as error:
    assert error.status == 2
""",
}
