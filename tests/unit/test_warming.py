"""What is made ready at a start, in which order, and how much of the host's memory it may take."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stratabox.daemon.hypervisor.memory import headroom
from stratabox.daemon.lifecycle.memory.warming import MOST, last_used
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import SavedRam, Snapshot
from stratabox.storage.model.states import SnapshotState
from support.records import Maker as Records

records = Records()
START = datetime(2026, 1, 1, tzinfo=UTC)
RAM = SavedRam(
    parent=None, own_bytes=1, state_sha256=Sha256("0" * 64), tracking="written",
    pause=timedelta(), cpu_features=(),
)  # fmt: skip


def taken(minute: int, **fields: Any) -> Snapshot:
    """A memory snapshot of that minute."""
    when = START + timedelta(minutes=minute)
    return records.snapshot(**{"ready_at": when, "ram": RAM, **fields})


def test_the_last_used_come_first() -> None:
    old, new, newer = taken(1), taken(2), taken(3)
    disks, failed = taken(9, ram=None), taken(9, state=SnapshotState.FAILED)
    restores = [
        records.sandbox(source_snapshot=each, created_at=START + timedelta(minutes=at))
        for each, at in ((old.id, 30), (old.id, 4), (None, 50))
    ]
    found = last_used([newer, old, disks, failed, new], restores)
    assert [each.id for each in found] == [old.id, newer.id, new.id]
    assert len(last_used([taken(n) for n in range(20)], [])) == MOST


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal: 8192 kB\nMemFree: 1 kB\nMemAvailable: 3072 kB\n", 2048 << 10),
        ("MemTotal: 8192 kB\nMemAvailable: 24 kB\n", -1000 << 10),
        ("nothing of the kind\n", 0),
    ],
)
def test_an_eighth_is_left_to_others(tmp_path: Path, text: str, expected: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(text)
    assert headroom.spare_bytes(meminfo) == expected
