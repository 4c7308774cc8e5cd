"""Sees the host's clock jump, as after it was suspended, and has the guests' clocks set.

Under a suspended host everything stands still but CLOCK_REALTIME: CLOCK_MONOTONIC, by which QEMU's
guests and our own time-outs count, does not go on. So what a jump looks like is that the difference
of the two has changed; somebody who sets the clock by hand looks the same, forwards or backwards.

A guest that starts takes the right time by itself, and one that goes on from saved memory is told
it; only those that ran while the clock jumped are behind. What ran while no daemon did is told once
when a daemon takes it over, since nobody knows what the clock did meanwhile.

*Time-outs* (of freezes, commands, readiness, stops) count by the event loop's clock, which is
CLOCK_MONOTONIC: a sleep of the host is no part of them, and a freeze that was under way goes on
where it was, the guest having stood still as well. *Expiries* count by CLOCK_REALTIME on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from stratabox.daemon.lifecycle.running.guests import Guests

log = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between two looks."""
JUMP = 2.0
"""Seconds that are a jump; less is what NTP does to a clock all the time."""


def real_over_monotonic() -> float:
    """Seconds that the wall clock is ahead of the one that stands still with the host."""
    return (time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()) / 1e9


async def run(
    guests: Guests,
    *,
    offset: Callable[[], float],
    period: float = PERIOD,
) -> None:
    """Watch until cancelled. The guests that run at the beginning are told the time, too.

    :param offset: how far the wall clock is ahead, seconds.
    """
    await guests.set_clocks_soon()
    told = offset()
    while True:
        await asyncio.sleep(period)
        now = offset()
        # Compared with when they were last told, so that small steps count once they add up.
        if abs(now - told) > JUMP:
            log.warning("the host's clock jumped by %+.1f s: setting the guests'", now - told)
            told = now
            await guests.set_clocks_soon()
