"""Work that comes to its end whoever waits for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from stratabox.daemon.lifecycle.common.threads import (
    Tasks,
    carried_through,
    in_executor,
    in_thread,
    settle,
)


async def turn(times: int = 5) -> None:
    """Let everything that can run, run."""
    for _ in range(times):
        await asyncio.sleep(0)


async def waits_for(awaitable: Awaitable[object]) -> object:
    return await awaitable


async def test_settle_hands_over_result_and_error() -> None:
    async def work(error: Exception | None) -> str:
        await asyncio.sleep(0)
        if error:
            raise error
        return "done"

    assert await settle(work(None)) == "done"
    with pytest.raises(KeyError):
        await settle(work(KeyError("k")))


async def test_a_cancelled_waiter_leaves_when_the_work_is_over() -> None:
    over = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(waits_for(settle(over)))
    await turn()
    for _ in range(3):  # once, or as often as one likes
        waiter.cancel()
        await turn()
        assert not waiter.done()
        assert not over.cancelled()
    over.set_result("done")
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_who_is_cancelled_while_it_happens_hears_that_it_has_happened() -> None:
    over, known = asyncio.get_running_loop().create_future(), []

    async def work() -> None:
        known.append(await carried_through(over))
        await asyncio.sleep(0)
        known.append("and went on")

    waiter = asyncio.create_task(work())
    await turn()
    for _ in range(3):
        waiter.cancel()
        await turn()
        assert not waiter.done()
    over.set_result("done")
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert known == ["done"]


async def test_a_time_limit_beyond_what_is_carried_through_stays_a_time_limit() -> None:
    over = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with asyncio.timeout(0):
            asyncio.get_running_loop().call_later(0.01, over.set_result, "done")
            assert await carried_through(over) == "done"
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await work()
    await asyncio.sleep(0)


@pytest.mark.parametrize("wait", [settle, carried_through])
async def test_the_cancelled_hear_of_their_cancellation_not_of_the_error(
    wait: Callable[[Awaitable[object]], Awaitable[object]],
) -> None:
    over = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(waits_for(wait(over)))
    await turn()
    waiter.cancel()
    await turn()
    over.set_exception(ValueError("nobody asks any more"))
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_work_that_is_cancelled_itself_is_over() -> None:
    over = asyncio.get_running_loop().create_future()
    waiter = asyncio.create_task(waits_for(settle(over)))
    await turn()
    over.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_a_time_limit_passes_once_the_work_is_over() -> None:
    over = asyncio.get_running_loop().create_future()

    async def limited() -> object:
        async with asyncio.timeout(0):
            return await settle(over)

    waiter = asyncio.create_task(limited())
    await turn(20)
    assert not waiter.done()
    over.set_result("late")
    with pytest.raises(TimeoutError):
        await waiter


Runner = Callable[[Callable[[], object]], Awaitable[object]]


@pytest.mark.parametrize("where", ["thread", "executor"])
async def test_a_thread_is_waited_for_although_cancelled(where: str) -> None:
    began, go = threading.Event(), threading.Event()
    log: list[str] = []

    def block() -> str:
        began.set()
        assert go.wait(30)
        log.append("thread over")
        return "result"

    with ThreadPoolExecutor(1) as executor:
        run: Runner = in_thread if where == "thread" else lambda work: in_executor(executor, work)

        async def caller() -> None:
            try:
                await run(block)
            finally:
                log.append("caller undoes")

        task = asyncio.create_task(caller())
        assert await asyncio.to_thread(began.wait, 30)
        task.cancel()
        await turn()
        assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["thread over", "caller undoes"]
        assert await run(block) == "result"


async def test_in_thread_takes_arguments_and_leaves_the_loop_alone() -> None:
    def work(one: int, *, two: int) -> tuple[int, int]:
        assert threading.current_thread() is not threading.main_thread()
        return one, two

    assert await in_thread(work, 1, two=2) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


# -- tasks ----------------------------------------------------------------------------------------


async def test_see_through_goes_on_without_its_waiter() -> None:
    tasks, go, log = Tasks(), asyncio.Event(), list[str]()

    async def work() -> str:
        await go.wait()
        log.append("done")
        return "result"

    waiter = asyncio.create_task(tasks.see_through(work()))
    await turn()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert log == []
    go.set()
    await tasks.finish()
    assert log == ["done"]
    assert await tasks.see_through(work()) == "result"


async def test_finish_waits_also_for_what_tasks_start() -> None:
    tasks, log = Tasks(), list[str]()

    async def child() -> None:
        await turn()
        log.append("child")

    async def parent() -> None:
        await turn()
        tasks.spawn(child(), "child")
        log.append("parent")

    tasks.spawn(parent(), "parent")
    await tasks.finish()
    assert log == ["parent", "child"]
    await tasks.finish()


async def test_cancel_waits_until_the_undoing_is_done() -> None:
    tasks, log = Tasks(), list[str]()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await turn()
            log.append("undone")

    for number in range(3):
        tasks.spawn(work(), f"work {number}")
    await turn()
    await tasks.cancel()
    assert log == ["undone"] * 3
    await tasks.cancel()


async def test_an_error_that_nobody_hears_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ValueError("alone")

    tasks = Tasks()
    with caplog.at_level(logging.DEBUG):
        task = tasks.spawn(work(), "lonely work")
        await tasks.finish()
    assert "lonely work ended with ValueError('alone')" in caplog.text
    assert task.get_name() == "lonely work"
