"""The rate of a user on several machines: each process has a share of it, by what the user moves there.

Once a second a process tells the store how many bytes per second each user could move through it: what was moved, and
some more; all, if the user had to wait. The store divides the rate (`SHARES`): modest ones get what they could use, the
others the same part of what is left. So the shares are at most the rate together; a process where a user begins asks at
once, and the others have less from their next second on.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from gtcpserver.store.connect import StoreError
from gtcpserver.store.scripts import SHARES
from gtcpserver.store.store import AT_ONCE, Store

from .buckets import Bucket, TokenBucket

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What a user could move who did not wait: this much more than was moved, and this part of the rate.
MORE = 1.5
LEAST_PART = 0.05

#: Part of the rate that a share has at least: a wait must end some time.
LEAST_SHARE = 0.001


class StoredBucket:
    """The bucket of a user on this machine, and this process's share of the user's rate on all machines.

    Args:
        here: the bucket of this machine, which holds alone while the store is away.
        rate: bytes per second, on all machines.
        rates: asks for the share.
        name: the user's, in the store.
    """

    __slots__ = ("__weakref__", "_here", "_moved", "_rate", "_rates", "_share", "_waited", "is_active", "name")

    def __init__(self, here: Bucket, rate: float, rates: UserRates, name: str) -> None:
        self._here = here
        self._rate = rate
        self._rates = rates
        self._share = TokenBucket(rate, empty=True)  # the burst is that of `here`
        self.name = name
        self.is_active = False
        self._moved = 0
        self._waited = False

    def spend(self, size: int) -> float:
        """As Bucket."""
        here, store = self._here.spend(size), self._rates.store
        if store.away and not store.refuses_all:
            return 0.0 if store.allows_all else here
        if not self.is_active:
            self._rates.begin(self)
        self._moved += size
        share = self._share.spend(size)  # which stays what it was where nobody new is admitted
        if share > 0:
            self._waited = True
        return max(here, share)

    def take_want(self, seconds: float) -> float:
        """Return the bytes per second that the user could have moved in the last seconds; 0: there was nothing."""
        moved, waited, self._moved, self._waited = self._moved, self._waited, 0, False
        if waited:
            return self._rate
        return min(self._rate, MORE * moved / seconds + LEAST_PART * self._rate) if moved else 0.0

    def set_share(self, share: float) -> None:
        self._share.change(max(share, LEAST_SHARE * self._rate))


class UserRates:
    """The shares of this process.

    Args:
        store: divides the rate.
        rate: bytes per second of a user, on all machines.
    """

    def __init__(self, store: Store, rate: float) -> None:
        self.store = store
        self._rate = rate
        self._active: dict[str, StoredBucket] = {}
        self._since = monotonic()
        self._number = store.add_part(self)

    def begin(self, bucket: StoredBucket) -> None:
        """Ask for a share at once: its user moves something again."""
        if self._ask([bucket], [self._rate]):
            self._active[bucket.name] = bucket
            bucket.is_active = True

    def renew(self) -> None:
        """As Part."""
        now = monotonic()
        seconds, self._since = max(now - self._since, 0.1), now
        buckets = list(self._active.values())
        wants = [bucket.take_want(seconds) for bucket in buckets]
        for bucket, want in zip(buckets, wants, strict=True):
            if not want:
                bucket.is_active = False
                del self._active[bucket.name]
        for at in range(0, len(buckets), AT_ONCE):
            self._ask(buckets[at : at + AT_ONCE], wants[at : at + AT_ONCE])

    def _ask(self, buckets: Sequence[StoredBucket], wants: Sequence[float]) -> bool:
        keys = [f"flow:{bucket.name}" for bucket in buckets]
        arguments = [repr(self._rate), *(f"{want:.3f}" for want in wants)]

        def answered(reply: Any) -> None:
            self._answered(buckets, wants, reply)

        return self.store.ask_share(SHARES, self._number, keys, arguments, answered)

    def _answered(self, buckets: Sequence[StoredBucket], wants: Sequence[float], reply: Any) -> None:
        if reply is None or reply == 0:  # away; or the lease was over, which the renewal notices, too
            return
        try:
            shares = [float(share) for share in reply]
            if len(shares) != len(buckets) or not all(0 <= share <= self._rate + 1 for share in shares):
                raise ValueError("these are no shares")
        except Exception as error:
            self.store.fail(StoreError(f"no answer of our script: {error}"))
            return
        for bucket, want, share in zip(buckets, wants, shares, strict=True):
            if want:
                bucket.set_share(share)
