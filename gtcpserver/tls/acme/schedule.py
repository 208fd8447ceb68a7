"""When to look, to renew and to try again. Without I/O."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

DAY = 86400.0

#: The part of a certificate's lifetime after which it is renewed: what Let's Encrypt recommends, and leaves a month of
#: 90 days for attempts that fail.
RENEW_AFTER = 2 / 3

#: The part of the lifetime over which renewals are spread, so that servers that started together do not order together.
SPREAD = 1 / 30

#: Longest time until the next look: whether the authority wants the renewal earlier (RFC 9773 section 4.3.2).
LONGEST_LOOK = DAY

#: Shortest and usual time between two such questions; the authority may ask for more (Retry-After).
SHORTEST_LOOK = 60.0
USUAL_LOOK = DAY / 4

#: Pauses after the first failures; then always the last one. Let's Encrypt allows five failed validations of a name per
#: hour (https://letsencrypt.org/docs/rate-limits).
PAUSES = (60.0, 5 * 60.0, 15 * 60.0, 3600.0, 2 * 3600.0, 4 * 3600.0, 8 * 3600.0, 12 * 3600.0)

#: A pause is longer by up to this part of it, so that servers that failed together do not try again together.
PAUSE_SPREAD = 0.25

#: Longest pause that an authority may ask for: the longest window of Let's Encrypt's limits is seven days.
LONGEST_PAUSE = 7 * DAY

#: Shortest time between two attempts, whatever else is due: two servers with different names for the same certificate
#: would order by turns. And the longest pause for other names than those that failed: somebody has mended them.
SHORTEST_PAUSE = 60.0
PAUSE_FOR_NEWS = 5 * 60.0

#: Seconds by which the clock may have been set back before times in the state count as nonsense.
CLOCK_STEP = 300.0

#: Shortest time between a certificate and the next one for the same names: a certificate that looks expired at once
#: (a wrong clock) must not be ordered over and over.
SHORTEST_RENEWAL = 3600.0


@dataclass(frozen=True)
class Plan:
    """When to renew a certificate.

    Attributes:
        drawn_for, renew_at: as in State.
        ask_again: seconds until the authority may be asked again whether it wants another time.
    """

    drawn_for: str
    renew_at: float
    ask_again: float


@dataclass(frozen=True)
class State:
    """What is remembered between two looks. Times are this host's, in seconds since the epoch.

    Attributes:
        names: names of the last attempt.
        written: when it was written.
        next_look: when to look again.
        not_before: the authority wants no attempt before (Retry-After).
        drawn_for: the certificate, and the window, that `renew_at` was drawn for.
        renew_at: when to renew it, by the authority's clock.
        issued: when the last certificate was issued.
        failures: attempts that failed since.
        trouble: why the last attempt failed.
    """

    names: tuple[str, ...] = ()
    written: float = 0.0
    next_look: float = 0.0
    not_before: float = 0.0
    drawn_for: str = ""
    renew_at: float = 0.0
    issued: float = 0.0
    failures: int = 0
    trouble: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """Return a state from its file; a damaged one counts as none."""
        try:
            times = ("written", "next_look", "not_before", "renew_at", "issued")
            found = cls(
                names=tuple(str(name) for name in data.get("names", ())),
                drawn_for=str(data.get("drawn_for", "")),
                failures=int(data.get("failures", 0)),
                trouble=str(data.get("trouble", "")),
                **{name: float(data.get(name, 0.0)) for name in times},
            )
        except (TypeError, ValueError, OverflowError):
            return cls()
        numbers = (found.failures, *(getattr(found, name) for name in times))
        return found if all(number >= 0 and math.isfinite(number) for number in numbers) else cls()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def is_due(self, names: Sequence[str], has_certificate: bool, now: float) -> bool:
        """Return whether there is something to do.

        Args:
            names: names of the settings.
            has_certificate: there is a certificate in the folder.
            now: seconds since the epoch.
        """
        if now < self.written - CLOCK_STEP or now >= self.written + LONGEST_PAUSE:
            return True  # the clock was set back; or no state that we have written says so
        if now < self.not_before:
            return False
        if tuple(names) != self.names or (not has_certificate and not self.failures):
            pause = min(_pause(self.failures), PAUSE_FOR_NEWS) if self.failures else SHORTEST_PAUSE
            return now >= self.written + (pause if self.names else 0.0)
        return now >= self.next_look

    def after_look(self, names: Sequence[str], plan: Plan, skew: float, now: float) -> State:
        """Return the state after a look, or an order, that ended well.

        Args:
            skew: seconds by which this host's clock is behind the authority's.
        """
        return replace(
            self,
            names=tuple(names),
            written=now,
            # Not before a renewal is allowed: a look for nothing is a process and two requests.
            next_look=min(max(plan.renew_at - skew, now + 1.0, self.issued + SHORTEST_RENEWAL), now + plan.ask_again),
            not_before=0.0,
            drawn_for=plan.drawn_for,
            renew_at=max(plan.renew_at, 0.0),  # one before 1970 would make the state count as damaged
            failures=0,
            trouble="",
        )

    def after_failure(
        self, names: Sequence[str], trouble: str, retry_after: float | None, now: float, jitter: float | None = None
    ) -> State:
        """Return the state after an attempt that failed.

        Args:
            trouble: why.
            retry_after: seconds that the authority has asked for; None: it has not.
            jitter: from 0 to 1; None: a random number.
        """
        failures = self.failures + 1
        pause = _pause(failures) * (1 + PAUSE_SPREAD * (random.random() if jitter is None else jitter))
        asked = min(max(retry_after or 0.0, 0.0), LONGEST_PAUSE)
        return replace(
            self,
            names=tuple(names),
            written=now,
            next_look=now + max(pause, asked),
            not_before=now + asked if asked else 0.0,
            failures=failures,
            trouble=trouble,
        )


def _pause(failures: int) -> float:
    return PAUSES[min(failures, len(PAUSES)) - 1]


def clamp_look(seconds: float) -> float:
    """Return how long to wait until the authority is asked again, within our own bounds."""
    return min(max(seconds, SHORTEST_LOOK), LONGEST_LOOK)


def draw_renewal(begins: float, ends: float, chance: float | None = None) -> float:
    """Draw the time to renew a certificate: after two thirds of its lifetime, spread a little.

    Args:
        begins, ends: its lifetime, in seconds since the epoch.
        chance: from 0 to 1; None: a random number.
    """
    lifetime = max(ends - begins, 0.0)
    return begins + lifetime * (RENEW_AFTER + SPREAD * (random.random() if chance is None else chance))


def draw_in_window(start: float, end: float, expires: float, chance: float | None = None) -> float:
    """Draw a time in the window that the authority suggests (RFC 9773 section 4.2), before the certificate expires.

    Raises:
        ValueError: the window ends before it starts.
    """
    if end < start:
        raise ValueError("the window ends before it starts")
    return min(start + (end - start) * (random.random() if chance is None else chance), expires)
