"""Locks by id, each kept for as long as somebody holds it or waits for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager


class Locks:
    """One lock for each id."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, *ids: str) -> AsyncIterator[None]:
        """Hold the locks of all these; whoever else holds several takes them in the same order."""
        async with AsyncExitStack() as stack:
            for each in sorted(set(ids)):
                await stack.enter_async_context(self._one(each))
            yield

    @asynccontextmanager
    async def _one(self, each: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(each, asyncio.Lock())
        self._users[each] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[each] -= 1
            if not self._users[each]:
                del self._users[each], self._locks[each]
