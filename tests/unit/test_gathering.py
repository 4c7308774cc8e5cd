"""Small pieces become larger ones, and nothing waits that nobody follows."""

from __future__ import annotations

import asyncio

import pytest

from stratabox.daemon.hypervisor.guest import gathering as gathering_module
from stratabox.daemon.hypervisor.guest.gathering import PIECE, Gathering


async def goes_on(gathering: Gathering, size: int) -> bool:
    """Whether it is passed on at once, without giving way to anything else."""
    waiting = gathering.more(size)
    try:
        waiting.send(None)
    except StopIteration:
        return True
    finally:
        waiting.close()
    return False


async def test_what_is_small_goes_on_at_once() -> None:
    assert await goes_on(Gathering(), 1)
    assert await goes_on(Gathering(), 4096)


async def test_what_is_enough_goes_on_at_once() -> None:
    assert await goes_on(Gathering(), PIECE)


async def test_a_full_packet_waits_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering_module, "_LINGER_SECONDS", 600)
    gathering = Gathering()
    waiting = asyncio.create_task(gathering.more(32 << 10))
    await asyncio.sleep(0)
    gathering.grew(64 << 10)
    await asyncio.sleep(0)
    assert not waiting.done()
    gathering.grew(PIECE)
    await asyncio.sleep(0)
    assert waiting.done()


async def test_a_full_packet_does_not_wait_for_ever() -> None:
    await asyncio.wait_for(Gathering().more(32 << 10), 30)


async def test_nothing_is_waited_for_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering_module, "_LINGER_SECONDS", 600)
    gathering = Gathering()
    waiting = asyncio.create_task(gathering.more(32 << 10))
    await asyncio.sleep(0)
    gathering.end()
    await asyncio.sleep(0)
    assert waiting.done()
    assert await goes_on(gathering, 32 << 10)
