"""Between reading a chain in the catalog and opening its files no layer may be replaced.

Whoever does both *holds* the opening meanwhile. Who replaces layers waits until nobody does, and
then has his transaction run before anybody else's: the catalog's thread takes them in order. So
nobody who opens files waits for anything, and none finds a file gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Opening:
    """Who is about to open layers. For one event loop."""

    def __init__(self) -> None:
        self._holders: set[Hashable] = set()
        self._free = asyncio.Event()
        self._free.set()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep layers from being replaced."""
        holder = object()
        self.begin(holder)
        try:
            yield
        finally:
            self.end(holder)

    def begin(self, holder: Hashable) -> None:
        """The same for who ends it elsewhere. Idempotent."""
        self._holders.add(holder)
        self._free.clear()

    def end(self, holder: Hashable) -> None:
        """Let go. Idempotent."""
        self._holders.discard(holder)
        if not self._holders:
            self._free.set()

    async def free(self) -> None:
        """Return when nobody holds it; until the caller awaits again, nobody does."""
        while self._holders:
            await self._free.wait()
