"""Workers of another user, and files that only root may open: the master lends them, at the start and later."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from gtcpserver.proxy.passwords import hash_password
from kit.patience import SOON
from kit.supervised import Master, wait_until

USER = "nobody"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can have workers of another user"),
]

APP = """
import os

from gtcpserver.files import lent as lent_files

def borrow(path):
    try:
        fd = lent_files.borrow(path)
    except OSError as error:
        return error.strerror
    os.close(fd)
    return "lent"

def handler(conn):
    path = conn.recv_until(b"\\n").decode().strip()
    lender = lent_files._lender
    lender._names.add(path)  # a worker that was taken over does not ask itself
    lender._channel.send("names", read=[path], append=[path])
    conn.sendall(borrow(path).encode() + b"\\n")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the workers' user may enter; in it is `secret`, which he may not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "secret").mkdir(mode=0o700)
        yield Path(name)


@pytest.fixture
def secret(folder: Path) -> Path:
    return folder / "secret"


class Authority:
    """Issues certificates into a folder, in place of the last ones, as certbot does."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        self.folder = folder
        self.client = ssl.create_default_context()
        self.ca.configure_trust(self.client)
        self.client.check_hostname = False

    def issue(self, name: str) -> None:
        made = self.ca.issue_cert(name)
        for file, blobs in (("key.pem", [made.private_key_pem]), ("cert.pem", made.cert_chain_pems)):
            new = self.folder / f"{file}.new"
            new.touch(mode=0o600)
            new.write_bytes(b"".join(blob.bytes() for blob in blobs))
            os.replace(new, self.folder / file)

    def served(self, port: int, said: bytes = b"") -> str:
        """The name in the certificate that a server shows."""
        with socket.create_connection(("127.0.0.1", port), SOON) as raw, self.client.wrap_socket(raw) as client:
            client.sendall(said)
            certificate = client.getpeercert()
            assert certificate is not None
            return str(certificate["subjectAltName"][0][1])


@pytest.fixture
def authority(secret: Path) -> Authority:
    made = Authority(secret)
    made.issue("first.example")
    return made


@pytest.fixture
def start(folder: Path) -> Iterator[object]:
    masters: list[Master] = []

    def start(*arguments: str, log: Path | None = None) -> Master:
        masters.append(Master(folder, (*arguments, "--control", str(folder / "ctl"))))
        if log is not None:
            wait_until(log.exists)
            masters[-1].log_path = log
        return masters[-1].wait_listening()

    yield start
    for master in masters:
        master.kill_all()


def uids(pid: int) -> str:
    return re.findall(r"^Uid:\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M)[0]


def opened_by(pid: int) -> list[str]:
    folder, found = Path(f"/proc/{pid}/fd"), []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            found.append(os.readlink(folder / name))
    return found


def tls_options(secret: Path) -> tuple[str, ...]:
    return ("--tls-certfile", str(secret / "cert.pem"), "--tls-keyfile", str(secret / "key.pem"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_and_logs_of_root_s_are_used_by_workers_that_are_not_root(start, folder, secret, authority, workers):
    access = secret / "access.log"
    settings = folder / "settings.toml"
    settings.write_text('tls.certfile = "secret/cert.pem"\ntls.keyfile = "secret/key.pem"\ntls.watch = 0.1\n')
    os.chmod(settings, 0o600)
    master = start(
        *("echo", "--config", str(settings), "--bind", "127.0.0.1:0", "--workers", workers, "--user", USER),
        *("--access-log-file", str(access), "--log-file", str(secret / "log"), "--pid-file", str(secret / "pid")),
        log=secret / "log",
    )
    nobody = str(pwd.getpwnam(USER).pw_uid)
    for pid in master.pids():
        assert uids(pid).split() == [nobody] * 4
    assert uids(master.pid).split() == ["0"] * 4
    assert authority.served(master.port) == "first.example"
    wait_until(lambda: "result=" in access.read_text())

    # Renamed, as logrotate does it, without another word.
    access.rename(secret / "access.log.1")
    wait_until(lambda: all(str(access) in opened_by(pid) for pid in master.pids()))
    before = (secret / "access.log.1").read_text()
    authority.served(master.port)
    wait_until(lambda: "result=" in access.read_text())
    assert (secret / "access.log.1").read_text() == before

    # The same of the log, with the signal for it.
    (secret / "log").rename(secret / "log.1")
    master.send_signal(signal.SIGUSR1)
    wait_until(lambda: (secret / "log").exists())
    master.wait_for("reopened")

    # Replaced, and seen by --tls-watch.
    authority.issue("second.example")
    master.wait_for("TLS certificates reloaded", int(workers))
    assert {authority.served(master.port) for _ in range(8)} == {"second.example"}

    # Read again by new workers.
    settings.write_text('tls.certfile = "secret/cert.pem"\ntls.keyfile = "secret/key.pem"\n')
    authority.issue("third.example")
    master.send_signal(signal.SIGHUP)
    master.wait_for("reload 1 is done")  # workers that start meanwhile must not find the next key with this certificate
    wait_until(lambda: {authority.served(master.port) for _ in range(8)} == {"third.example"})
    # And by another master.
    authority.issue("fourth.example")
    master.settled(int(workers))
    master.ask("upgrade")
    master.pid = int((secret / "pid").read_text())
    wait_until(lambda: {authority.served(master.port) for _ in range(8)} == {"fourth.example"})
    assert "ERROR" not in master.log()
    assert "WARNING" not in master.log()


def test_a_key_that_cannot_be_had_any_more_leaves_the_old_certificate(start, secret, authority):
    master = start(
        *("echo", "--bind", "127.0.0.1:0", "--workers", "1", "--user", USER, *tls_options(secret)),
        *("--tls-watch", "0.1"),
    )
    os.chown(secret, 12345, 12345)
    authority.issue("second.example")
    message = master.wait_for("TLS certificates have changed and cannot be used.*")
    assert "the old ones stay: " in message
    assert "refused, since this process is root" in message
    assert authority.served(master.port) == "first.example"
    # The same at a reload: it fails, and the old workers go on.
    with pytest.raises(Exception, match="refused, since this process is root"):
        master.ask("reload")
    assert authority.served(master.port) == "first.example"
    os.chown(secret, 0, 0)
    wait_until(lambda: authority.served(master.port) == "second.example")


def test_client_cas_in_a_folder_of_root_s(start, folder, secret, authority):
    (secret / "trusted").mkdir(mode=0o700)
    authority.ca.cert_pem.write_to_path(secret / "trusted/ca.pem")
    os.chmod(secret / "trusted/ca.pem", 0o600)
    master = start(
        *("echo", "--bind", "127.0.0.1:0", "--workers", "1", "--user", USER, *tls_options(secret)),
        *("--tls-client-auth", "required", "--tls-client-ca", str(secret / "trusted")),
    )
    authority.ca.issue_cert("client.example").configure_cert(authority.client)
    assert authority.served(master.port, b"hello") == "first.example"


def test_a_self_signed_certificate_of_the_master_s(start):
    master = start("echo", "--bind", "127.0.0.1:0", "--workers", "1", "--user", USER, "--tls-self-signed")
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", master.port), SOON) as raw, client.wrap_socket(raw) as tls:
        tls.sendall(b"hello")
        assert tls.recv(5) == b"hello"


def test_what_was_not_named_as_root_is_not_lent(start, folder, secret, authority):
    (folder / "app.py").write_text(APP)
    (secret / "other").write_text("x")
    master = start(
        *("serve", "app:handler", "--bind", "127.0.0.1:0", "--workers", "1", "--user", USER),
        *("--access-log-file", str(secret / "access.log")),
    )

    def borrowed(path: object) -> str:
        with master.connect() as client:
            client.sendall(f"{path}\n".encode())
            return client.makefile().readline().strip()

    assert borrowed(secret / "access.log") == "lent"
    for path in (secret / "other", secret, "/etc/shadow", "/", ""):
        assert borrowed(path) == "Permission denied"
    assert borrowed(secret / "access.log") == "lent"
    assert "WARNING" not in master.log()


def test_a_proxy_s_files(start, folder, secret, authority):
    (secret / "users").write_text(f"ada:{hash_password(b'secret')}\n")
    config = folder / "proxy.toml"
    config.write_text(f"""
        [[listener]]
        listen = "127.0.0.1:0"
        tls_certfile = "{secret}/cert.pem"
        tls_keyfile = "{secret}/key.pem"
        [auth.file]
        htpasswd = "{secret}/users"
        [rules]
        clients = ["allow from any to any with auth file"]
        [log]
        file = "{secret}/access.log"
        """)
    for path in (config, secret / "users"):
        os.chmod(path, 0o600)
    master = start("proxy", "--config", str(config), "--workers", "1", "--worker-user", USER)

    def authenticate(password: bytes) -> bytes:
        raw = socket.create_connection(("127.0.0.1", master.port), SOON)
        with raw, authority.client.wrap_socket(raw) as client:
            client.sendall(b"\x05\x01\x02")
            assert client.recv(2) == b"\x05\x02"
            client.sendall(b"\x01\x03ada" + bytes([len(password)]) + password)
            return client.recv(2)

    assert authenticate(b"secret") == b"\x01\x00"
    (secret / "users").write_text(f"ada:{hash_password(b'another')}\n")
    wait_until(lambda: authenticate(b"another") == b"\x01\x00")
    wait_until(lambda: "ada" in (secret / "access.log").read_text())
    config.write_text(config.read_text().replace("secret}/users", "users"))
    master.ask("reload")
    assert authenticate(b"another") == b"\x01\x00"
    assert "ERROR" not in master.log()


def test_a_worker_loads_nothing_for_a_name_that_a_client_asks_for(folder):
    (folder / "app.py").write_text("""
import os, sys
import gevent.socket

imported = []

def started(worker):
    assert os.getuid()
    sys.addaudithook(lambda event, args: imported.append(args[0]) if event == "import" else None)

def handler(conn):
    gevent.socket.getaddrinfo("localhost", 80)
    conn.sendall(repr(imported).encode())
""")
    path = str(folder / "socket")  # an address in the place of the path has the master load it
    arguments = ("serve", "app:handler", "--bind", f"unix:{path}", "--workers", "1", "--user", USER)
    master = Master(folder, (*arguments, "--worker-start", "app:started"))
    try:
        master.wait_for("listening on")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SOON)
            client.connect(path)
            assert client.recv(1000) == b"[]"
    finally:
        master.kill_all()


def test_a_program_that_runs_workers_itself(folder, secret, authority):
    (folder / "program.py").write_text(f"""
import gtcpserver
from gtcpserver import AccessLog, TLSConfig

def handler(conn):
    conn.sendall(conn.recv(100))

gtcpserver.run(
    handler,
    "127.0.0.1:0",
    workers=1,
    user="{USER}",
    control="{folder}/ctl",
    tls=TLSConfig("{secret}/cert.pem", "{secret}/key.pem", watch=0.1),
    access_log=AccessLog("text", "{secret}/access.log"),
)
""")
    with subprocess.Popen([os.sys.executable, "program.py"], cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = next(
                int(found[1]) for line in process.stderr if (found := re.search(r"listening on .*:(\d+)", line))
            )
            assert authority.served(port) == "first.example"
            authority.issue("second.example")
            wait_until(lambda: authority.served(port) == "second.example")
            (secret / "access.log").rename(secret / "old.log")
            wait_until(lambda: (authority.served(port), (secret / "access.log").exists())[1])
            assert "result=" in (secret / "old.log").read_text()
        finally:
            process.terminate()
            process.communicate()
