"""Steps that must come to their end once they have begun, cancelled or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run something that blocks; it is over when this returns, also when it is cancelled."""
    return await uncancelled(asyncio.to_thread(function, *args, **kwargs))


async def uncancelled(awaitable: Awaitable[T]) -> T:
    """Let it come to its end, and only then let a cancellation through."""
    future = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what the waiter hears of
        raise
