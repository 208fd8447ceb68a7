"""Load what a user names on the command line: "module:name", "module:object.attribute" or "path/to/file.py:name"."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import socketserver
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import click

from gtcpserver.adapters import from_socketserver, from_wsgi
from gtcpserver.callables import check_application, check_factory, check_handler, check_hook
from gtcpserver.errors import ConfigError

from .commands import RunError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def find_modules(parameters: Mapping[str, Any]) -> None:
    """Have modules searched in the working directory, and before it in the folder of --app-dir, if it is given.

    Raises:
        click.UsageError: there is no such folder.
    """
    folder = parameters.get("app_dir")
    if folder is not None and not os.path.isdir(folder):
        raise click.UsageError(f"--app-dir: there is no folder {folder!r}")
    for path in (os.getcwd(), *([os.path.abspath(folder)] if folder is not None else [])):
        if path not in sys.path:
            sys.path.insert(0, path)


def load_program(parameters: Mapping[str, Any], reference: str) -> Callable[[Any], Any]:
    """Load the handler or WSGI application that the options name, or that their factory makes. Raise as
    `load_handler`."""
    load = load_wsgi if parameters["wsgi"] else load_handler
    return load(reference, factory=parameters["factory"])


def load_handler(reference: str, parameter: str = "MODULE:HANDLER", *, factory: bool = False) -> Callable[[Any], Any]:
    """Load a handler, or a handler class made for socketserver, and check that it can be called with a connection.

    Args:
        factory: the reference names a function that returns it.

    Raises:
        click.UsageError: there is no such module, file or attribute, or it is not a handler.
        RunError: the module raised an exception.
    """
    found, subject = _load(reference, parameter, factory)
    if isinstance(found, type) and issubclass(found, (socketserver.BaseRequestHandler, socketserver.BaseServer)):
        try:
            return from_socketserver(found)  # type: ignore[arg-type]
        except ConfigError as error:
            raise _wrong(parameter, str(error).removeprefix("handler_class ")) from None
    _check(lambda: check_handler(found, subject), parameter)
    return found  # type: ignore[no-any-return]


def load_wsgi(reference: str, parameter: str = "MODULE:HANDLER", *, factory: bool = False) -> Callable[[Any], Any]:
    """Load a WSGI application, and make a handler of it. Raise as `load_handler`."""
    application, subject = _load(reference, parameter, factory)
    _check(lambda: check_application(application, subject), parameter)
    return from_wsgi(application)


def _load(reference: str, parameter: str, factory: bool) -> tuple[Any, str]:
    """Return what a reference names, or what it returns if it is a factory, and what messages call that."""
    found = load_object(reference, parameter)
    if not factory:
        return found, reference
    _check(lambda: check_factory(found, reference), parameter)
    try:
        return found(), f"what {reference} returned"
    except (Exception, SystemExit) as error:
        message = f"{reference} raised {type(error).__name__}"
        raise RunError(message, details=user_traceback(error)) from None


def load_hook(name: str, reference: str, parameter: str) -> Callable[..., Any]:
    """Load the function for the hook of this name. Raise as `load_handler`."""
    hook: Callable[..., Any] = load_object(reference, parameter)
    _check(lambda: check_hook(name, hook, reference), parameter)
    return hook


def _check(check: Callable[[], None], parameter: str) -> None:
    try:
        check()
    except ConfigError as error:
        raise _wrong(parameter, str(error)) from None


def load_object(reference: str, parameter: str) -> Any:
    """Import the module or file and follow the attributes. Raise as `load_handler`."""
    module_name, colon, attributes = reference.rpartition(":")
    if not (colon and module_name and attributes):
        raise _wrong(parameter, f'must be "module:name" or "path/to/file.py:name", got {reference!r}')
    is_file = module_name.endswith(".py") or "/" in module_name
    found: Any = _run_file(module_name, parameter) if is_file else _import(module_name, parameter)
    path = module_name
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            near = _near(attribute, (name for name in dir(found) if not name.startswith("_")))
            raise _wrong(parameter, f"{path} has no {attribute!r}{near}") from None
        path += f".{attribute}"
    return found


def _import(name: str, parameter: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only for the module itself: a missing import within the user's module is an error there, with its traceback.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _failed(name, error) from None
        parent, _, last = error.name.rpartition(".")
        package = sys.modules.get(parent) if parent else None
        if parent and not hasattr(package, "__path__"):
            raise _wrong(parameter, f"no module {name!r}: {parent!r} is a module, not a package") from None
        names = (module.name for module in pkgutil.iter_modules(package.__path__ if package else None))
        where = "" if parent else f"; looked in {os.getcwd()} and the installed packages"
        raise _wrong(parameter, f"no module {error.name!r}{_near(last, names)}{where}") from None
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from None
    except TypeError as error:  # importlib's own, for a relative name
        raise _wrong(parameter, f"no module {name!r}: {error}") from None


def _run_file(path: str, parameter: str) -> ModuleType:
    if not os.path.isfile(path):
        raise _wrong(parameter, f"no file {path!r}")
    full = os.path.abspath(path)
    # Modules next to the file can be imported, as with `python file.py`.
    sys.path.insert(0, os.path.dirname(full))
    name = os.path.splitext(os.path.basename(full))[0]
    if name in sys.modules or name in sys.stdlib_module_names:
        name = f"_gtcpserver_{name}"
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise _wrong(parameter, f"{path!r} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failed(path, error) from None
    return module


def _failed(name: str, error: BaseException) -> RunError:
    kind = type(error).__name__
    message = f"{name} raised {kind} while it was imported{_hint_of_package(name, error)}"
    return RunError(message, details=user_traceback(error))


def _hint_of_package(name: str, error: BaseException) -> str:
    """Return the dotted name of a file that fails on a relative import, which only works within a package."""
    if not isinstance(error, ImportError) or "attempted relative import" not in str(error):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    path = os.path.abspath(frames[-1].filename) if frames else ""
    if path not in (os.path.abspath(name), os.path.abspath(name.replace(".", os.sep) + ".py")):
        return ""  # another module of the program
    words = [os.path.splitext(os.path.basename(path))[0]]
    folder = os.path.dirname(path)
    while len(words) == 1 or os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, word = os.path.split(folder)
        words.insert(0, word)
    if not all(word.isidentifier() for word in words):
        return ""
    where = "" if folder == os.getcwd() else f", in the folder {folder}"
    return f'; it is part of a package: use "{".".join(words)}:..."{where}'


def user_traceback(error: BaseException) -> str:
    """Return the traceback of an exception without the frames of the import machinery and of this package."""
    report = traceback.TracebackException.from_exception(error)
    _trim(report, set())
    return "".join(report.format())


def _trim(report: traceback.TracebackException | None, seen: set[int]) -> None:
    if report is None or id(report) in seen:
        return
    seen.add(id(report))
    report.stack = traceback.StackSummary.from_list([frame for frame in report.stack if not _is_ours(frame.filename)])
    _trim(report.__cause__, seen)
    _trim(report.__context__, seen)


def _is_ours(filename: str) -> bool:
    return filename.startswith(("<frozen importlib", _PACKAGE + os.sep)) or filename == importlib.__file__


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, set(names), 3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _wrong(parameter: str, message: str) -> click.UsageError:
    return click.UsageError(f"{parameter}: {message}")
