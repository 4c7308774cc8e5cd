"""Room that is given up when the disk is full, and whose turn it is when there is some again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.upkeep.full_disk import FIRST_WAIT, LONGEST_WAIT, Turns
from stratabox.storage.files import reserve
from stratabox.storage.model.ids import SandboxId, mint


def test_it_is_taken_where_there_is_plenty_and_given_back(
    small_disk: Callable[[int], Path],
) -> None:
    folder = small_disk(64 << 10)
    path = folder / "reserve"
    before = reserve.free_bytes(folder)
    assert not reserve.release(path)
    assert reserve.take(path)
    assert path.stat().st_size == reserve.wanted_bytes(folder)
    assert 0 <= before - reserve.free_bytes(folder) - path.stat().st_size < 4096  # whole pages
    assert reserve.take(path)
    # Slice by slice, so that whoever else takes what comes free leaves the next one.
    taken, slices = reserve.free_bytes(folder), 0
    while reserve.release(path):
        slices += 1
        assert reserve.free_bytes(folder) == min(taken + slices * reserve.SLICE, before)
    assert slices == -(-reserve.wanted_bytes(folder) // reserve.SLICE) > 1
    assert reserve.free_bytes(folder) == before


def test_it_is_not_taken_from_what_others_may_need(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(64 << 10)
    (folder / "filler").write_bytes(bytes(reserve.free_bytes(folder) - (4 << 20)))
    assert not reserve.take(folder / "reserve")
    assert not (folder / "reserve").exists()


def test_each_try_that_came_to_nothing_waits_longer() -> None:
    turns, guest, now = Turns(), SandboxId(mint()), 1000.0
    waits = []
    for _ in range(10):
        assert turns.is_due(guest, now)
        turns.tried(guest, now)
        begun = now
        while not turns.is_due(guest, now):
            now += 1
        waits.append(now - begun)
    assert waits[0] == FIRST_WAIT
    assert waits == sorted(waits)
    assert waits[1] == 2 * FIRST_WAIT
    assert waits[-1] == LONGEST_WAIT
    # One that went well long ago is no reason to wait.
    now += 2 * LONGEST_WAIT
    turns.tried(guest, now)
    assert turns.is_due(guest, now + FIRST_WAIT)
    assert turns.is_due(SandboxId(mint()), now)


@pytest.mark.parametrize("new", ["", reasons.PAUSED_BY_USER])
def test_what_is_said_of_a_failed_disk_stays(new: str) -> None:
    mark = f"{reasons.DISK_FAILED}disk 1: it failed; look at it"
    kept = reasons.keeping(f"{reasons.PAUSED_FULL}; {mark}", new)
    assert reasons.failed_disk(kept) == mark
    assert kept.startswith(new)
    assert not reasons.is_full(kept)
    assert reasons.keeping("other", new) == new
