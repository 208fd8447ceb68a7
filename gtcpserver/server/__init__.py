"""Server: puts listening sockets, admission, pool and connections together, and owns their life."""

from .server import Server, State

__all__ = ["Server", "State"]
