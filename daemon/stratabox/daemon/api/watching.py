"""What the watch RPCs share: the present records first, then every change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import TypeVar

from stratabox.daemon.lifecycle.common.events import Bus, Event, Happening
from stratabox.storage.model.records import Sandbox, Snapshot

Watched = TypeVar("Watched", Sandbox, Snapshot)


async def watch(
    bus: Bus,
    kind: type[Watched],
    present: Callable[[], Awaitable[tuple[AsyncIterator[Watched], Callable[[Watched], bool]]]],
    *,
    changes_only: bool,
) -> AsyncIterator[tuple[Event, Watched]]:
    """All events of the records that fit; without a gap between the present and the changes.

    `present` is asked once the watch has begun: it returns all records, which it may read as they
    are wanted, and what fits.

    A record that changed while the present ones were read may be seen twice; its generation tells.

    :raise ConflictError: WATCH_BEHIND, when the watcher is too slow.
    """
    with bus.subscribe() as subscription:
        records, fits = await present()
        if not changes_only:
            async for record in records:
                if fits(record):
                    now = datetime.now(UTC)
                    yield Event(happening=Happening.PRESENT, record=record, time=now), record
        async for event in subscription.events():
            if isinstance(event.record, kind) and fits(event.record):
                yield event, event.record


async def one_by_one(records: Iterable[Watched]) -> AsyncIterator[Watched]:
    """Records that are all there already."""
    for record in records:
        yield record
