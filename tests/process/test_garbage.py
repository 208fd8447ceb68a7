"""`freeze_gc`: the garbage collector of a server's process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, socket, sys
import gevent
from gtcpserver import Server

def on_start(server):
    seen.append(gc.get_freeze_count())  # what a hook makes is frozen, too

def handle(conn):
    seen.append(gc.get_freeze_count())

seen = []
usual = gc.get_threshold()
with Server("127.0.0.1:0", handle, on_start=on_start, **json.loads(sys.argv[1])) as server:
    client = socket.create_connection(("127.0.0.1", server.port))
    while len(seen) < 2:
        gevent.sleep(0.001)
print(json.dumps([seen[0], seen[1] > 1000, gc.get_threshold() == usual]))
"""


@pytest.mark.parametrize(
    ("options", "expected"), [({}, [0, False, True]), ({"freeze_gc": True}, [0, True, False])], ids=["usual", "frozen"]
)
def test_what_exists_at_the_first_connection_is_frozen_on_request(options, expected) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == expected
