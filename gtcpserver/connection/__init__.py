"""The socket that a handler gets, from accept to close: reading, writing, waiting, TLS, lingering close."""

from .connection import Connection, Deadline, Idle

__all__ = ["Connection", "Deadline", "Idle"]
