"""Plugin for pytest: whatever a test does, the others still run.

With pytest-xdist (`-n`), that is: a test that hangs ends its process, and the run goes on in another.
"""

import faulthandler
import os

import pytest

_stderr = 2


def pytest_configure(config):
    global _stderr
    _stderr = os.dup(2)  # before a test's output is captured


def pytest_timeout_set_timer(item, settings):
    """End a test that hangs by ending its process, with the stacks of all threads.

    pytest-timeout's own signal raises an exception in whichever greenlet runs, and one that hangs in the hub swallows
    it. faulthandler's thread needs no lock of the interpreter, so that it also ends what hangs in C.
    """
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=_stderr)
    return True


def pytest_timeout_cancel_timer(item):
    faulthandler.cancel_dump_traceback_later()
    return True


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable(config, report):
    """Escape lone surrogates in what pytest-xdist sends: it cannot, and would end the whole run."""
    return _sendable((yield))


def _sendable(value):
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_sendable(key): _sendable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_sendable, value))
    return value
