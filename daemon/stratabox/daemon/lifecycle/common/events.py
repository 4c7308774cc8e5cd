"""The bus: every change of a record goes to everyone who watches and may see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from stratabox.daemon.access import request_ids
from stratabox.daemon.access.ending import watch_again
from stratabox.storage.model.errors import ConflictError
from stratabox.storage.model.records import Image, Job, Sandbox, Snapshot, Volume
from stratabox.storage.model.workspaces import acting

BACKLOG = 4096
"""Events that a slow watcher may lag behind before it is sent away."""

Record = Sandbox | Snapshot | Image | Volume | Job


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
    request: str = ""
    """Id of the call that has brought it about; "": nobody's."""
    workspace: str | None = None
    """Whose the record is; None: everybody's."""


class Subscription:
    """One watcher's queue of events.

    :param workspace: whose; what is another's does not come in. None: sees all.
    """

    def __init__(self, workspace: str | None = None) -> None:
        self._workspace = workspace
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._behind = False

    def offer(self, event: Event) -> None:
        """Put one event in; a full queue ends the subscription instead of filling memory."""
        if None not in (self._workspace, event.workspace) and event.workspace != self._workspace:
            return
        if self._queue.qsize() >= BACKLOG:
            self._behind = True
        if not self._behind:  # nothing may follow what was missed
            self._queue.put_nowait(event)

    def end(self) -> None:
        """Let the watcher go once it has read what is there."""
        self._queue.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """All events, as they come.

        :raise ConflictError: WATCH_BEHIND, when the watcher was too slow and has missed some.
        :raise DaemonEndingError: when the daemon ends.
        """
        while True:
            if self._behind and self._queue.empty():
                raise ConflictError(
                    f"the watch fell more than {BACKLOG} events behind: start it again",
                    reason="WATCH_BEHIND",
                )
            event = await self._queue.get()
            if event is None:
                raise watch_again()
            yield event


class Bus:
    """Hands events to all subscribers. Used on the event loop only."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self.listeners: list[Callable[[Event], None]] = []
        """Called with each event, at once."""
        self.over = asyncio.Event()
        """Set when the daemon ends: whatever streams for ever ends, too."""

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Take part from now on, until the context ends: as who this task works for."""
        subscription = Subscription(acting.get())
        self._subscriptions.add(subscription)
        if self.over.is_set():
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def end(self) -> None:
        """Let all watchers go, who would stay for ever: for the daemon's own end."""
        self.over.set()
        for subscription in self._subscriptions:
            subscription.end()

    def publish(
        self,
        happening: Happening,
        record: Record,
        *,
        freed_bytes: int = 0,
        workspace: str | None = None,
    ) -> None:
        """Tell everyone who may know.

        :param workspace: whose it is, where the record does not say that itself: a job's.
        """
        if not isinstance(record, Image | Job):
            workspace = record.workspace
        event = Event(
            happening=happening,
            record=record,
            time=datetime.now(UTC),
            freed_bytes=freed_bytes,
            request=request_ids.current.get(),
            workspace=workspace,
        )
        for listen in self.listeners:
            listen(event)
        for subscription in self._subscriptions:
            subscription.offer(event)
