"""Handlers that many tests serve."""

from __future__ import annotations


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def idle_echo(conn):
    """Answers each chunk; idle in between."""
    while True:
        with conn.idle():
            data = conn.recv(4096)
        if not data:
            return
        conn.sendall(data)
