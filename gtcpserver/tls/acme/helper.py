"""The helper process: looks once, does what is to do, and ends.

Its input is a JSON object with the settings; its output is a JSON object per line: {"level", "text"} for the log, and
at the end {"changed"}, whether there is a new certificate. Without that last line it has failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from cryptography import x509

from .authority import FORGOTTEN, Authority, AuthorityError, readable
from .folder import Folder, read_json, write_json
from .ordering import Ordering, names_in, read_certificate
from .renewal import certificate_identifier, is_time, plan_renewal
from .schedule import State
from .settings import ACMESettings

#: Seconds that the clocks may differ before the log says so.
NOTED_SKEW = 60.0

#: Seconds until it ends itself, if its server is gone: it has the lock.
LAST_SECOND = 660

#: Bytes of memory: an authority's answer may have no end. 40 MB are used.
MOST_MEMORY = 512 * 1024 * 1024

Say = Callable[[str, str], None]


def look(settings: ACMESettings, say: Say, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Order a certificate, if it is time. Call it with the lock held.

    Args:
        say: called with level and text of each line for the log.
        sleep: called with seconds.

    Returns:
        whether there is a new certificate.

    Raises:
        OSError: the folder cannot be used.
    """
    folder = Folder(settings)
    state = State.from_json(read_json(folder.state))
    certificate = read_certificate(folder.certificate)
    if not state.is_due(settings.names, certificate is not None, time.time()):
        return False  # another process has done it
    try:
        changed, state = _do(settings, folder, state, certificate, say, sleep)
    except Exception as error:
        # Whatever it was: it counts, so that the next attempt waits for its time.
        asked = error.retry_after if isinstance(error, AuthorityError) else None
        state = state.after_failure(settings.names, _told(error), asked, time.time())
        say("warning", _failure(settings, state, certificate))
        changed = False
    write_json(folder.state, state.to_json())
    return changed


def _do(
    settings: ACMESettings,
    folder: Folder,
    state: State,
    certificate: x509.Certificate | None,
    say: Say,
    sleep: Callable[[float], None],
) -> tuple[bool, State]:
    authority = Authority(settings, folder)
    authority.open()
    if abs(authority.skew) > NOTED_SKEW:
        where = "behind" if authority.skew > 0 else "ahead of"
        say("warning", f"the clock of this host is {abs(authority.skew):.0f} s {where} that of the authority")
    replaces = None
    if certificate is not None and set(settings.names) <= set(names_in(certificate)):
        plan = plan_renewal(authority, certificate, state, say)
        if not is_time(plan, state, authority, time.time()):
            return False, state.after_look(settings.names, plan, authority.skew, time.time())
        replaces = certificate_identifier(certificate) if "renewalInfo" in authority.directory else None
    elif certificate is not None:
        say("info", f"the certificate is for other names: {', '.join(names_in(certificate))}")
    say("info", f"ordering a certificate for {', '.join(settings.names)} from {settings.directory}")
    if authority.log_in():
        _say_terms(authority, say)
    new = _order(Ordering(settings, folder, authority, say, sleep), authority, replaces)
    now = time.time()
    state = State(issued=now)
    plan = plan_renewal(authority, new, state, say)
    state = state.after_look(settings.names, plan, authority.skew, now)
    say(
        "warning" if settings.is_staging else "info",
        f"certificate for {', '.join(settings.names)} issued; it expires on {new.not_valid_after_utc:%Y-%m-%d}, and is "
        f"renewed on {_date(plan.renew_at)}"
        + ("; it is from the staging environment, and no browser trusts it" if settings.is_staging else ""),
    )
    return True, state


def _order(ordering: Ordering, authority: Authority, replaces: str | None) -> x509.Certificate:
    try:
        return ordering.order(replaces)
    except AuthorityError as error:
        if error.kind != FORGOTTEN:
            raise
    authority.forget_account()
    return ordering.order(replaces)


def _told(error: Exception) -> str:
    known = isinstance(error, (AuthorityError, OSError))
    return readable(str(error) if known else repr(error))


def _say_terms(authority: Authority, say: Say) -> None:
    meta = authority.directory.get("meta")
    terms = meta.get("termsOfService") if isinstance(meta, dict) else None
    say("info", f"new account; its terms of service, which it agrees to: {readable(str(terms or 'none'))}")


def _failure(settings: ACMESettings, state: State, certificate: x509.Certificate | None) -> str:
    names = ", ".join(settings.names)
    if certificate is None:
        begin = f"no certificate for {names}"
    else:
        begin = f"certificate for {names} not renewed; it expires on {certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"{begin} (attempt {state.failures}): {state.trouble}; the next attempt is at {_moment(state.next_look)}"


def roll_over(settings: ACMESettings, say: Say) -> bool:
    """Give the account another key. Call it with the lock held.

    Returns:
        False: there is no new certificate.

    Raises:
        AuthorityError: the authority refuses; the old key stays.
        OSError: the folder cannot be used.
    """
    authority = Authority(settings, Folder(settings))
    authority.open()
    if not authority.log_in():
        authority.roll_over()
    say("info", "the account has a new key")
    return False


def main() -> None:
    """Run as a process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LAST_SECOND)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    most = MOST_MEMORY if most == resource.RLIM_INFINITY else min(most, MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    request = json.load(sys.stdin)
    settings = ACMESettings.from_json(request["settings"])
    try:
        work = roll_over if request.get("work") == "roll_over" else look
        _write({"changed": work(settings, lambda level, text: _write({"level": level, "text": text}))})
    except (AuthorityError, OSError) as error:
        _write({"level": "error", "text": readable(str(error))})
        sys.exit(1)


def _write(line: dict[str, Any]) -> None:
    try:
        os.write(1, json.dumps(line).encode() + b"\n")
    except OSError:
        pass  # the server is gone; the order goes on


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d}"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
