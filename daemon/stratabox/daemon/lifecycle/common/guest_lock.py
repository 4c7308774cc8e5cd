"""The lock of one guest, which some want in a hurry: to have the guest gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class GuestLock(asyncio.Lock):
    """Whoever has it may wait for the guest to end in order, unless `hurry` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = asyncio.Event()
        """Set while somebody waits for the lock in a hurry."""
        self._hurried = 0

    @asynccontextmanager
    async def in_a_hurry(self) -> AsyncIterator[None]:
        """Take it: whoever has it until then, and whoever comes first in the row, waits for
        nothing.
        """
        self._hurried += 1
        self.hurry.set()
        try:
            await self.acquire()
        finally:
            self._hurried -= 1
            if not self._hurried:
                self.hurry.clear()
        try:
            yield
        finally:
            self.release()
