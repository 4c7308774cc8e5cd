"""Which changes of the host's clock have the guests' set."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import cast

import pytest

from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.upkeep import clockwatch


class Told:
    """In place of all guests: counts how often their clocks are set."""

    def __init__(self) -> None:
        self.times = 0

    async def set_clocks_soon(self) -> None:
        self.times += 1


@pytest.mark.parametrize(
    ("offsets", "times"),
    [
        ([0, 0, 0.001, 0], 1),  # those that were taken over, and no more
        ([0, 3600, 3600, 3600.5], 2),  # slept for an hour
        ([0, -3600], 2),  # set back by hand
        ([5, 6.9, 5, 6.9], 1),
        ([0, 0.9, 1.8, 2.7, 3.6], 2),  # small steps count once they add up
        ([1e9, 1e9 + 10, 1e9], 3),
    ],
)
async def test_jumps(offsets: list[float], times: int) -> None:
    told = Told()
    done = asyncio.Event()

    def looks() -> Iterator[float]:
        yield from offsets
        done.set()
        while True:
            yield offsets[-1]

    values = looks()
    task = asyncio.create_task(
        clockwatch.run(cast(Guests, told), offset=lambda: next(values), period=0)
    )
    await done.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert told.times == times


def test_the_offset_is_that_of_the_two_clocks() -> None:
    import time

    before = time.time() - time.monotonic()
    assert abs(clockwatch.real_over_monotonic() - before) < 1
