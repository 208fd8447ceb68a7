"""Checks of functions given as options: one clear message, when the option is given, for functions that can never work.

The command line, Server and the adapters use the same message for the same mistake.
"""

from __future__ import annotations

import inspect
import socketserver
from functools import partial
from typing import Any

from .errors import ConfigError

_CONNECTION = ("the connection",)
_WORKER = ("the Worker",)

#: What hooks are called with: each argument in words.
HOOKS = {
    "on_connect": _CONNECTION,
    "on_disconnect": _CONNECTION,
    "on_error": ("the connection", "the exception"),
    "on_start": ("the Server",),
    "on_stop": ("the Server",),
    "worker_start": _WORKER,
    "worker_stop": _WORKER,
    "worker_error": ("the Worker", "the text"),
}


_NUMBERS = {0: "no arguments", 1: "one argument", 2: "two arguments"}


def check_handler(handler: Any, subject: str | None = None) -> None:
    """Raise ConfigError unless ``handler`` can serve connections.

    Args:
        handler: what the user gave.
        subject: its name in the message; None: "handler" and the name it was defined with.
    """
    subject = subject or f"handler {full_name_of(handler)}"
    if isinstance(handler, type):
        raise ConfigError(f"{subject} is a class; {_instead_of_class(handler)}")
    _check(handler, subject, _CONNECTION, "a handler")


def check_hook(name: str, hook: Any, subject: str | None = None) -> None:
    """Raise ConfigError unless ``hook`` is None or can be the hook of this name, one of HOOKS.

    An async ``on_connect`` would admit every client: the coroutine that it returns is not False.
    """
    if hook is not None:
        _check(hook, subject or f"{name} {full_name_of(hook)}", HOOKS[name], "a hook")


def check_application(application: Any, subject: str | None = None) -> None:
    """Raise ConfigError unless ``application`` can be a WSGI application: any callable except async ones (ASGI)."""
    subject = subject or f"application {full_name_of(application)}"
    # PEP 3333: it may be a generator, since its result is iterated.
    _check(application, subject, ("the environment", "start_response"), "a WSGI application", may_generate=True)


def check_factory(factory: Any, subject: str) -> None:
    """Raise ConfigError unless ``factory`` can be called without arguments, and returns what it makes at once."""
    _check(factory, subject, (), "a factory")


def _check(found: Any, subject: str, arguments: tuple[str, ...], kind: str, may_generate: bool = False) -> None:
    """Raise ConfigError unless calling ``found`` with these ``arguments`` runs it to its end."""
    if not callable(found):
        raise ConfigError(f"{subject} is not callable, it is {_a(type(found).__name__)}")
    function = _called_first(found)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{subject} is async; {kind} is a plain function that blocks")
    if inspect.isgeneratorfunction(function) and not may_generate:
        raise ConfigError(f"{subject} is a generator; {kind} is a plain function that blocks")
    try:
        # Not the signature of a decorated function: the decorator may add arguments of its own.
        signature = inspect.signature(found, follow_wrapped=False)
    except (ValueError, TypeError):  # some builtins have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        # Decorator libraries set __signature__ to that of the wrapped function, too.
        if getattr(found, "__signature__", None) is None:
            wanted = ", ".join(filter(None, (_NUMBERS[len(arguments)], " and ".join(arguments))))
            raise ConfigError(f"{subject} must take {wanted}; it takes {signature}") from None


def name_of(found: Any) -> str:
    """Return the name of a function, method, coroutine or class, such as "Chat.serve"; otherwise that of its class.

    A partial has the name of its function.
    """
    while isinstance(found, partial):
        found = found.func
    name = getattr(found, "__qualname__", None)
    return name if name and isinstance(name, str) else type(found).__name__


def full_name_of(found: Any) -> str:
    """Return the name with its module, such as "app.Chat.serve"; the repr of an object without a name."""
    if not isinstance(getattr(found, "__qualname__", None), str):
        return repr(found)
    module = getattr(found, "__module__", None)
    return f"{module}.{name_of(found)}" if isinstance(module, str) and module != "__main__" else name_of(found)


def _called_first(found: Any) -> Any:
    """Return the function whose code a call of ``found`` runs: that of a partial, or the ``__call__`` of an object."""
    while isinstance(found, partial):
        found = found.func
    if isinstance(found, type) or inspect.isroutine(found):
        return found
    return type(found).__call__


def _instead_of_class(found: type) -> str:
    name = found.__name__
    if issubclass(found, (socketserver.BaseRequestHandler, socketserver.BaseServer)):
        return f"give from_socketserver({name})"
    if "__call__" in dir(found):
        return f"its instances are handlers: give one, such as {name}()"
    return f"give a function, such as lambda conn: {name}(conn)"


def _a(name: str) -> str:
    return f"an {name}" if name[:1].lower() in tuple("aeiou") else f"a {name}"
