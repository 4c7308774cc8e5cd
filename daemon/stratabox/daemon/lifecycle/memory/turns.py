"""Copies go one behind the other, a few at a time: all are done sooner so.

A guest that goes on from saved memory is cold: its first moments take a CPU whole. Sixteen side by
side on two CPUs take each other's caches and get a timer's interrupts for all the time that they
wait, which without KVM costs each of them 30 % more CPU than four do. So whoever starts many, or
runs the first commands of many, takes a turn for each. It is a courtesy and no lock: who holds a
turn for long (a guest whose agent is silent, a command that goes on) loses it, and the next begins.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FOR_EACH_CPU = 2
"""One waits for its disk or for the daemon now and then, and two do so seldom at once."""


class Turns:
    """So many at a time. For one event loop.

    :param count: how many; None: as this host's CPUs are used best by.
    """

    def __init__(self, count: int | None = None) -> None:
        self._free = asyncio.Semaphore(count or FOR_EACH_CPU * len(os.sched_getaffinity(0)))

    @asynccontextmanager
    async def turn(self, seconds: float) -> AsyncIterator[None]:
        """Wait for a turn, in order of coming, and hold it.

        :param seconds: after which the next one may begin although this one goes on.
        """
        await self._free.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(seconds, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()
