"""What has no row, and what has no file: nothing that is not understood is ever removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stratabox.storage.catalog import images, layers, losses, operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.files import quarantine
from stratabox.storage.files.stock import under_way
from stratabox.storage.files.store import Store
from stratabox.storage.files.strays import Found
from stratabox.storage.model.ids import LayerId, Sha256, SnapshotId, mint
from stratabox.storage.model.records import MIB, SavedRam
from stratabox.storage.model.states import ImageState, LayerState, SandboxState, SnapshotState
from support.files import files
from support.records import Maker


@pytest.fixture(autouse=True)
def in_use(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        tx.next_generation()


def put(path: Path, content: str = "precious") -> str:
    path.write_text(content)
    return path.name


def kept(store: Store) -> dict[str, str]:
    """Folder and name → content of what is in the quarantine."""
    folder = store.layout.quarantine
    return {
        str(Path(*path.relative_to(folder).parts[1:])): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_nothing_explains_is_kept_aside(store: Store, catalog: Catalog) -> None:
    layout = store.layout
    strays = {
        f"layers/{put(layout.layer(LayerId(mint())))}": "precious",
        f"layers/{put(layout.layers / 'what.is.this')}": "precious",
        f"ram/{put(layout.ram_file(mint()))}": "precious",
        f"ram/{put(layout.merging(mint()))}": "precious",
        f"blobs/{put(layout.blob(Sha256('a' * 64)))}": "precious",
    }
    found = store.sweep_strays(catalog)
    assert kept(store) == strays
    assert {path.name for path in found.moved} == {Path(name).name for name in strays}
    held = quarantine.held(layout)
    assert (held.files, held.bytes > 0) == (len(strays), True)
    # Nothing is left to be moved, and what is in there stays.
    assert store.sweep_strays(catalog).moved == ()
    assert kept(store) == strays


def test_a_file_that_is_open_stays_what_it_is(store: Store, catalog: Catalog) -> None:
    path = store.layout.layer(LayerId(mint()))
    put(path)
    with path.open("r+") as opened:
        store.sweep_strays(catalog)
        opened.seek(0, os.SEEK_END)
        opened.write(", and more")
    assert list(kept(store).values()) == ["precious, and more"]


def test_what_an_operation_was_making_is_removed(
    store: Store, catalog: Catalog, maker: Maker
) -> None:
    """Its row names the files before they are there, and is asked before it is settled."""
    layout = store.layout
    overlay, snapshot = LayerId(mint()), SnapshotId(mint())
    operation = Operation(
        kind=Kind.SNAPSHOT,
        snapshot=snapshot,
        payload={"disks": [{"index": 0, "new": overlay}], "blobs": ["b" * 64]},
    )
    with catalog.transaction() as tx:
        operations.begin(tx, operation)
        image = images.insert(tx, maker.image(state=ImageState.CREATING))
        explained = under_way(tx)
    put(layout.layer(overlay))
    put(layout.layer(LayerId(image.id)))
    put(layout.ram_file(snapshot))
    put(layout.state_file(snapshot))
    put(layout.blob(Sha256("b" * 64)))
    # Not settled: somebody may still be writing them.
    store.sweep_strays(catalog, explained=explained)
    assert len(files(store)) == 5
    with catalog.transaction() as tx:
        operations.end(tx, operation.id)
        images.delete(tx, image.id)
    store.sweep_strays(catalog, explained=explained)
    assert files(store) == set()


def test_a_merge_that_was_stopped_is_removed(store: Store, catalog: Catalog) -> None:
    ram = mint()
    with catalog.transaction() as tx:
        rams.insert(tx, ram, saved())
    put(store.layout.ram_file(ram))
    put(store.layout.state_file(ram))
    put(store.layout.merging(ram))
    store.sweep_strays(catalog)
    assert files(store) == {f"ram/{ram}.ram", f"ram/{ram}.state"}


def test_killed_while_moving_it_is_in_one_place_at_least(
    store: Store, catalog: Catalog, arm: Callable[[str], None], synced: list[str]
) -> None:
    put(store.layout.layer(LayerId(mint())))
    synced.clear()
    arm("quarantine.moved=error")
    with pytest.raises(OSError, match="quarantine"):
        store.sweep_strays(catalog)
    # Where it has come to is on the disk; only then may its old place be forgotten.
    folder = next(store.layout.quarantine.iterdir())
    assert synced == ["quarantine", folder.name, "layers"]
    assert list(kept(store).values()) == ["precious"]


# -- losses ---------------------------------------------------------------------------------------


def saved(parent: str | None = None) -> SavedRam:
    from datetime import timedelta

    return SavedRam(
        parent=parent,
        own_bytes=MIB,
        state_sha256=Sha256("0" * 64),
        tracking="none",
        pause=timedelta(milliseconds=1),
        cpu_features=(),
    )


def note(catalog: Catalog, found: Found) -> set[str]:
    """Write the losses down; ids of the records that were changed."""
    with catalog.transaction() as tx:
        changed = losses.note(tx, found.missing_layers, found.missing_rams)
    return {str(record.id) for record in changed}


def test_what_needs_a_lost_layer_says_so_until_it_is_back(
    store: Store, catalog: Catalog, maker: Maker
) -> None:
    with catalog.transaction() as tx:
        base, lost, top = maker.chain(tx, 3)
        layers.seal(tx, dict.fromkeys((base, lost), 0))
        whole = snapshots.insert(tx, maker.snapshot(base))
        direct = snapshots.insert(tx, maker.snapshot(lost))
        failed = snapshots.insert(
            tx, maker.snapshot(state=SnapshotState.FAILED, failure_reason="no space")
        )
        stopped = sandboxes.insert(tx, maker.sandbox(top, state=SandboxState.STOPPED))
        (second,) = maker.chain(tx, 1)
        running = sandboxes.insert(tx, maker.sandbox(second, state=SandboxState.RUNNING))
    for layer in (base, top, second):
        put(store.layout.layer(layer))
    found = store.sweep_strays(catalog)
    assert found.missing_layers == {lost}
    assert note(catalog, found) == {direct.id, stopped.id}
    with catalog.transaction() as tx:
        told = snapshots.get(tx, direct.id)
        assert (told.state, told.disks) == (SnapshotState.FAILED, direct.disks)
        assert lost in told.failure_reason
        assert sandboxes.get(tx, stopped.id).state is SandboxState.FAILED
        assert lost in sandboxes.get(tx, stopped.id).state_reason
        assert snapshots.get(tx, whole.id) == whole
        assert snapshots.get(tx, failed.id) == failed
        assert sandboxes.get(tx, running.id) == running
        assert {layer.state for layer in layers.everything(tx)} <= set(LayerState)
    assert note(catalog, found) == set(), "told once"
    put(store.layout.layer(lost))
    assert note(catalog, store.sweep_strays(catalog)) == {direct.id, stopped.id}
    with catalog.transaction() as tx:
        back = snapshots.get(tx, direct.id)
        assert (back.state, back.failure_reason) == (SnapshotState.READY, "")
        assert sandboxes.get(tx, stopped.id).state is SandboxState.STOPPED


def test_lost_memory_leaves_the_disks(store: Store, catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        (base,) = maker.chain(tx, 1)
        below = snapshots.insert(tx, maker.snapshot(base))
        above = snapshots.insert(tx, maker.snapshot(base))
        rams.insert(tx, below.id, saved())
        rams.insert(tx, above.id, saved(below.id))
    put(store.layout.layer(base))
    put(store.layout.ram_file(above.id))
    put(store.layout.state_file(above.id))
    put(store.layout.state_file(below.id))
    found = store.sweep_strays(catalog)
    assert found.missing_rams == {below.id}
    assert note(catalog, found) == {below.id, above.id}
    with catalog.transaction() as tx:
        told = snapshots.get(tx, above.id)
    assert told.state is SnapshotState.READY
    assert "--cold" in told.failure_reason
