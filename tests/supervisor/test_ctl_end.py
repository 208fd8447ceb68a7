"""gtcpserver ctl end: as many IDs as a command line takes, and clients however they are spelled."""

import json
import socket
import threading

import pytest
from click.testing import CliRunner

from gtcpserver import ConfigError
from gtcpserver.cli.ctl import IDS_AT_ONCE
from gtcpserver.cli.ctl import ctl as command_group
from gtcpserver.monitoring.selection import Selection, end, rows_of
from gtcpserver.supervisor.control import MAX_REQUEST, ControlError, ask
from kit.handlers import echo
from kit.waiting import wait_until


@pytest.fixture
def master(tmp_path):
    """`master(answer)` is the path of a control socket that answers each request by this; its `requests`."""
    path = str(tmp_path / "control")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(100)
    requests = []

    def serve(answer):
        while True:
            try:
                sock = listening.accept()[0]
            except OSError:
                return
            with sock, sock.makefile("rb") as lines:
                line = lines.readline(MAX_REQUEST + 1)
                assert line.endswith(b"\n")
                requests.append(json.loads(line))
                sock.sendall(json.dumps(answer(requests[-1])).encode() + b"\n")

    def start(answer):
        threading.Thread(target=serve, args=[answer], daemon=True).start()
        return path, requests

    yield start
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def ctl(path, *arguments):
    done = CliRunner().invoke(command_group, ["--control", path, *arguments])
    return done.exit_code, done.output


def test_60_000_connections_are_ended_by_their_ids(master):
    path, requests = master(lambda request: {"ok": True, "ended": len(request["ids"]), "missing": [1, 0]})
    ids = [f"4194303.{number}.ffffffff" for number in range(60_000)]
    status, out = ctl(path, "end", *ids)
    assert out.startswith("ended 60000 connections\n")
    assert status == 1  # workers are missing
    assert [one for request in requests for one in request["ids"]] == ids
    assert len(requests) == 60_000 / IDS_AT_ONCE


def test_what_is_no_id_is_told(master):
    path, requests = master(lambda request: {"ok": True})
    status, out = ctl(path, "end", "1.2.ff", "x" * 100_000)
    assert status == 2
    assert "ID: must be as `connections` prints them, got 'xxx" in out
    assert not requests


def test_a_refusal_is_heard_even_if_the_master_has_closed(tmp_path):
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def refuse():
            with listening.accept()[0] as sock:
                sock.recv(10)
                sock.sendall(b'{"error": "too long"}\n')

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(ControlError, match="too long"):
            ask(path, {"command": "x" * 3_000_000}, 10)
        thread.join()


@pytest.mark.parametrize("client", ["127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:127.0.0.0/104"])
def test_a_client_is_found_however_it_is_spelled(serve, connect, client):
    server = serve(echo)
    connect(server)
    wait_until(lambda: server.active_connections)
    assert rows_of(server, Selection.of({"client": client}), 10)[1] == 1
    assert rows_of(server, Selection.of({"client": "::ffff:10.0.0.0/104"}), 10)[1] == 0


def test_ids_and_the_rest_of_a_selection_both_count(serve, connect):
    server = serve(echo)
    for _ in range(2):
        connect(server)
    wait_until(lambda: server.active_connections == 2)
    ids = [row["id"] for row in rows_of(server, Selection(), 10)[0]]
    assert end(server, Selection.of({"ids": ids[:1], "client": "10.0.0.1"})) == 0
    assert end(server, Selection.of({"ids": ids[:1], "client": "127.0.0.1"})) == 1
    wait_until(lambda: server.active_connections == 1)


@pytest.mark.parametrize("client", ["x", "10.0.0.1/8", "fe80::1%eth0"])
def test_what_is_no_network(client):
    with pytest.raises(ConfigError, match="client must be an address or a network, got"):
        Selection.of({"client": client})
