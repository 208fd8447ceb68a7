"""The names of a Connection that only this package uses: not in the reference, and not for subclasses to take."""

from __future__ import annotations

import inspect
from typing import Any

import gevent.socket
import pytest

from gtcpserver import Connection
from gtcpserver.connection.connection import _OWN_NAMES


@pytest.mark.parametrize("name", sorted(_OWN_NAMES))
def test_a_subclass_cannot_take_a_name_that_the_package_uses(name: str) -> None:
    expected = rf"^Chat must not define '{name}': gtcpserver uses this name of a Connection$"
    for body in ({name: None}, {name: lambda self: None}, {"__slots__": (name,)}, {"__annotations__": {name: int}}):
        with pytest.raises(TypeError, match=expected):
            type("Chat", (Connection,), dict(body))


def test_the_stream_of_a_connection_cannot_be_replaced() -> None:
    connection = Connection()
    with pytest.raises(AttributeError):
        connection.stream = object()  # type: ignore[misc]
    connection.close()


def test_a_subclass_has_names_of_its_own(serve: Any, connect: Any, in_thread: Any) -> None:
    class Chat(Connection):
        room: str = "lobby"

        def say(self, text: str) -> None:
            self.sendall(f"{self.room}: {text}".encode())

    server = serve(lambda conn: conn.say("hello"), connection_class=Chat)
    assert in_thread(connect(server).recv, 100) == b"lobby: hello"


def test_none_of_these_names_is_one_of_the_socket_api() -> None:
    sock = gevent.socket.socket()
    assert not [name for name in _OWN_NAMES if hasattr(sock, name)]
    sock.close()


def test_the_reference_leaves_them_out() -> None:
    for name in _OWN_NAMES:
        documented = inspect.getdoc(getattr(Connection, name))
        assert documented is None or ":meta private:" in documented, name
