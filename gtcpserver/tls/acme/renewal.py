"""When to renew a certificate, and whether the authority wants it earlier (ARI, RFC 9773). Runs in the helper."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

from cryptography import x509
from josepy.json_util import encode_b64jose

from .authority import Authority, AuthorityError, readable
from .schedule import SHORTEST_RENEWAL, USUAL_LOOK, Plan, State, clamp_look, draw_in_window, draw_renewal


def plan_renewal(
    authority: Authority, certificate: x509.Certificate, state: State, say: Callable[[str, str], None]
) -> Plan:
    """Return when to renew a certificate.

    A time that was drawn stays, unless the authority suggests another window. If the authority has no suggestions, or
    cannot be asked, two thirds of the lifetime count.

    Args:
        authority: opened.
        say: called with each line for the log.
    """
    begins, ends = (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )
    number = f"{certificate.serial_number:x}"
    ask_again = USUAL_LOOK
    window = None
    identifier = certificate_identifier(certificate)
    url = authority.directory.get("renewalInfo")
    if isinstance(url, str) and identifier is not None and authority.now() < ends:
        try:
            window, explanation = _window(authority, f"{url}/{identifier}")
            if authority.retry_after is not None:
                ask_again = clamp_look(authority.retry_after)
        except (AuthorityError, ValueError, OverflowError) as error:
            say("info", f"the authority does not say when to renew: {readable(str(error))}")
            if state.drawn_for.partition(" ")[0] == number:
                return Plan(state.drawn_for, state.renew_at, USUAL_LOOK)
    drawn_for = number if window is None else f"{number} {window[0]:.0f} {window[1]:.0f}"
    if state.drawn_for == drawn_for:
        return Plan(drawn_for, state.renew_at, ask_again)
    if window is None:
        return Plan(drawn_for, draw_renewal(begins, ends), ask_again)
    renew_at = draw_in_window(*window, ends)
    if explanation:
        say("info", f"the authority wants a renewal by {_date(window[1])}: {readable(explanation)}")
    return Plan(drawn_for, renew_at, ask_again)


def is_time(plan: Plan, state: State, authority: Authority, now: float) -> bool:
    """Return whether to renew now. Never twice within an hour: the authority's clock, or ours, may be wrong."""
    return authority.now() >= plan.renew_at and not 0 <= now - state.issued < SHORTEST_RENEWAL


def certificate_identifier(certificate: x509.Certificate) -> str | None:
    """Return what a certificate is called in RFC 9773 (section 4.1); None if it does not name its issuer's key."""
    try:
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except (x509.ExtensionNotFound, ValueError):
        return None
    if not issuer:
        return None
    serial = certificate.serial_number
    # The content of the number in DER: with a leading zero, if it would be negative otherwise.
    number = serial.to_bytes(serial.bit_length() // 8 + 1, "big")
    return f"{encode_b64jose(issuer)}.{encode_b64jose(number)}"


def _window(authority: Authority, url: str) -> tuple[tuple[float, float], str]:
    found = authority.get(url)
    window = found.get("suggestedWindow")
    if not isinstance(window, dict):
        raise ValueError("there is no suggestedWindow")
    start, end = (_time(window.get(name)) for name in ("start", "end"))
    if end < start:
        raise ValueError("the suggestedWindow ends before it starts")
    explanation = found.get("explanationURL")
    return (start, end), explanation if isinstance(explanation, str) else ""


def _time(value: object) -> float:
    if not isinstance(value, str):
        raise ValueError("the suggestedWindow has no time")
    # RFC 3339; before Python 3.11, fromisoformat knows no Z, and only 3 or 6 digits of a second.
    text, _, rest = value.strip().upper().partition(".")
    zone = rest.lstrip("0123456789") if rest else ""
    moment = datetime.fromisoformat((text + zone).replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError("a time of the suggestedWindow has no zone")
    return moment.timestamp()


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
