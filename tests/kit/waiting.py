"""Waiting for what should happen at once."""

import socket
import time

import gevent

from .patience import SOON


def wait_until(condition, seconds=SOON):
    """Let the event loop run until `condition()` is true; returns its value."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, f"still not true after {seconds} s: {condition}"
        gevent.sleep(0.002)
    return value


def wait_for_port(port, process):
    """Wait until a program listens. It blocks: not for servers in this process."""
    give_up = time.monotonic() + SOON
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert process.poll() is None, f"{process.args} has ended"
            assert time.monotonic() < give_up, f"{process.args} does not listen"
            time.sleep(0.01)
