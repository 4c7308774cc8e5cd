"""Work in the background waits until nobody is in a hurry."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from stratabox.daemon.lifecycle.memory import rush as rushes
from stratabox.daemon.lifecycle.memory.rush import Rush


async def is_calm(rush: Rush, seconds: float = 0) -> bool:
    """Whether it is calm by now, as far as tasks that are ready to run can tell."""
    waiting = asyncio.create_task(rush.calm(seconds))
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    return not waiting.cancelled()


async def test_it_is_held_by_everybody_in_it() -> None:
    rush = Rush()
    assert await is_calm(rush)
    assert await is_calm(rush, 3600)  # nobody was ever in a hurry
    with rush.hold():
        with rush.hold():
            assert not await is_calm(rush)
        assert not await is_calm(rush)
    assert await is_calm(rush)
    assert not await is_calm(rush, 3600)


async def test_a_new_rush_begins_the_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the test sets; who waits looks at it after each hundredth of a second."""
    now = 1000.0
    monkeypatch.setattr(rushes, "time", SimpleNamespace(monotonic=lambda: now))
    rush = Rush()
    with rush.hold():
        waiting = asyncio.create_task(rush.calm(0.01))
        await asyncio.sleep(0.02)
        assert not waiting.done()
    await asyncio.sleep(0)
    with rush.hold():
        now += 1
        await asyncio.sleep(0.02)
        assert not waiting.done()
    await asyncio.sleep(0.02)
    assert not waiting.done()
    now += 1
    await waiting
