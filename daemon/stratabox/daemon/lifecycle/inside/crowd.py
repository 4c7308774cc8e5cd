"""The connections of one port: so many at once, and none left when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)

MOST = 128
"""Connections of one port at once."""


class Crowd:
    """Tasks, each one connection; used on the event loop only."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._room.set()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def is_full(self) -> bool:
        """There is no room for one more."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Wait until there is room for one more."""
        await self._room.wait()

    def enter(self, connection: Coroutine[Any, Any, None], name: str) -> None:
        """Let one in; the caller has seen that there is room."""
        task = asyncio.create_task(connection, name=name)
        self._tasks.add(task)
        if len(self._tasks) >= self._most:
            self._room.clear()
        task.add_done_callback(self._left)

    async def disperse(self) -> None:
        """End all of them, and wait until they have."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("%s ended", task.get_name(), exc_info=error)
