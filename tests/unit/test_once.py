"""Work that several wait for: joined, left, undone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from stratabox.daemon.lifecycle.common.once import Flights, Key
from stratabox.daemon.lifecycle.common.threads import Tasks
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError

KEY = Key(key="k", method="Create", request="hash")


class Work:
    """Runs until told, counts its starts, and takes its time for undoing."""

    def __init__(self) -> None:
        self.starts = 0
        self.go = asyncio.Event()
        self.may_end_undoing = asyncio.Event()
        self.undone = 0
        self.error: Exception | None = None

    async def run(self) -> int:
        self.starts += 1
        number = self.starts
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await self.may_end_undoing.wait()
            self.undone += 1
            raise
        if self.error:
            raise self.error
        return number


class Stage:
    def __init__(self) -> None:
        self.tasks = Tasks()
        self.flights = Flights(self.tasks)
        self.work = Work()

    # Properties, as mypy takes an attribute to stay what a test once found it to be.
    @property
    def starts(self) -> int:
        return self.work.starts

    @property
    def undone(self) -> int:
        return self.work.undone

    def call(self, key: Key | None = KEY, *, outlives: bool = False) -> asyncio.Task[int]:
        return asyncio.create_task(
            self.flights.join(key, self.work.run, name="work", outlives_callers=outlives)
        )


@pytest.fixture
async def stage() -> Stage:
    return Stage()


async def turn(times: int = 10) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def cancelled(task: Awaitable[object]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_key_is_worked_on_once(stage: Stage) -> None:
    callers = [stage.call() for _ in range(5)]
    await turn()
    late = stage.call()
    await turn()
    stage.work.go.set()
    assert await asyncio.gather(*callers, late) == [1] * 6
    assert stage.starts == 1


async def test_without_a_key_and_with_another_nothing_is_shared(stage: Stage) -> None:
    stage.work.go.set()
    callers = [stage.call(None), stage.call(None), stage.call(), stage.call(Key(
        key="l", method="Create", request="hash"))]  # fmt: skip
    assert sorted(await asyncio.gather(*callers)) == [1, 2, 3, 4]


async def test_when_it_is_over_the_key_is_free_again(stage: Stage) -> None:
    """What the key made is then found in the catalog, by the work itself."""
    stage.work.go.set()
    assert [await stage.call(), await stage.call()] == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        Key(key="k", method="Clone", request="hash"),
        Key(key="k", method="Create", request="other"),
    ],
)
async def test_another_request_under_way_is_a_mismatch(stage: Stage, other: Key) -> None:
    first = stage.call()
    await turn()
    with pytest.raises(InvalidArgumentError) as caught:
        await stage.call(other)
    assert caught.value.reason == "IDEMPOTENCY_MISMATCH"
    assert caught.value.metadata == {"idempotency_key": "k"}
    stage.work.go.set()
    assert await first == 1
    assert stage.starts == 1


async def test_all_hear_of_its_error(stage: Stage) -> None:
    stage.work.error = DeniedError("no")
    callers = [stage.call(), stage.call()]
    await turn()
    stage.work.go.set()
    assert await asyncio.gather(*callers, return_exceptions=True) == [stage.work.error] * 2
    stage.work.error = None
    assert await stage.call() == 2


async def test_the_last_caller_gone_ends_it_and_waits_for_the_undoing(stage: Stage) -> None:
    first, second = stage.call(), stage.call()
    await turn()
    first.cancel()
    await cancelled(first)
    assert stage.undone == 0
    second.cancel()
    await turn()
    assert not second.done()
    stage.work.may_end_undoing.set()
    await cancelled(second)
    assert stage.undone == 1
    await stage.tasks.finish()


async def test_without_a_key_too(stage: Stage) -> None:
    caller = stage.call(None)
    await turn()
    stage.work.may_end_undoing.set()
    caller.cancel()
    await cancelled(caller)
    assert stage.undone == 1


async def test_a_caller_that_stays_gets_the_result(stage: Stage) -> None:
    leaver, stayer = stage.call(), stage.call()
    await turn()
    leaver.cancel()
    await cancelled(leaver)
    stage.work.go.set()
    assert await stayer == 1
    assert stage.undone == 0


async def test_work_that_outlives_its_callers_can_be_joined_again(stage: Stage) -> None:
    leaver = stage.call(outlives=True)
    await turn()
    leaver.cancel()
    await cancelled(leaver)
    again = stage.call(outlives=True)
    await turn()
    stage.work.go.set()
    assert await again == 1
    assert (stage.starts, stage.undone) == (1, 0)


async def test_work_that_outlives_its_callers_comes_to_its_end(stage: Stage) -> None:
    leaver = stage.call(outlives=True)
    await turn()
    leaver.cancel()
    await cancelled(leaver)
    stage.work.error = DeniedError("nobody hears this")
    stage.work.go.set()
    await stage.tasks.finish()
    assert stage.undone == 0


async def test_who_asks_again_during_the_undoing_gets_a_fresh_start(stage: Stage) -> None:
    """A client that lost its connection and tries again with the same key, as keys are meant."""
    leaver = stage.call()
    await turn()
    leaver.cancel()
    await turn()
    again, too = stage.call(), stage.call()
    await turn()
    assert stage.starts == 1, "not before the first has undone itself"
    stage.work.may_end_undoing.set()
    await cancelled(leaver)
    await turn()
    stage.work.go.set()
    assert [await again, await too] == [2, 2]
    assert (stage.starts, stage.undone) == (2, 1)


async def test_who_asks_again_and_leaves_during_the_undoing_starts_nothing(stage: Stage) -> None:
    leaver = stage.call()
    await turn()
    leaver.cancel()
    await turn()
    again = stage.call()
    await turn()
    again.cancel()
    await cancelled(again)
    stage.work.may_end_undoing.set()
    await cancelled(leaver)
    await stage.tasks.finish()
    assert stage.starts == 1


async def test_a_caller_that_left_too_late_changes_nothing(stage: Stage) -> None:
    caller = stage.call()
    await turn()
    stage.work.go.set()
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    await stage.tasks.finish()
    assert stage.undone == 0
