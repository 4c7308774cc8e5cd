"""Blocking work away from the event loop, and tasks that outlive whoever asked for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

log = logging.getLogger(__name__)

_NICE = 10

P = ParamSpec("P")
T = TypeVar("T")


async def settle(awaitable: Awaitable[T]) -> T:
    """Wait for something that must come to its end, whatever happens to the waiter.

    A thread cannot be cancelled. So when the waiter is, this still waits for the thread, and only
    then lets the cancellation through: what the waiter undoes next is then truly over.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _until_done(future)
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what the waiter hears of
        raise


async def carried_through(awaitable: Awaitable[T]) -> T:
    """Wait for something that must be known to have happened when it has.

    As `settle`, but for one thing: a waiter that is cancelled meanwhile gets the result all the
    same, and hears of the cancellation at its next step. It would undo, or forget, what is done.
    Nothing that ends within `asyncio.timeout` may end with this: the cancellation would be left.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _until_done(future)
        if future.cancelled() or future.exception() is not None:
            raise
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        task.cancel()
        return future.result()


async def _until_done(future: asyncio.Future[Any]) -> None:
    """Wait for it, cancelled however often."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future})


@contextlib.asynccontextmanager
async def undone_by(undo: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `undo` to its end when the body fails or is cancelled."""
    try:
        yield
    except BaseException:
        await settle(undo())
        raise


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread and wait until it is over, cancelled or not."""
    return await settle(asyncio.to_thread(function, *args, **kwargs))


async def in_executor(executor: Executor, function: Callable[[], T]) -> T:
    """Run blocking work in that executor and wait until it is over, cancelled or not."""
    return await settle(asyncio.get_running_loop().run_in_executor(executor, function))


def be_nice() -> None:
    """Lower this thread's priority, and so that of the threads that it starts (Linux)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


async def together(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Do all of them at once, to their ends; raises what the first that fails has raised."""
    for done in await asyncio.gather(*(work() for work in works), return_exceptions=True):
        if done is not None:
            raise done


class Tasks:
    """Tasks of the daemon's own, kept until they end, and waited for when it closes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start one."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Whoever waited has it too, but all of them may have gone.
            log.debug("%s ended with %r", task.get_name(), task.exception())

    async def see_through(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something that goes on to its end even when the waiter is cancelled."""
        return await asyncio.shield(self.spawn(coroutine, "see through"))

    async def finish(self) -> None:
        """Wait for those that run; nothing is cancelled."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """Cancel those that run, and wait until they have ended."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
