"""The socket that a handler gets, from accept to close: reading, writing, waiting, TLS, lingering close."""

from .blocks import Deadline, Idle
from .connection import Connection

__all__ = ["Connection", "Deadline", "Idle"]
