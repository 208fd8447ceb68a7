"""The access log of a server: every way a connection can end is a line, and no client can forge one."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import AccessLog, ClientLimits, ConfigError, ProxyProtocol, TLSConfig
from gtcpserver.diagnostics.logs import JsonFormatter
from gtcpserver.server.access_log import MOST_DETAIL, write_line
from gtcpserver.server.outcome import Result
from kit.forms import pure_only
from kit.paths import ROOT
from kit.patience import SOON
from kit.waiting import wait_until

DOCS = (ROOT / "docs" / "logging.md").read_text()


def echo(conn):
    while data := conn.recv(100):
        conn.sendall(data)


def talk(in_thread, client, data=b""):
    """Send, end, and read until the server has closed."""

    def go():
        try:
            if data:
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(1000):
                pass
        except OSError:
            pass

    in_thread(go)


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_line_tells_what_a_connection_was(serve, connect, in_thread, access_records, style):
    server = serve(echo, access_log=style)
    client = connect(server)
    host, port = client.getsockname()
    talk(in_thread, client, b"hello")
    (record,) = access_records(1)
    fields = record.access
    assert fields["client"] == f"{host}:{port}"
    assert (fields["server"], fields["result"]) == (server.address, "ok")
    assert (fields["bytes_received"], fields["bytes_sent"]) == (5, 5)
    assert fields["balancer"] is fields["detail"] is fields["worker"] is None
    assert 0 <= fields["duration"] < SOON
    if style == "json":
        assert json.loads(record.getMessage()) == fields
    else:
        assert record.getMessage() == (
            f"client={host}:{port} server={server.address} result=ok bytes_received=5 bytes_sent=5 "
            f"duration={fields['duration']}"
        )


def reset(conn):
    conn.recv_exactly(10)


def limit(conn):
    conn.recv_until(b"\n", 3)


def deadline(conn):
    with conn.deadline(0.01):
        conn.recv(1)


def wait(conn):
    conn.recv(1)


def fail(conn):
    raise ZeroDivisionError("of\nthe client's" + "x" * 5000)


class Untellable(Exception):
    def __str__(self):
        raise ValueError("no text")


def fail_without_a_text(conn):
    raise Untellable


def close_itself(conn):
    conn.close()


@pytest.mark.parametrize(
    ("handler", "options", "result", "detail"),
    [
        (reset, {}, "reset", "EarlyEOF: "),
        (limit, {}, "limit", "LimitExceeded: no b'\\n' within 3 bytes"),
        (fail, {}, "error", "ZeroDivisionError: of\nthe client's"),
        (fail, {"on_error": lambda conn, error: None}, "error", "ZeroDivisionError"),
        (fail_without_a_text, {}, "error", "Untellable"),
        (close_itself, {}, "ok", None),
        (echo, {"on_connect": lambda conn: False}, "refused", None),
        (echo, {"on_disconnect": fail}, "error", "ZeroDivisionError"),
        (echo, {"client_limits": ClientLimits(deny=["127.0.0.0/8"])}, "client_denied", None),
        (echo, {"proxy_protocol": ProxyProtocol(["127.0.0.1"])}, "proxy_header", "invalid"),
    ],
)
def test_how_it_ended(serve, connect, in_thread, lines, handler, options, result, detail):
    server = serve(handler, access_log="text", **options)
    talk(in_thread, connect(server), b"hello")
    (fields,) = lines(1)
    assert fields["result"] == result
    assert fields["server"] == server.address
    assert (fields["detail"] or "").startswith(detail or "")
    assert (fields["detail"] is None) == (detail is None)
    assert len(fields["detail"] or "") <= MOST_DETAIL


@pytest.mark.parametrize(
    ("handler", "options", "result"),
    [
        (wait, {"timeout": 0.01}, "timeout"),
        (deadline, {}, "deadline"),
        (wait, {"handler_timeout": 0.01}, "handler_timeout"),
        (wait, {"min_rate": 1000, "min_rate_window": 0.04}, "slow"),
    ],
)
def test_a_client_that_is_silent(serve, connect, lines, handler, options, result):
    client = connect(serve(handler, access_log="text", **options))
    assert lines(1)[0]["result"] == result
    client.close()


@pytest.mark.slow
def test_the_end_of_a_server(serve, connect, in_thread, lines):
    begun = []

    def idle(conn):
        begun.append(conn)
        conn.sendall(conn.recv(10))
        with conn.idle():
            conn.recv(10)

    def busy(conn):
        begun.append(conn)
        conn.recv(10)

    for handler, result in ((idle, "idle_closed"), (busy, "stopped")):
        server = serve(handler, access_log="text")
        client = connect(server)
        in_thread(client.sendall, b"x") if handler is idle else None
        wait_until(lambda: begun)
        if handler is idle:
            assert in_thread(client.recv, 10) == b"x"
        server.stop(0)
        begun.clear()
        assert lines(1)[-1]["result"] == result


def test_one_too_many(serve, connect, in_thread, lines):
    server = serve(wait, access_log="text", pool=1, on_full="reject")
    connect(server)
    wait_until(lambda: server.active_connections)
    talk(in_thread, connect(server))
    (fields,) = lines(1)
    assert (fields["result"], fields["server"]) == ("rejected", server.address)
    assert fields["client"].startswith("127.0.0.1:")


def test_tls_and_the_clients_certificate(serve, connect, in_thread, lines, tmp_path):
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("a.example.com"), authority.issue_cert("ada@example.com", common_name='A"d a')
    ours.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    theirs.private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    config = TLSConfig(tmp_path / "server.pem", client_auth="required", client_ca=tmp_path / "ca.pem", alpn=["h2"])
    server = serve(echo, access_log="text", tls=config)
    context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    context.load_cert_chain(tmp_path / "client.pem")
    context.set_alpn_protocols(["h2"])

    def go():
        with context.wrap_socket(connect(server), server_hostname="a.example.com") as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"

    in_thread(go)
    (fields,) = lines(1)
    wanted = {"tls": "TLSv1.3", "server_name": "a.example.com", "alpn": "h2", "certificate": 'A"d a', "result": "ok"}
    assert {name: fields[name] for name in wanted} == wanted
    talk(in_thread, connect(server), b"GET / HTTP/1.1\r\n\r\n")
    assert (lines(2)[1]["result"], lines(2)[1]["detail"]) == ("handshake_failed", "http_request")


def test_a_client_that_came_by_a_balancer(serve, connect, in_thread, lines):
    client = connect(serve(echo, access_log="text", proxy_protocol=ProxyProtocol(["127.0.0.1"])))
    balancer = "{}:{}".format(*client.getsockname())
    talk(in_thread, client, b"PROXY TCP4 192.0.2.7 192.0.2.1 4000 80\r\nhello")
    (fields,) = lines(1)
    assert (fields["client"], fields["balancer"], fields["bytes_received"]) == ("192.0.2.7:4000", balancer, 5)


def test_a_unix_socket(serve, connect, in_thread, lines, tmp_path):
    talk(in_thread, connect(serve(echo, f"unix:{tmp_path}/s", access_log="text")))
    assert (lines(1)[0]["client"], lines(1)[0]["server"]) == ("unix:", f"unix:{tmp_path}/s")


# -- fields of the handler's own, and forgery --------------------------------------------------------------------------


def test_a_handler_adds_fields_and_cannot_change_ours(serve, connect, in_thread, access_records):
    def handler(conn):
        conn.log_fields["user"] = 'ada" result=ok\nx'
        conn.log_fields["client"] = "somebody else"
        conn.close()
        conn.log_fields["later"] = 5

    talk(in_thread, connect(serve(handler, access_log="text")))
    (record,) = access_records(1)
    assert record.access["client"].startswith("127.0.0.1:")
    assert record.getMessage().endswith(r' user="ada\" result=ok\nx" later=5')


def test_a_field_that_json_has_not_is_printed(serve, connect, in_thread, access_records):
    def handler(conn):
        conn.log_fields.update(pairs={(1, 2): 3}, path=Path("/x"))

    talk(in_thread, connect(serve(handler, access_log="json")))
    line = json.loads(access_records(1)[0].getMessage())
    assert (line["pairs"], line["path"], line["bytes_sent"]) == ({"(1, 2)": 3}, "/x", 0)


def test_a_handlers_fields_are_in_the_record_of_its_failure(serve, connect, in_thread, caplog):
    def handler(conn):
        conn.log_fields.update(user="ada", error="not ours", name="a record has that itself")
        raise KeyError("x")

    client = connect(serve(handler))
    address = "{}:{}".format(*client.getsockname())
    talk(in_thread, client)
    record = wait_until(lambda: next((one for one in caplog.records if "handler for" in one.message), None))
    fields = json.loads(JsonFormatter().format(record))
    assert (fields["client"], fields["error"], fields["user"]) == (address, "KeyError", "ada")
    assert (fields["logger"], fields["left_out"], fields["name_"]) == ("gtcpserver", 0, "a record has that itself")
    assert "Traceback" in fields["exception"]


WORD = re.compile(r'(?P<name>"(?:[^"\\]|\\.)*"|[^ "=\\]+)=(?P<value>"(?:[^"\\]|\\.)*"|[^ "=\\]*)(?: |$)')


@pytest.mark.slow
@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name != "time"), st.text(), min_size=1))
def test_whatever_is_in_a_line_can_be_read_back(fields):
    written = []
    log = logging.Logger("a test")
    log.addHandler(handler := logging.Handler())
    handler.emit = lambda record: written.append(record.getMessage())
    write_line(log, fields, "text")
    (line,) = written
    assert line.isascii()
    assert line.isprintable()
    plain = lambda word: json.loads(word) if word.startswith('"') else word  # noqa: E731
    assert {plain(word["name"]): plain(word["value"]) for word in WORD.finditer(line)} == fields
    assert "".join(word[0] for word in WORD.finditer(line)) == line


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_renamed_is_reopened(serve, connect, in_thread, tmp_path):
    path = tmp_path / "access.log"
    server = serve(echo, access_log=AccessLog("json", path))
    for number in range(3):
        talk(in_thread, connect(server))
        wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
        assert [json.loads(line)["result"] for line in path.read_text().splitlines()] == ["ok"]
        path.rename(tmp_path / f"old.{number}")
    assert os.stat(tmp_path / "old.0").st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_reopened_is_kept(serve, connect, in_thread, tmp_path, caplog):
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "access.log"
    server = serve(echo, access_log=AccessLog("text", path))
    (tmp_path / "logs").rename(tmp_path / "moved")
    talk(in_thread, connect(server))
    kept = tmp_path / "moved" / "access.log"
    wait_until(lambda: kept.read_text().endswith("\n"))
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00 client=127.0.0.1:\d+ server=", kept.read_text())
    assert "cannot reopen the access log" in caplog.text


def test_a_full_disk_costs_lines_and_no_connections(serve, connect, in_thread, caplog):
    server = serve(echo, access_log=AccessLog("text", "/dev/full"))
    for _ in range(3):
        client = connect(server)
        in_thread(client.sendall, b"hello")
        assert in_thread(client.recv, 10) == b"hello"
        talk(in_thread, client)
    wait_until(lambda: "No space left on device" in caplog.text)
    assert caplog.text.count("cannot write the access log") == 1


def test_a_pipe_that_nobody_reads_stops_nobody(serve, connect, in_thread, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot open the access log"):
        AccessLog("text", tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        access_log = AccessLog("text", tmp_path / "pipe")
        server = serve(lambda conn: conn.log_fields.update(long="x" * 10_000), access_log=access_log)
        for _ in range(20):
            talk(in_thread, connect(server))
        wait_until(lambda: server.accepted_connections == 20 and not server.active_connections)
    finally:
        os.close(reader)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match='access_log must be "text", "json" or an AccessLog, got \'xml\''):
        AccessLog("xml")
    with pytest.raises(ConfigError, match=f"cannot open the access log {tmp_path}: Is a directory"):
        AccessLog("text", tmp_path)


# -- off ---------------------------------------------------------------------------------------------------------------


@pure_only
def test_it_costs_nothing_when_it_is_off(serve, connect, in_thread, caplog):
    caplog.set_level(logging.INFO)
    server = serve(echo)
    assert server._serving._finish == server._serving._end
    talk(in_thread, connect(server), b"x")
    wait_until(lambda: server.accepted_connections and not server.active_connections)
    assert not [record for record in caplog.records if record.name == "gtcpserver.access"]


# -- the command, and the documentation --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_to_a_file_from_every_worker(tmp_path):
    path = tmp_path / "access.log"
    command = [sys.executable, "-m", "gtcpserver", "echo", "--bind", "127.0.0.1:0", "--workers", "2"]
    command += ["--access-log", "json", "--access-log-file", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(
                int(found[1]) for line in process.stderr if (found := re.search(r"listening on .*:(\d+)", line))
            )
            seen, number = set(), 0
            give_up = time.monotonic() + SOON
            while len(seen) < 2:
                with socket.create_connection(("127.0.0.1", port), SOON) as client:
                    client.sendall(b"hi")
                    assert client.recv(10) == b"hi"
                number += 1
                seen = {json.loads(line)["worker"] for line in path.read_text().split("\n")[:-1]}
                assert time.monotonic() < give_up
            process.send_signal(signal.SIGTERM)
            assert process.wait(SOON) == 0
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert seen == {0, 1}
            assert [line["result"] for line in lines] == ["ok"] * number
        finally:
            process.kill()


def test_the_example_of_a_span_a_connection_works(serve, connect, in_thread):
    (example,) = re.findall(r"```python\n(import time.*?)```", DOCS, re.DOTALL)
    names = {}
    exec(example, names)
    server = names["server"]
    server.start()
    try:
        talk(in_thread, connect(server), b"hello\n")
        talk(in_thread, connect(server), b"hell")
        first, second = wait_until(lambda: len(names["spans"]) == 2 and names["spans"])
        assert (first["bytes"], first["error"]) == ((6, 6), None)
        assert (second["bytes"], second["error"][:9]) == ((4, 0), "EarlyEOF(")
        assert 0 <= first["seconds"] < SOON
    finally:
        server.halt()


def test_the_other_example_works(tmp_path, monkeypatch, serve, connect, in_thread, lines):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(from gtcpserver import AccessLog.*?)```", DOCS, re.DOTALL)
    names = {}
    exec(example, names)
    assert (tmp_path / "access.log").exists()
    talk(in_thread, connect(serve(names["handle"], access_log="text")), b"ada\n")
    assert lines(1)[0]["user"] == "ada"


def test_every_result_is_in_the_documentation():
    assert not [result for result in get_args(Result) if f"`{result}`" not in DOCS]
