"""Blocks of a source, read and packed by some threads, and given in their order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.storage.files.memory import packing
from stratabox.storage.files.transfer.archive import BLOCK_MARK, Block, Digest, pack_block, sum_of
from stratabox.storage.files.transfer.sources import LayerSource, Source
from stratabox.storage.model.ids import Sha256
from stratabox.storage.qcow2.clusters import Clusters

_AHEAD = 6
"""Blocks that wait to be asked for, besides one for each thread."""
NO_BLOCK = 1 << 63
"""Above the number of any block."""

T = TypeVar("T")


@asynccontextmanager
async def threads() -> AsyncIterator[ThreadPoolExecutor]:
    """Threads that have ended with the context, whatever they were doing."""
    pool = packing.threads("transfer")
    try:
        yield pool
    finally:
        await in_thread(pool.shutdown, cancel_futures=True)


async def blocks(
    pool: ThreadPoolExecutor, source: Source, member: int, first: int = 0
) -> AsyncGenerator[Block, None]:
    """The blocks of a member that have content; those before number `first` only as sums.

    :raise CorruptError: as `Source.content`.
    """

    def make(number: int) -> Block | None:
        content = source.content(number)
        if content is None:
            return None
        if number >= first:
            return pack_block(member, number, content)
        return Block(
            mark=BLOCK_MARK,
            member=member,
            number=number,
            raw=len(content),
            sum=sum_of(number, content),
        )

    async with aclosing(_in_order(pool, make, source.numbers)) as made:
        async for block in made:
            if block is not None:
                yield block


async def content_of(clusters: Clusters, *, stands: bool) -> Sha256:
    """The digest of a layer, which is closed then."""
    async with threads() as pool:
        try:
            source = await in_thread(LayerSource, clusters, 0, stands=stands)
            digest = Digest(source.member.kind.unit, source.member.size)
            async with aclosing(blocks(pool, source, 0, first=NO_BLOCK)) as found:
                async for block in found:
                    digest.add(block.sum)
            return digest.text
        finally:
            await in_thread(pool.shutdown, cancel_futures=True)
            clusters.close()


async def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[int], T], numbers: Iterable[int]
) -> AsyncGenerator[T, None]:
    loop = asyncio.get_running_loop()
    made: deque[asyncio.Future[T]] = deque()
    most = pool._max_workers + _AHEAD
    try:
        for number in numbers:
            made.append(loop.run_in_executor(pool, make, number))
            if len(made) >= most:
                yield await made.popleft()
        while made:
            yield await made.popleft()
    finally:
        for future in made:
            future.cancel()
