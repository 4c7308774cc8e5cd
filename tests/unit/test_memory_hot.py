"""Saved memories kept ready: made once, let go in order, never under somebody's hands."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from stratabox.daemon.hypervisor.machine import SavedMemory
from stratabox.daemon.hypervisor.memory.hot import HotMemory

SIZE = 2 << 20
"""A huge page: less takes as much, on a host that gives shared memory those."""


class Maker:
    """Makes memories of that size, and remembers them."""

    def __init__(self) -> None:
        self.made: list[SavedMemory] = []
        self.lock = threading.Lock()

    def __call__(self) -> SavedMemory:
        saved = SavedMemory(ram=os.memfd_create("ram"), state=os.memfd_create("state"))
        os.write(saved.ram, bytes(SIZE))
        with self.lock:
            self.made.append(saved)
        return saved

    def open(self) -> int:
        """How many of them nobody has closed."""
        return len({os.fstat(saved.ram).st_ino for saved in self.made if is_open(saved.ram)})


def is_open(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:ram")  # noqa: PTH115
    except OSError:
        return False


async def test_many_share_one() -> None:
    hot, make = HotMemory(10 * SIZE), Maker()

    async def use() -> SavedMemory:
        async with hot.use("a", make) as saved:
            await asyncio.sleep(0.01)
            return saved

    assert len(set(await asyncio.gather(*(use() for _ in range(20))))) == 1
    assert hot.holds("a")
    assert hot.size == SIZE
    hot.close()
    assert make.open() == 0


async def test_the_least_used_go_first_and_those_in_use_stay() -> None:
    hot, make = HotMemory(2 * SIZE), Maker()
    async with hot.use("a", make):
        for id in ("b", "c", "b", "d"):
            async with hot.use(id, make):
                pass
        assert (hot.holds("a"), hot.holds("c"), hot.holds("b")) == (True, False, False)
        assert make.open() == 2
    assert hot.size <= 2 * SIZE
    hot.close()
    assert make.open() == 0


async def test_one_that_is_deleted_under_its_user() -> None:
    hot, make = HotMemory(2 * SIZE), Maker()
    async with hot.use("a", make) as first:
        hot.forget("a")
        hot.forget("a")
        assert is_open(first.ram)
        async with hot.use("a", make) as second:
            assert second != first
    assert make.open() == 1
    hot.forget("a")
    assert make.open() == 0


async def test_one_that_cannot_be_made_is_tried_again() -> None:
    hot, make = HotMemory(2 * SIZE), Maker()

    def fail() -> SavedMemory:
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        async with hot.use("a", fail):
            pass
    assert not hot.holds("a")
    async with hot.use("a", make):
        assert hot.holds("a")
    hot.close()
