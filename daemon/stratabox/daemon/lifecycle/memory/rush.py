"""What somebody waits for goes first: work in the background starts only in a quiet moment.

Use cases whose time counts (a restore, a save) *hold* the rush; work that only makes later ones
faster waits until it is `calm`. Nothing is interrupted: it is about starting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stratabox.daemon.lifecycle.memory.turns import Turns


class Rush:
    """How much is under way that somebody waits for. For one event loop."""

    def __init__(self) -> None:
        self.copies = Turns()
        """For the copies of a clone."""
        self.commands = Turns()
        """For the first commands of guests that go on from saved memory."""
        self._held = 0
        self._over = asyncio.Event()
        self._over.set()
        self._ended = float("-inf")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep work in the background from starting."""
        self._held += 1
        self._over.clear()
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._ended = time.monotonic()
                self._over.set()

    async def calm(self, seconds: float = 0.0) -> None:
        """Return when nobody has held it for so many seconds: who came once may come again."""
        while True:
            await self._over.wait()
            left = self._ended + seconds - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(left)
