"""The examples that use drivers, against the real servers: what they answer, and that their waits overlap.

That they overlap is counted by the servers: how many handlers wait there at one moment.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from kit.examples import run_example
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.supervised import wait_until
from kit.waiting import wait_for_port

pymysql = pytest.importorskip("pymysql")
redis = pytest.importorskip("redis")


def program(name):
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"not installed: {name}")
    return path


@pytest.fixture
def run():
    """`run(command)` starts a program, which is killed after the test."""
    processes = []

    def run(*command):
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def connecting(connect_to, process):
    """What `connect_to()` returns when the program lets it in."""

    def attempt():
        assert process.poll() is None, f"{process.args} has ended"
        try:
            return connect_to()
        except (pymysql.Error, redis.RedisError):
            return None

    return wait_until(attempt)


# -- redis -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(run, tmp_path):
    """A redis of its own, and a connection to it."""
    path = tmp_path / "redis"
    process = run(
        program("redis-server"), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)
    )

    def connect_to():
        found = redis.Redis(unix_socket_path=str(path))
        found.ping()
        return found

    with connecting(connect_to, process) as found:
        found.url, found.process = f"unix://{path}", process
        yield found


@pytest.mark.slow
def test_fifty_handlers_wait_in_redis_at_once(start, connect, queue):
    example = start("redis_queue.py", env={"REDIS_URL": queue.url}, LONGEST_WAIT=30)
    clients = [connect(example) for _ in range(50)]
    for client in clients:
        client.send("TAKE")
    wait_until(lambda: queue.info("clients")["blocked_clients"] == 50)
    sender = connect(example)
    sender.send(*(f"PUT number {number}" for number in range(50)))
    assert {client.read() for client in clients} == {f"TOOK number {number}" for number in range(50)}
    sender.rest()
    example.stop()


@pytest.mark.slow
def test_a_queue_that_is_empty_and_a_redis_that_goes_away_are_told(start, connect, queue):
    example = start("redis_queue.py", env={"REDIS_URL": queue.url}, LONGEST_WAIT=1)
    client = connect(example)
    client.send("PUT one", "PUT two", "TAKE", "TAKE", "TAKE")
    assert [client.read() for _ in range(5)] == ["QUEUED 1", "QUEUED 2", "TOOK one", "TOOK two", "NONE"]
    queue.process.kill()
    queue.process.wait()
    client.send("PUT three")
    assert client.read().startswith("ERROR ")
    client.close()
    example.stop()


# -- a database --------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(run, tmp_path):
    """A MariaDB of its own: a connection to it, and the file that names it to clients."""
    path = tmp_path / "mariadb"
    process = run(
        *(program("mariadbd"), "--no-defaults", f"--datadir={tmp_path}", f"--socket={path}", "--skip-networking"),
        *("--skip-grant-tables", f"--pid-file={tmp_path}/pid", f"--log-error={tmp_path}/log"),
        *("--connect-timeout=60",),  # on a busy machine 10 s are too short for 50 at once
        *("--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M", *(["--user=root"] if os.getuid() == 0 else [])),
    )
    with connecting(lambda: pymysql.connect(unix_socket=str(path), autocommit=True), process) as found:
        with found.cursor() as cursor:
            cursor.execute("CREATE DATABASE example")
            cursor.execute("USE example")
        (tmp_path / "my.cnf").write_text(f"[client]\nsocket={path}\ndatabase=example\n")
        yield found, str(tmp_path / "my.cnf")


@pytest.mark.slow
def test_what_is_written_is_read_and_a_late_answer_is_nobodys(start, connect, database):
    connection, path = database
    example = start("database.py", env={"MY_CNF": path}, POOL_SIZE=1, ANSWER_TIMEOUT=1)
    earlier = client = connect(example)
    client.send("ADD hello", "ADD it's \u00fc \U0001f600; DROP TABLE notes", "GET 2", "GET 1", "GET 3", "GET x")
    assert [client.read() for _ in range(5)] == [
        "ADDED 1",
        "ADDED 2",
        "NOTE it's \u00fc \U0001f600; DROP TABLE notes",
        "NOTE hello",
        "NONE",
    ]
    assert client.read() == "ERROR expected ADD text or GET number"
    busy = client = connect(example)
    with connection.cursor() as cursor:
        cursor.execute("LOCK TABLES notes WRITE")
        client.send("GET 1")
        assert client.read().startswith("ERROR ")
        cursor.execute("UNLOCK TABLES")
    client = connect(example)
    client.send("GET 2")
    assert client.read() == "NOTE it's \u00fc \U0001f600; DROP TABLE notes"
    earlier.close()
    busy.close()
    example.stop()


@pytest.mark.slow
def test_fifty_handlers_wait_in_the_database_at_once_and_no_more(start, connect, database):
    connection, path = database
    example = start("database.py", env={"MY_CNF": path})
    clients = [connect(example) for _ in range(60)]
    clients[0].send("ADD hello")
    assert clients[0].read() == "ADDED 1"
    with connection.cursor() as cursor:

        def waiting():
            cursor.execute("SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE 'SELECT text%'")
            return cursor.fetchone()[0]

        cursor.execute("LOCK TABLES notes WRITE")
        for client in clients:
            client.send("GET 1")
        wait_until(lambda: waiting() == 50)
        cursor.execute("SELECT COUNT(*) FROM information_schema.processlist")
        assert cursor.fetchone()[0] == 51  # and ours: ten handlers wait for a connection
        cursor.execute("UNLOCK TABLES")
    assert [client.read() for client in clients] == ["NOTE hello"] * 60
    example.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variable", "value", "message"),
    [
        ("redis_queue.py", "REDIS_URL", "redis://127.0.0.1:1", "no redis at redis://127.0.0.1:1: "),
        ("database.py", "MY_CNF", "{}/my.cnf", "no database as in "),
    ],
)
def test_a_server_that_is_missing_is_one_line_and_exit_status_1(name, variable, value, message, tmp_path):
    (tmp_path / "my.cnf").write_text(f"[client]\nsocket={tmp_path}/none\n")
    done = run_example(name, "127.0.0.1:0", **{variable: value.format(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# -- a web server ------------------------------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;
events {{ }}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port}; root {folder}/www;
        location /slow/ {{ proxy_pass http://127.0.0.1:{origin}; }}
    }}
}}
"""


class Origin:
    """Answers nobody before `number` requests are here at once."""

    def __init__(self, number):
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.sock.getsockname()[1]
        self.number = number
        self.most = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        waiting = []
        while len(waiting) < self.number:
            try:
                client, _ = self.sock.accept()
            except OSError:  # the test has ended
                return
            client.settimeout(SOON)
            client.recv(4096)
            waiting.append(client)
            self.most = len(waiting)
        for client in waiting:
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            client.close()

    def close(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


@pytest.fixture
def web(run, tmp_path):
    """An nginx: its URL, and the origin behind it."""
    nginx = program("nginx")
    port, origin = free_port(), Origin(50)
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page").write_bytes(b"x" * 200_000)
    user = "user root; " if os.getuid() == 0 else ""
    (tmp_path / "conf").write_text(user + NGINX.format(folder=tmp_path, port=port, origin=origin.port))
    process = run(nginx, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "log"))
    wait_for_port(port, process)
    yield f"http://127.0.0.1:{port}", origin
    origin.close()


@pytest.mark.slow
def test_fifty_handlers_wait_for_nginx_at_once(start, connect, web):
    url, origin = web
    example = start("requests_client.py", env={"BACKEND": url})
    clients = [connect(example) for _ in range(50)]
    for client in clients:
        client.send("/slow/page")
    assert [client.read() for client in clients] == ["200 5 bytes"] * 50
    assert origin.most == 50
    clients[0].send("/page", "/none", "page")
    assert clients[0].read() == "200 200000 bytes"
    assert clients[0].read().startswith("404 ")
    assert clients[0].read() == "ERROR expected a path that begins with a slash, got 'page'"
    clients[0].close()
    example.stop()


@pytest.mark.slow
def test_a_web_server_that_is_missing_is_told_to_clients(start, connect):
    example = start("requests_client.py", env={"BACKEND": "http://127.0.0.1:1"})
    client = connect(example)
    client.send("/")
    assert "Connection refused" in client.read()
    client.close()
    example.stop()


def test_all_of_them_are_told_of_in_the_docs():
    text = ROOT.joinpath("docs", "blocking.md").read_text()
    for name in ("redis_queue.py", "database.py", "requests_client.py", "cpu_work.py", "blocking_code.py"):
        assert name in text


@pytest.mark.slow
def test_the_code_in_the_docs_runs():
    text = ROOT.joinpath("docs", "blocking.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    program = "\n".join(f"exec({block!r}, {{}})" for block in blocks)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d+ times, [\d.]+ seconds\n", done.stdout)
