"""TLS sessions are resumed by any worker, also after a reload, an upgrade and a change of keys.

GTCPSERVER_RECONNECTS=100 makes that many connections after each of these, by each client, to 4 workers.
"""

import os
import ssl
import subprocess

import pytest

from kit.patience import SOON
from kit.programs import needs
from kit.supervised import upgrade, wait_until
from kit.tls import Files, client_context

RECONNECTS = int(os.environ.get("GTCPSERVER_RECONNECTS", "4"))
WORKERS = 4 if RECONNECTS >= 100 else 2

APP = """
import os
def handler(conn):
    conn.sendall(f"{os.getpid()} {'resumed' if conn.tls.session_reused else 'new'}\\n".encode())
"""

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@pytest.fixture
def serve_tls(start, tmp_path):
    """`serve_tls(*arguments)`: a master with a certificate."""
    certfile, keyfile = Files(tmp_path).issue("server", "localhost")
    options = ("--workers", str(WORKERS), "--probation", "0", "--tls-certfile", certfile, "--tls-keyfile", keyfile)
    return lambda *arguments: start(*options, *arguments, app=APP)


class OpenSSL:
    """`openssl s_client`, with its session in a file."""

    def __init__(self, version, folder):
        self._command = ["openssl", "s_client", f"-tls{version.replace('.', '_')}", "-ign_eof", "-quiet"]
        self._session = str(folder / "session.pem")
        self._command += ["-sess_out", self._session]

    def talk(self, master):
        command = [*self._command, "-connect", f"127.0.0.1:{master.port}"]
        if os.path.exists(self._session):
            command += ["-sess_in", self._session]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=SOON
        )
        return done.stdout.decode().split()


class Python:
    """The ssl module, with its session in memory."""

    def __init__(self, version, folder):
        self._context = client_context(version=VERSIONS[version])
        self._session = None

    def talk(self, master):
        with (
            master.connect() as sock,
            self._context.wrap_socket(sock, server_hostname="localhost", session=self._session) as client,
        ):
            said = client.recv(100).decode().split()
            self._session = client.session
        return said


@needs("openssl")
def test_any_worker_resumes_sessions_whatever_happens(serve_tls, tmp_path):
    master = serve_tls()
    clients = []
    for version in VERSIONS:
        (tmp_path / version).mkdir()
        clients += [program(version, tmp_path / version) for program in (Python, OpenSSL)]
    assert [client.talk(master)[1] for client in clients] == ["new"] * len(clients)
    workers = set()

    def reconnect():
        for client in clients:
            said = [client.talk(master) for _ in range(RECONNECTS)]
            workers.update(worker for worker, _ in said)
            assert [word for _, word in said].count("resumed") >= 0.95 * RECONNECTS

    reconnect()
    assert master.ask("reload") == {"ok": True}
    reconnect()
    upgrade(master)
    reconnect()
    assert master.ask("rotate-tickets") == {"ok": True}
    reconnect()
    assert len(workers) > WORKERS
    assert master.ask("rotate-tickets") == {"ok": True}
    assert master.ask("rotate-tickets") == {"ok": True}
    assert [client.talk(master)[1] for client in clients] == ["new"] * len(clients)
    assert "can only be resumed by the worker" not in master.log()
    assert master.stop() == 0


@needs("curl")
def test_curl_resumes_its_session_on_any_worker(serve_tls):
    # With TLS 1.2 it refuses tickets (SSL_OP_NO_TICKET), so that only the worker that made a session knows it.
    master = serve_tls()
    # Each answer ends with the connection. curl forgets sessions when it ends, unless it is told to keep them (8.12).
    urls = f"https://localhost:{master.port}/[1-{5 * RECONNECTS}]"
    command = ["curl", "--silent", "--insecure", "--http0.9", "--ipv4", "--tlsv1.3", urls]
    said = subprocess.run(command, stdout=subprocess.PIPE, timeout=SOON).stdout.decode().split()
    assert len(said) == 10 * RECONNECTS
    assert said[1::2].count("resumed") >= 0.95 * (5 * RECONNECTS - 1)
    assert len(set(said[::2])) > 1  # workers
    assert master.stop() == 0


def test_keys_are_changed_while_it_runs(serve_tls, tmp_path):
    master = serve_tls("--rotate-tickets", "0.001")
    client = Python("1.3", tmp_path)
    client.talk(master)
    # The master does it once a second: after two of them the first session is void.
    first = client._session  # noqa: SLF001

    def talk_with_the_first():
        client._session = first  # noqa: SLF001
        return client.talk(master)[1]

    wait_until(lambda: talk_with_the_first() == "new")
    assert master.stop() == 0
