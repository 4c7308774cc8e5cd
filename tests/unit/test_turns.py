"""Turns: a few at a time, in order of coming, and nobody holds up the others for long."""

from __future__ import annotations

import asyncio

from stratabox.daemon.lifecycle.memory.turns import Turns

LONG = 3600.0


class Line:
    """Some who want a turn each, and hold it until they are told to end."""

    def __init__(self, turns: Turns, count: int, seconds: float = LONG) -> None:
        self.begun: list[int] = []
        self.starts = [asyncio.Event() for _ in range(count)]
        self.ends = [asyncio.Event() for _ in range(count)]
        self.tasks = [
            asyncio.create_task(self._hold(turns, number, seconds)) for number in range(count)
        ]

    async def _hold(self, turns: Turns, number: int, seconds: float) -> None:
        async with turns.turn(seconds):
            self.begun.append(number)
            self.starts[number].set()
            await self.ends[number].wait()

    async def look(self) -> list[int]:
        """Who has begun, as far as tasks that are ready to run can tell."""
        for _ in range(10):
            await asyncio.sleep(0)
        return self.begun

    async def leave(self) -> None:
        """End them all."""
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


async def test_so_many_at_a_time_and_in_order() -> None:
    line = Line(Turns(2), 5)
    assert await line.look() == [0, 1]
    line.ends[1].set()
    assert await line.look() == [0, 1, 2]
    line.ends[0].set()
    line.ends[2].set()
    assert await line.look() == [0, 1, 2, 3, 4]
    await line.leave()


async def test_who_holds_one_for_too_long_loses_it_once() -> None:
    turns = Turns(1)
    slow = Line(turns, 1, seconds=0)
    assert await slow.look() == [0]
    others = Line(turns, 2)
    async with asyncio.timeout(10):
        await others.starts[0].wait()
    # It ends only now, and must not give back what it has lost: there is one turn, not two.
    slow.ends[0].set()
    await asyncio.wait(slow.tasks)
    assert await others.look() == [0]
    await others.leave()


async def test_who_is_cancelled_holds_none() -> None:
    line = Line(Turns(1), 3)
    assert await line.look() == [0]
    line.tasks[1].cancel()  # while it waits
    line.tasks[0].cancel()  # while it holds one
    assert await line.look() == [0, 2]
    await line.leave()
