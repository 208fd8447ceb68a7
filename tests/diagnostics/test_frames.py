"""Reports of where a handler stands show the program's own code, and no library's."""

from __future__ import annotations

import email.message
import json
import os
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import click
import gevent
import pytest

import gtcpserver
from gtcpserver.diagnostics.frames import is_library
from gtcpserver.static_files import StaticFiles

HERE = os.path.basename(__file__)


def read_line(conn: Any) -> None:
    conn.makefile("rb").readline()  # socket.py, this package's and gevent's frames


def handle(conn: Any) -> None:
    read_line(conn)


def where_it_was_cut(server: Any) -> list[str]:
    (cut,) = server.halt().cut
    return [re.sub(r":\d+", "", frame) for frame in cut.where]


def wait_for_bytes(server: Any) -> None:
    with gevent.Timeout(10):
        while not any(conn.bytes_received for conn in server.connections()):
            gevent.sleep(0.001)


def test_a_cut_handler_is_shown_by_the_programs_frames_alone(serve: Any, connect: Any) -> None:
    server = serve(handle)
    connect(server).sendall(b"no end")
    wait_for_bytes(server)
    assert where_it_was_cut(server) == [f"{HERE} in handle", f"{HERE} in read_line"]


def test_of_a_handler_of_this_package_all_is_shown(serve: Any, connect: Any, tmp_path: Path) -> None:
    server = serve(StaticFiles(tmp_path))
    connect(server).sendall(b"GET / HTTP")
    wait_for_bytes(server)
    where = where_it_was_cut(server)
    assert where[-1].startswith("handler.py in " if gtcpserver.compiled else "poller.py in ")  # compiled: no frame
    assert any(frame.startswith("handler.py in ") for frame in where)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(json.dumps, id="the standard library"),
        pytest.param(email.message.Message.as_string, id="a package of it"),
        pytest.param(click.echo, id="an installed package"),
        pytest.param(gtcpserver.Server.start, id="a room of this package"),
        pytest.param(gtcpserver.run, id="the root of this package"),
        pytest.param(gevent.sleep, id="gevent"),
        pytest.param(os.path.join, id="frozen or not"),
    ],
)
def test_libraries_are_told_from_the_program(function: FunctionType) -> None:
    assert is_library(function.__code__)
    assert not is_library(handle.__code__)


def test_a_folder_whose_name_begins_as_the_packages_is_the_programs() -> None:
    folder = os.path.dirname(gtcpserver.__file__)
    own = handle.__code__.replace(co_filename=f"{folder}_of_mine/app.py")
    assert not is_library(own)
    assert is_library(own.replace(co_filename=f"{folder}/new_room/module.py"))
