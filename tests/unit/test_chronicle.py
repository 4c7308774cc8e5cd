"""What is told of what happens, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from stratabox.daemon.access import request_ids
from stratabox.daemon.lifecycle.common.events import Bus, Happening
from stratabox.daemon.lifecycle.observing import chronicle
from stratabox.daemon.lifecycle.observing.chronicle import Chronicle, Entry, Subject
from stratabox.storage.model.errors import ConflictError, UnavailableError
from stratabox.storage.model.ids import VolumeId
from stratabox.storage.model.records import Volume
from stratabox.storage.model.states import VolumeState
from stratabox.storage.model.workspaces import acting

NOW = datetime.now(UTC)
VOLUME = Volume(
    id=VolumeId("v"),
    name="one",
    workspace="a",
    state=VolumeState.CREATING,
    size=1,
    created_at=NOW,
    updated_at=NOW,
)


async def collect(entries: AsyncIterator[Entry]) -> list[Entry]:
    return [each async for each in entries]


async def test_only_what_people_look_for_is_told() -> None:
    bus = Bus()
    told = Chronicle(bus)
    reset = request_ids.current.set("r-1")
    bus.publish(Happening.CREATED, VOLUME)
    request_ids.current.reset(reset)
    bus.publish(Happening.UPDATED, replace(VOLUME, generation=2, metadata={"a": "b"}))
    bus.publish(Happening.UPDATED, replace(VOLUME, name="two"))
    bus.publish(Happening.DELETED, replace(VOLUME, name="two"))
    bus.publish(Happening.CREATED, VOLUME)
    found = await collect(told.entries((), None, follow=False))
    assert [(each.happening, each.name, each.request) for each in found] == [
        ("created", "one", "r-1"), ("updated", "two", ""), ("deleted", "two", ""),
        ("created", "one", ""),
    ]  # fmt: skip
    assert await collect(told.entries([Subject.SANDBOX], None, follow=False)) == []
    late = datetime.now(UTC) + timedelta(hours=1)
    assert await collect(told.entries((), late, follow=False)) == []


async def test_each_workspace_hears_of_its_own() -> None:
    bus = Bus()
    told = Chronicle(bus)
    bus.publish(Happening.CREATED, VOLUME)
    bus.publish(Happening.CREATED, replace(VOLUME, id=VolumeId("w"), workspace="b"))
    for workspace, ids in (("a", ["v"]), ("b", ["w"]), ("c", []), (None, ["v", "w"])):
        reset = acting.set(workspace)
        found = await collect(told.entries((), None, follow=False))
        acting.reset(reset)
        assert [each.id for each in found] == ids


async def test_followers_get_all_and_hear_of_the_end() -> None:
    bus = Bus()
    told = Chronicle(bus)
    bus.publish(Happening.CREATED, VOLUME)
    new, old = told.entries((), None, follow=True), told.entries((), NOW, follow=True)
    assert (await anext(old)).name == "one"
    coming = [asyncio.ensure_future(anext(each)) for each in (new, old)]
    await asyncio.sleep(0)
    bus.publish(Happening.UPDATED, replace(VOLUME, name="two"))
    assert {(await each).name for each in coming} == {"two"}
    bus.publish(Happening.UPDATED, replace(VOLUME, name="three"))
    bus.end()
    assert (await anext(new)).name == "three"
    with pytest.raises(UnavailableError):
        await anext(new)


async def test_who_is_too_slow_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chronicle, "REMEMBERED", 3)
    bus = Bus()
    told = Chronicle(bus)
    bus.publish(Happening.CREATED, VOLUME)
    following = told.entries((), NOW, follow=True)
    await anext(following)
    for number in range(5):
        bus.publish(Happening.UPDATED, replace(VOLUME, name=str(number)))
    with pytest.raises(ConflictError):
        await anext(following)
    # Who asks anew gets what there is.
    found = await collect(told.entries((), None, follow=False))
    assert [each.name for each in found] == ["2", "3", "4"]
