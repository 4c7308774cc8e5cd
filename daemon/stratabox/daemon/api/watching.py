"""What the watch RPCs share: the present records first, then every change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from stratabox.daemon.lifecycle.events import Bus, Event, Happening
from stratabox.storage.model.records import Sandbox, Snapshot

Watched = TypeVar("Watched", Sandbox, Snapshot)


async def watch(
    bus: Bus,
    kind: type[Watched],
    present: Callable[[], Awaitable[tuple[Sequence[Watched], Callable[[Watched], bool]]]],
    *,
    changes_only: bool,
) -> AsyncIterator[tuple[Event, Watched]]:
    """All events of the records that fit; without a gap between the present and the changes.

    `present` is asked once the watch has begun: it returns all records, and what fits.

    A record that changed while the present ones were read may be seen twice; its generation tells.

    :raise ConflictError: WATCH_BEHIND, when the watcher is too slow.
    """
    with bus.subscribe() as subscription:
        records, fits = await present()
        if not changes_only:
            for record in records:
                if fits(record):
                    now = datetime.now(UTC)
                    yield Event(happening=Happening.PRESENT, record=record, time=now), record
        async for event in subscription.events():
            if isinstance(event.record, kind) and fits(event.record):
                yield event, event.record
