"""The greenlets that run handlers: limited in number, resizable, reused."""

from .pool import HandlerPool

__all__ = ["HandlerPool"]
