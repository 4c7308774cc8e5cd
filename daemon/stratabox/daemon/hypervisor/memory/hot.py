"""Saved memory that is ready to be mapped: made once, shared by all who start from it.

A snapshot's RAM takes memory here for as long as it is kept, and elsewhere for as long as a guest
maps it. The least recently used are let go when all together exceed a bound; one that is in use
never is. What is let go is made again from its files.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from stratabox.daemon.hypervisor.machine import SavedMemory
from stratabox.daemon.hypervisor.memory.threads import in_thread

Make = Callable[[], SavedMemory]


@dataclass
class _Entry:
    making: asyncio.Lock = field(default_factory=asyncio.Lock)
    saved: SavedMemory | None = None
    size: int = 0
    users: int = 0
    deleted: bool = False


class HotMemory:
    """Saved memories by the ids of their snapshots.

    :param limit: bytes that may be kept for those that nobody uses.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of memory that all of them take."""
        return sum(entry.size for entry in self._entries.values())

    def holds(self, id: str) -> bool:
        """Tell whether that one is ready."""
        entry = self._entries.get(id)
        return entry is not None and entry.saved is not None

    @asynccontextmanager
    async def use(self, id: str, make: Make) -> AsyncIterator[SavedMemory]:
        """Have one for as long as a start needs it; a QEMU that runs has its own hold on it.

        :param make: assembles it, in a thread; called once, however many want it.
        :raise CorruptError, OSError: as `make`.
        """
        entry = self._entries.setdefault(id, _Entry())
        self._entries.move_to_end(id)
        entry.users += 1
        try:
            async with entry.making:
                if entry.saved is None:
                    entry.saved = await in_thread(make)
                    entry.size = os.fstat(entry.saved.ram).st_blocks * 512
            yield entry.saved
        finally:
            entry.users -= 1
            if entry.deleted:
                self._end(entry)
            self._shrink()

    def forget(self, id: str) -> None:
        """Let go of one whose snapshot is deleted; one in use goes when its last user does."""
        entry = self._entries.pop(id, None)
        if entry is not None:
            entry.deleted = True
            self._end(entry)

    def close(self) -> None:
        """Let go of all; nobody may use one any more."""
        while self._entries:
            _, entry = self._entries.popitem()
            self._end(entry)

    def _shrink(self) -> None:
        for id, entry in list(self._entries.items()):
            if not entry.users and (entry.saved is None or self.size > self._limit):
                del self._entries[id]
                self._end(entry)

    @staticmethod
    def _end(entry: _Entry) -> None:
        if not entry.users and entry.saved is not None:
            os.close(entry.saved.ram)
            os.close(entry.saved.state)
            entry.saved = None
