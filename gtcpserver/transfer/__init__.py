"""Zero copy: files by sendfile(2), streams by splice(2)."""

from .pipes import PIPES
from .recv_to_file import recv_to_file
from .relay import RelayResult, pipe, relay
from .sendfile import sendfile

__all__ = ["PIPES", "RelayResult", "pipe", "recv_to_file", "relay", "sendfile"]
