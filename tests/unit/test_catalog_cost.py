"""What is done often costs the same with ten times as many snapshots, in steps of SQLite's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from stratabox.storage.catalog import (
    garbage,
    idempotency,
    layers,
    lookup,
    rams,
    sandboxes,
    snapshots,
    space,
)
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.files import usage
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.ids import LayerId, SandboxId, Sha256, SnapshotId, mint
from stratabox.storage.model.records import SavedRam
from stratabox.storage.model.states import LayerState
from support.records import Maker

DEPTH = 14
PER_SANDBOX = 60


def fill(path: Path, count: int) -> tuple[Catalog, list[SnapshotId], SandboxId]:
    """So many snapshots of a few sandboxes, in chains, a third of them with memory."""
    catalog, maker, ids = Catalog(path), Maker(), []
    source = SandboxId(mint())
    with catalog.transaction() as tx:
        base = maker.layer(state=LayerState.SEALED, bytes=1 << 20)
        layers.insert(tx, base)
        top: LayerId = base.id
        for number in range(count):
            if number % PER_SANDBOX == 0:
                source = SandboxId(mint())
            layer = maker.layer(
                base.id if number % DEPTH == 0 else top, state=LayerState.SEALED, bytes=4096
            )
            layers.insert(tx, layer)
            top = layer.id
            shot = snapshots.insert(
                tx, maker.snapshot(top, source_sandbox=source, name=f"point {number}")
            )
            if number % 3 == 0:
                rams.insert(tx, shot.id, _ram())
            ids.append(shot.id)
        garbage.take(tx)
        tx.execute("DELETE FROM chain_hints")
    return catalog, ids, source


def _ram() -> SavedRam:
    return SavedRam(
        parent=None,
        own_bytes=1,
        bytes=1,
        state_sha256=Sha256("0" * 64),
        tracking="none",
        pause=timedelta(0),
        cpu_features=(),
    )


def steps(
    catalog: Catalog, work: Callable[[Transaction], object], workspace: str | None = None
) -> int:
    """How many tens of instructions of SQLite's machine a transaction takes."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with catalog.transaction(workspace) as tx:
        tx.connection.set_progress_handler(count, 10)
        try:
            work(tx)
        finally:
            tx.connection.set_progress_handler(None, 0)
    return counted


def page(tx: Transaction) -> None:
    records, _ = snapshots.list_page(tx, snapshots.Filter(), lookup.Page(size=50))
    space.of_snapshots(tx, records, lambda layer: 0)


def of_one(source: SandboxId) -> Callable[[Transaction], object]:
    wanted = snapshots.Filter(source=source)
    return lambda tx: snapshots.list_page(tx, wanted, lookup.Page(size=20))


def delete(snapshot: SnapshotId) -> Callable[[Transaction], object]:
    def work(tx: Transaction) -> None:
        record = snapshots.get(tx, snapshot)
        space.goes_with(tx, space.holding_of(record))
        space.users_above(tx, [disk.layer for disk in record.disks], 100)
        snapshots.delete(tx, snapshot)
        layers.drop(tx, garbage.take(tx))
        rams.garbage(tx)
        rams.merges(tx)

    return work


def look(tx: Transaction) -> None:
    snapshots.expired(tx)
    sandboxes.expired(tx)
    sandboxes.due_for_snapshot(tx)
    idempotency.expire(tx, timedelta(hours=24))


def count_bytes(tx: Transaction) -> None:
    usage.counted(tx, Layout(Path("/nonexistent")))


WORK: dict[str, Callable[[list[SnapshotId], SandboxId], Callable[[Transaction], object]]] = {
    "a page": lambda ids, source: page,
    "a page of one sandbox": lambda ids, source: of_one(source),
    "one": lambda ids, source: lambda tx: snapshots.get(tx, snapshots.resolve(tx, ids[-1][:20])),
    "by name": lambda ids, source: lambda tx: snapshots.resolve(tx, f"point {len(ids) - 7}"),
    "what is beyond": lambda ids, source: lambda tx: snapshots.beyond(tx, source, 2),
    "a deletion": lambda ids, source: delete(ids[-1]),
    "a look at what is due": lambda ids, source: look,
    "what counts against the budget": lambda ids, source: count_bytes,
}


@pytest.mark.parametrize("workspace", [None, "default"], ids=["everybody's", "one's own"])
@pytest.mark.parametrize("name", WORK)
def test_ten_times_as_many_cost_the_same(tmp_path: Path, name: str, workspace: str | None) -> None:
    taken = []
    for count in (300, 3000):
        catalog, ids, source = fill(tmp_path / f"{count}.db", count)
        taken.append(steps(catalog, WORK[name](ids, source), workspace))
        catalog.close()
    few, many = taken
    assert many <= 2 * few + 20, taken


def test_all_are_read_in_portions_and_none_twice(tmp_path: Path) -> None:
    catalog, ids, source = fill(tmp_path / "some.db", 130)
    with catalog.transaction() as tx:
        read: list[SnapshotId] = []
        last = None
        while records := snapshots.some(tx, None, last, count=40):
            assert len(records) <= 40
            read += [record.id for record in records]
            last = records[-1]
        assert read == ids
        assert [record.id for record in snapshots.some(tx, source, None)] == ids[120:]
    catalog.close()
