"""A static file server: a handler that answers GET and HEAD from a directory."""

from .handler import StaticFiles

__all__ = ["StaticFiles"]
