"""Whoever wants a guest gone has those before them wait for nothing."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from stratabox.daemon.lifecycle.common.guest_lock import GuestLock


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def shut_down(
    lock: GuestLock, turn_of: AbstractAsyncContextManager[None], ended: list[str], name: str
) -> None:
    async with turn_of:
        if name.startswith("orderly"):
            await lock.hurry.wait()
        ended.append(name)


async def test_all_that_come_before_one_in_a_hurry_are_hurried() -> None:
    lock, ended = GuestLock(), list[str]()
    orderly = [
        asyncio.create_task(shut_down(lock, lock, ended, f"orderly {number}")) for number in (1, 2)
    ]
    await turn()
    forced = asyncio.create_task(shut_down(lock, lock.in_a_hurry(), ended, "forced"))
    later = asyncio.create_task(shut_down(lock, lock, ended, "orderly 3"))
    await asyncio.gather(*orderly, forced)
    await turn()
    assert ended == ["orderly 1", "orderly 2", "forced"]
    assert not lock.hurry.is_set()
    later.cancel()
    with pytest.raises(asyncio.CancelledError):
        await later
    assert not lock.locked()


async def test_one_that_gives_up_hurries_nobody_any_more() -> None:
    lock, ended = GuestLock(), list[str]()
    async with lock:
        forced = asyncio.create_task(shut_down(lock, lock.in_a_hurry(), ended, "forced"))
        await turn()
        assert lock.hurry.is_set()
        forced.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forced
        assert not lock.hurry.is_set()
    assert ended == []
