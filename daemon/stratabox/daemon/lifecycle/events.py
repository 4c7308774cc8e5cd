"""The bus: every change of a record goes to everyone who watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from stratabox.storage.model.errors import ConflictError
from stratabox.storage.model.records import Image, Sandbox, Snapshot

BACKLOG = 4096
"""Events that a slow watcher may lag behind before it is sent away."""

Record = Sandbox | Snapshot | Image


class Happening(StrEnum):
    """What happened to a record."""

    PRESENT = "present"
    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One change. The record is the one after it, or before it when deleted."""

    happening: Happening
    record: Record
    time: datetime
    freed_bytes: int = 0
    """With a deleted snapshot: what really came free."""


class Subscription:
    """One watcher's queue of events."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue(BACKLOG)
        self._behind = False

    def offer(self, event: Event) -> None:
        """Put one event in; a full queue ends the subscription instead of filling memory."""
        if self._behind:
            return  # nothing may follow what was missed
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._behind = True

    async def events(self) -> AsyncIterator[Event]:
        """All events, as they come.

        :raise ConflictError: WATCH_BEHIND, when the watcher was too slow and has missed some.
        """
        while True:
            if self._behind and self._queue.empty():
                raise ConflictError(
                    f"the watch fell more than {BACKLOG} events behind: start it again",
                    reason="WATCH_BEHIND",
                )
            yield await self._queue.get()


class Bus:
    """Hands events to all subscribers. Used on the event loop only."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Take part from now on, until the context ends."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, happening: Happening, record: Record, *, freed_bytes: int = 0) -> None:
        """Tell everyone."""
        event = Event(
            happening=happening, record=record, time=datetime.now(UTC), freed_bytes=freed_bytes
        )
        for subscription in self._subscriptions:
            subscription.offer(event)
