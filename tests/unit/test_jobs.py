"""The small parts of jobs: bytes a second, and who keeps layers from being replaced."""

from __future__ import annotations

import asyncio
import threading

from stratabox.daemon.lifecycle.chains.opening import Opening
from stratabox.daemon.lifecycle.chains.rate import Rate


class Stop(threading.Event):
    """Notes how long it was waited for, instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.waited += timeout or 0.0
        return self.is_set()


def test_the_rate_is_kept_by_all_together() -> None:
    now = 100.0
    rate, stop = Rate(1000, clock=lambda: now), Stop()
    waits = []
    for size in (500, 250, 250):
        stop.waited = 0.0
        assert rate.take(size, stop)
        waits.append(round(stop.waited, 3))
    assert waits == [0.5, 0.75, 1.0]
    # What was not used is not saved up, but for a moment's worth.
    now = 200.0
    stop.waited = 0.0
    assert rate.take(1000, stop)
    assert round(stop.waited, 3) == 0.9


def test_no_limit_and_a_stop() -> None:
    stop = Stop()
    assert Rate(0).take(1 << 40, stop)
    assert stop.waited == 0
    stop.set()
    assert not Rate(0).take(1, stop)
    assert not Rate(1).take(1, stop)


async def test_layers_are_replaced_when_nobody_opens_any() -> None:
    opening, done = Opening(), []

    async def replace() -> None:
        await opening.free()
        done.append("replaced")

    with opening.hold():
        opening.begin("spare")
        opening.begin("spare")
        task = asyncio.create_task(replace())
        await asyncio.sleep(0)
        assert done == []
    await asyncio.sleep(0)
    assert done == []
    opening.end("spare")
    # Somebody else is quicker than the one that was woken.
    opening.begin("other")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == []
    opening.end("other")
    opening.end("other")
    await task
    assert done == ["replaced"]
