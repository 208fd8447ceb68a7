"""gtcpserver ctl connections and ctl end: the open connections of all workers, by user, client and destination."""

import json
import socket
import subprocess
import time

import pytest
from click.testing import CliRunner

from gtcpserver.cli.ctl import ctl as command_group
from kit.patience import SOON
from kit.supervised import COMMAND, wait_until

APP = '''
import os

def handler(conn):
    """The first line is the user and where it goes."""
    user, where = conn.recv_until(b"\\n").decode().split()
    conn.log_fields.update(user=user, destination=where)
    conn.sendall(b"%d\\n" % os.getpid())
    while data := conn.recv(100):
        conn.sendall(data)
'''


def ctl(master, *arguments):
    done = CliRunner().invoke(command_group, ["--control", master.control, *arguments])
    return done.exit_code, done.output


@pytest.fixture
def master(start):
    return start("--workers", "2", app=APP).wait_listening()


def shown(master, *arguments):
    status, out = ctl(master, "connections", "--json", *arguments)
    assert status == 0, out
    return json.loads(out)


@pytest.mark.slow
def test_connections_of_all_workers_can_be_seen_and_ended(master):
    socks = [open_one(master, f"{user} {where}") for user in ("ada", "eve") for where in ("a.test:443", "10.0.0.1:22")]
    found = shown(master)
    assert (found["found"], found["missing"]) == (4, [])
    rows = found["connections"]
    assert len({row["id"] for row in rows}) == 4
    assert {row["client"] for row in rows} == {f"127.0.0.1:{sock.getsockname()[1]}" for sock in socks}
    assert sorted((row["user"], row["destination"]) for row in rows) == [
        ("ada", "10.0.0.1:22"),
        ("ada", "a.test:443"),
        ("eve", "10.0.0.1:22"),
        ("eve", "a.test:443"),
    ]
    assert all(row["bytes_received"] > 5 and row["bytes_sent"] > 1 and row["age"] >= 0 for row in rows)
    assert {row["listener"] for row in rows} == {f"127.0.0.1:{master.port}"}
    for option, number in {
        ("--user", "ada"): 2,
        ("--user", "nobody"): 0,
        ("--client", "127.0.0.0/8"): 4,
        ("--client", "10.0.0.0/8"): 0,
        ("--destination", "a.test"): 2,
        ("--destination", "A.test:443"): 2,
        ("--destination", ".test"): 2,
        ("--destination", "a.test:80"): 0,
        ("--user", "ada", "--destination", "10.0.0.1"): 1,
    }.items():
        assert shown(master, *option)["found"] == number, option
    # For people.
    status, out = ctl(master, "connections", "--user", "eve", "--rate")
    assert status == 0
    assert out.splitlines()[0].split() == (
        ["id", "client", "user", "listener", "destination", "upstream", "age", "received", "sent", "rate"]
    )
    assert len(out.splitlines()) == 3
    # The end of some of them, and of none of the others.
    assert ctl(master, "end", "--user", "ada", "--destination", "a.test") == (0, "ended 1 connection\n")
    assert ctl(master, "end", rows[-1]["id"]) == (0, "ended 1 connection\n")
    wait_until(lambda: shown(master)["found"] == 2)
    ended = [sock for sock in socks if is_over(sock)]
    assert len(ended) == 2
    assert ctl(master, "end", rows[-1]["id"]) == (1, "ended 0 connections\n")
    assert ctl(master, "end", "--client", "127.0.0.1")[1] == "ended 2 connections\n"
    for sock in socks:
        sock.close()


def open_one(master, text):
    sock = master.connect()
    sock.sendall(f"{text}\n".encode())
    assert sock.recv(100)
    return sock


def is_over(sock):
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        sock.settimeout(SOON)


@pytest.mark.slow
def test_mistakes_are_told(master):
    for arguments, said in {
        ("end",): "say which connections",
        ("connections", "--client", "here"): "client must be an address or a network, got 'here'",
        ("end", "--client", "127.0.0.1/8"): "client must be an address or a network",
    }.items():
        status, out = ctl(master, *arguments)
        assert status == 2
        assert said in out
    # As other programs may ask.
    for request, said in (
        ({"command": "end"}, "end needs"),
        ({"command": "connections", "user": 5}, "user must be a text, got 5"),
        ({"command": "end", "ids": "x"}, "ids must be a list of texts, got 'x'"),
        ({"command": "connections", "client": "nowhere"}, "client must be"),
    ):
        with pytest.raises(Exception, match=said):
            master.ask(request.pop("command"), **request)


@pytest.mark.slow
def test_the_proxy_tells_users_and_destinations(start, tmp_path):
    origin = socket.create_server(("127.0.0.1", 0))
    port = origin.getsockname()[1]
    (tmp_path / "users").write_text("ada:pw\n")
    (tmp_path / "users").chmod(0o600)
    (tmp_path / "proxy.toml").write_text(
        '[[listener]]\nname = "office"\nlisten = "127.0.0.1:0"\n[rules]\ndestinations = ["allow loopback"]\n'
    )
    command = [*COMMAND, "proxy", "--config", "proxy.toml", "--workers", "1", "--control", "ctl"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "listening on" not in (line := process.stderr.readline()):
                assert line
            where = ("127.0.0.1", int(line.partition("127.0.0.1:")[2].split()[0].rstrip(",")))
            client = socket.create_connection(where, SOON)
            client.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\x01" + port.to_bytes(2, "big"))
            assert client.recv(2) == b"\x05\x00"
            assert client.recv(10)[1] == 0

            def ask(*arguments):
                asked = [*COMMAND, "ctl", "--control", str(tmp_path / "ctl"), *arguments]
                return subprocess.run(asked, capture_output=True, text=True, timeout=SOON, check=True).stdout

            row = json.loads(ask("connections", "--json"))["connections"][0]
            assert (row["listener"], row["destination"]) == ("office", f"127.0.0.1:{port}")
            assert ask("end", "--destination", f"127.0.0.1:{port}") == "ended 1 connection\n"
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            began = time.monotonic()
            while 'result=stopped detail="by ctl end"' not in (line := process.stderr.readline()):
                assert line
                assert time.monotonic() < began + SOON
        finally:
            client.close()
            origin.close()
            process.terminate()
            process.communicate()
