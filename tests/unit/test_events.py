"""Watchers see every change in order, or are told that they have missed some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from stratabox.daemon.lifecycle.common.events import (
    BACKLOG,
    Bus,
    Event,
    Happening,
    Record,
    Subscription,
)
from stratabox.storage.model.errors import ConflictError
from stratabox.storage.model.records import Sandbox
from support.records import Maker


async def take(events: AsyncIterator[Event], count: int) -> list[Event]:
    return [await anext(events) for _ in range(count)]


async def test_everyone_gets_everything_in_order(maker: Maker) -> None:
    bus = Bus()
    records: list[Record] = [maker.sandbox(), maker.snapshot(), maker.image()]
    before = datetime.now(UTC)
    with bus.subscribe() as one, bus.subscribe() as two:
        bus.publish(Happening.CREATED, records[0])
        bus.publish(Happening.UPDATED, records[1])
        bus.publish(Happening.DELETED, records[2], freed_bytes=7)
        seen = [await take(subscription.events(), 3) for subscription in (one, two)]
    assert seen[0] == seen[1]
    assert [event.record for event in seen[0]] == records
    assert [event.happening for event in seen[0]] == ["created", "updated", "deleted"]
    assert [event.freed_bytes for event in seen[0]] == [0, 0, 7]
    assert all(before <= event.time <= datetime.now(UTC) for event in seen[0])


async def test_a_watcher_that_waits_is_woken(maker: Maker) -> None:
    bus = Bus()
    with bus.subscribe() as subscription:
        waiting = asyncio.ensure_future(anext(subscription.events()))
        await asyncio.sleep(0)
        bus.publish(Happening.CREATED, record := maker.sandbox())
        assert (await waiting).record is record


async def test_the_watch_begins_and_ends_with_its_context(maker: Maker) -> None:
    bus = Bus()
    bus.publish(Happening.CREATED, maker.sandbox())
    with bus.subscribe() as subscription:
        bus.publish(Happening.UPDATED, inside := maker.sandbox())
    bus.publish(Happening.DELETED, maker.sandbox())
    events = subscription.events()
    assert (await anext(events)).record is inside
    nothing = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    assert not nothing.done()
    nothing.cancel()
    await asyncio.wait({nothing})


async def test_a_watcher_that_leaves_by_an_error_is_forgotten(maker: Maker) -> None:
    bus = Bus()
    with pytest.raises(KeyError), bus.subscribe():
        raise KeyError
    bus.publish(Happening.CREATED, maker.sandbox())
    assert not bus._subscriptions


def event(record: Sandbox, number: int) -> Event:
    return Event(
        happening=Happening.UPDATED, record=record, time=datetime.now(UTC), freed_bytes=number
    )


async def test_a_backlog_that_just_fits_is_no_reason_to_go(maker: Maker) -> None:
    subscription, record = Subscription(), maker.sandbox()
    for number in range(BACKLOG):
        subscription.offer(event(record, number))
    events = subscription.events()
    assert [one.freed_bytes for one in await take(events, BACKLOG)] == list(range(BACKLOG))
    subscription.offer(event(record, BACKLOG))
    assert (await anext(events)).freed_bytes == BACKLOG


async def test_who_is_too_slow_is_sent_away_and_sees_no_gap_before(maker: Maker) -> None:
    subscription, record = Subscription(), maker.sandbox()
    for number in range(BACKLOG + 1):
        subscription.offer(event(record, number))
    events = subscription.events()
    seen = await take(events, 2)
    # There is room again, but what follows now would follow a gap.
    subscription.offer(event(record, BACKLOG + 1))

    async def read_on() -> None:
        async for one in events:
            seen.append(one)

    with pytest.raises(ConflictError) as caught:
        await read_on()
    assert caught.value.reason == "WATCH_BEHIND"
    assert [one.freed_bytes for one in seen] == list(range(BACKLOG))


async def test_a_slow_watcher_does_not_cost_the_quick_ones(maker: Maker) -> None:
    bus, record = Bus(), maker.sandbox()
    with bus.subscribe(), bus.subscribe() as quick:
        events = quick.events()
        for number in range(BACKLOG + 10):
            bus.publish(Happening.UPDATED, record, freed_bytes=number)
            assert (await anext(events)).freed_bytes == number
