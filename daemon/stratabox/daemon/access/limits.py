"""How many calls a key may make: a token bucket each, and a number of calls under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stratabox.storage.model.errors import RateLimitedError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What each key may do. 0: no limit."""

    rate: int
    """Calls a second, over a long time."""
    burst: int
    """Calls at once, after a while without."""
    open: int
    """Calls under way at a time, streams among them."""


class Bucket:
    """Fills by `rate` tokens a second, up to `size`."""

    def __init__(
        self, rate: float, size: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._size = size
        self._clock = clock
        self._level = size
        self._at = clock()

    def take(self) -> float:
        """Take one token. Returns 0, or the seconds until there is one; then none was taken."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level >= 1:
            self._level -= 1
            return 0.0
        return (1 - self._level) / self._rate


class Limiter:
    """Holds every caller to its limits."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._open: dict[str, int] = {}

    def take(self, caller: str) -> None:
        """Count one call.

        :raise RateLimitedError: RATE_LIMITED, saying when to try again.
        """
        if not self._limits.rate:
            return
        bucket = self._buckets.get(caller)
        if bucket is None:
            size = max(self._limits.burst, 1)
            bucket = self._buckets[caller] = Bucket(self._limits.rate, size, self._clock)
        if wait := bucket.take():
            raise RateLimitedError(
                f"this key's rate limit of {self._limits.rate} calls a second is reached: try again"
                f" in {wait:.3f} s",
                retry_after=wait,
                limit=self._limits.rate,
            )

    def enter(self, caller: str) -> None:
        """Count a call that is under way, until `leave`.

        :raise RateLimitedError: TOO_MANY_CALLS; it is not counted then.
        """
        count = self._open.get(caller, 0)
        if self._limits.open and count >= self._limits.open:
            raise RateLimitedError(
                f"{count} calls are under way with this key, its rate limit: end some first",
                reason="TOO_MANY_CALLS",
                retry_after=1.0,
                limit=self._limits.open,
            )
        self._open[caller] = count + 1

    def leave(self, caller: str) -> None:
        """A call that was counted has ended."""
        left = self._open[caller] - 1
        if left:
            self._open[caller] = left
        else:
            del self._open[caller]
