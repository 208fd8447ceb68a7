"""``server.shutdown()`` in handlers of socketserver's, where the program gives a server object of its own."""

from __future__ import annotations

import socketserver
from typing import Any

import pytest

from gtcpserver import from_socketserver
from kit.waiting import wait_until


class Program(socketserver.TCPServer):
    greeting = b"hello"


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        assert isinstance(self.server, Program)
        self.wfile.write(self.server.greeting)
        if line == b"stop\n":
            self.server.shutdown()


@pytest.fixture
def program():
    server = Program(("127.0.0.1", 0), Handler, bind_and_activate=False)
    yield server
    server.server_close()


def ask(client: Any, line: bytes) -> bytes:
    client.sendall(line)
    return client.recv(100)


def test_a_shutdown_stops_every_server_that_runs_a_handler_for_it(serve, connect, in_thread, program):
    # Two ports, each with a handler of its own, for one program: whichever was made last, both have to stop.
    servers = [serve(from_socketserver(Handler, program)) for _ in range(2)]
    for server in servers:
        assert in_thread(ask, connect(server), b"ask\n") == b"hello"
    assert in_thread(ask, connect(servers[0]), b"stop\n") == b"hello"
    wait_until(lambda: all(server.stopping for server in servers))


def test_the_program_recognises_its_server(program):
    from_socketserver(Handler, program)
    from_socketserver(Handler, program)
    assert isinstance(program, Program)
    assert type(program).__name__ == "Program"
    assert type(program).__mro__[2] is Program
    assert "shutdown" not in vars(program)


def test_a_shutdown_of_the_programs_own_is_called(serve, connect, in_thread):
    called = []

    class WithShutdown(Program):
        def shutdown(self) -> None:
            called.append(self)

    program = WithShutdown(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server = serve(from_socketserver(Handler, program))
    assert in_thread(ask, connect(server), b"stop\n") == b"hello"
    wait_until(lambda: called == [program])
    assert not server.stopping
    program.server_close()
