"""Streams that would go on for ever end with the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from stratabox.daemon.access.ending import watch_again
from stratabox.daemon.lifecycle.common.events import Bus

T = TypeVar("T")


async def until_end(bus: Bus, source: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """All of `source`, which is closed at the end, whichever comes first.

    :raise DaemonEndingError: when the daemon ends.
    """
    over = asyncio.ensure_future(bus.over.wait())
    try:
        while True:
            coming: asyncio.Future[T | None] = asyncio.ensure_future(anext(source, None))
            either: set[asyncio.Future[Any]] = {coming, over}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise watch_again()
            finally:
                coming.cancel()
                await asyncio.wait({coming})
            item = coming.result()
            if item is None:
                return
            yield item
    finally:
        over.cancel()
        await source.aclose()
