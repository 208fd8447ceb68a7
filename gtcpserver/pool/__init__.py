"""The greenlets that run handlers: limited in number, resizable, used again."""

from .pool import HandlerPool

__all__ = ["HandlerPool"]
