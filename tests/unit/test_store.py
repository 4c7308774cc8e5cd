"""The files of the store: real qcow2 files, real fsyncs, and failures at the worst moment."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stratabox.storage.catalog import layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import NewOverlay, Store
from stratabox.storage.model.errors import CorruptError, InvalidArgumentError, NoSpaceError
from stratabox.storage.model.ids import LayerId, SandboxId, Sha256, mint
from stratabox.storage.model.records import MIB, Layer
from stratabox.storage.model.states import LayerState
from stratabox.storage.qcow2 import header, qemu_img
from support.files import files, mode
from support.records import Maker

SIZE = 64 * MIB


def new(parent: LayerId | None = None, size: int = SIZE) -> NewOverlay:
    return NewOverlay(LayerId(mint()), parent, size)


def read(path: Path) -> header.Header:
    return header.parse(path.read_bytes()[: header.HEAD_BYTES])


# -- folders --------------------------------------------------------------------------------------


def test_only_the_daemon_may_enter_the_folders(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a" / "state")
    Store(layout)
    Store(layout)
    assert all(mode(folder) == 0o700 for folder in layout.folders())


def test_no_path_of_ours_leaves_the_state_folder(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    sandbox, layer, blob = SandboxId(mint()), LayerId(mint()), Sha256("0" * 64)
    paths = [
        layout.lock, layout.catalog, layout.layer(layer), layout.blob(blob),
        layout.sandbox(sandbox), *layout.folders(),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


# -- overlays -------------------------------------------------------------------------------------


def test_overlays_are_made_durably_and_name_their_parent(store: Store, synced: list[str]) -> None:
    base, top = new(), new(LayerId(mint()), 2 * SIZE)
    store.make_overlays([base, top])
    paths = [store.layout.layer(overlay.id) for overlay in (base, top)]
    assert [mode(path) for path in paths] == [0o600, 0o600]
    assert synced == [paths[0].name, paths[1].name, "layers"]
    first, second = map(read, paths)
    assert (first.backing_file, first.virtual_size) == (None, SIZE)
    assert (second.backing_file, second.virtual_size) == (f"{top.parent}.qcow2".encode(), 2 * SIZE)
    assert qemu_img.check(paths[0]).clean


def test_an_overlay_reads_what_its_parent_holds(store: Store) -> None:
    base = new()
    store.make_overlays([base])
    write(store.layout.layer(base.id), 0xAB)
    top = new(base.id)
    store.make_overlays([top])
    command = ["qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0xab 0 64k"]
    done = subprocess.run(
        [*command, store.layout.layer(top.id)], capture_output=True, text=True, check=True
    )
    assert "verification failed" not in done.stdout


def write(path: Path, pattern: int) -> None:
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 64k"]
    subprocess.run([*command, path], capture_output=True, check=True)


def test_nothing_is_left_when_one_of_several_fails(store: Store) -> None:
    """A size that no qcow2 of ours may have; the first two have been made by then."""
    with pytest.raises(InvalidArgumentError, match="65 TiB"):
        store.make_overlays([new(), new(LayerId(mint())), new(size=65 << 40), new()])
    assert files(store) == set()


def test_nothing_is_left_when_the_folder_is_gone(store: Store) -> None:
    store.layout.layers.rmdir()
    with pytest.raises(FileNotFoundError):
        store.make_overlays([new()])


def test_a_file_that_is_there_is_not_lost(store: Store) -> None:
    overlay = new()
    store.make_overlays([overlay])
    before = store.layout.layer(overlay.id).stat().st_ino
    with pytest.raises(FileExistsError):
        store.make_overlays([new(), overlay])
    assert store.layout.layer(overlay.id).stat().st_ino == before
    assert len(files(store)) == 1


def test_nothing_is_left_when_the_disk_is_full(small_disk: Callable[[int], Path]) -> None:
    store = Store(Layout(small_disk(320) / "state"))
    with pytest.raises(NoSpaceError) as caught:
        store.make_overlays([new() for _ in range(40)])
    assert caught.value.reason == "NO_SPACE"
    assert files(store) == set()
    store.make_overlays([new()])


def test_a_full_disk_at_the_fsync_is_named_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed allocation: the disk says so only then."""

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError):
        store.make_overlays([new()])
    assert files(store) == set()


def test_a_disk_that_fails_is_not_called_full(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        store.make_overlays([new()])
    assert files(store) == set()


def test_overlays_that_came_to_nothing_are_removed(store: Store, synced: list[str]) -> None:
    made = [new(), new()]
    store.make_overlays(made)
    synced.clear()
    store.remove_overlays([*(overlay.id for overlay in made), LayerId(mint())])
    assert files(store) == set()
    assert synced == ["layers"]


# -- sealing --------------------------------------------------------------------------------------


def test_sealed_layers_are_durable_read_only_and_unchanged(store: Store, synced: list[str]) -> None:
    made = [new(), new()]
    store.make_overlays(made)
    paths = [store.layout.layer(overlay.id) for overlay in made]
    write(paths[0], 7)
    before = [durable.digest_file(path) for path in paths]
    synced.clear()
    sizes = store.seal(overlay.id for overlay in made)
    assert synced == [path.name for path in paths]
    assert [mode(path) for path in paths] == [0o400, 0o400]
    assert [durable.digest_file(path) for path in paths] == before
    assert [*sizes.values()] == [path.stat().st_blocks * 512 for path in paths]
    assert [*sizes] == [overlay.id for overlay in made]
    assert sum(sizes.values()) == store.bytes_of(sizes) >= 64 * 1024
    assert store.seal(overlay.id for overlay in made) == sizes


def test_sealing_what_is_gone(store: Store) -> None:
    lost = LayerId(mint())
    with pytest.raises(CorruptError) as caught:
        store.seal([lost])
    assert caught.value.reason == "LAYER_MISSING"
    assert caught.value.metadata == {"layer": lost}
    assert store.bytes_of([lost]) == 0


def test_an_image_is_moved_in_and_sealed(store: Store, synced: list[str]) -> None:
    source = store.layout.work / "built.qcow2"
    qemu_img.create_disk(source, SIZE)
    layer = store.adopt_image_layer(source)
    path = store.layout.layer(layer)
    assert not source.exists()
    assert mode(path) == 0o400
    assert synced == ["built.qcow2", "layers"]
    assert read(path).virtual_size == SIZE


# -- sweeping -------------------------------------------------------------------------------------


def grow(store: Store, catalog: Catalog, maker: Maker, length: int) -> list[LayerId]:
    """A chain in the catalog and on the disk, from the image up."""
    with catalog.transaction() as tx:
        made = maker.chain(tx, length)
        tx.next_generation()
    parents = [None, *made]
    store.make_overlays(
        NewOverlay(layer, parent, SIZE) for layer, parent in zip(made, parents, strict=False)
    )
    return made


def rows(catalog: Catalog) -> dict[LayerId, LayerState]:
    with catalog.transaction() as tx:
        return {layer.id: layer.state for layer in layers.everything(tx)}


def present(store: Store) -> set[str]:
    return {path.stem for path in store.layout.layers.iterdir()}


def test_sweep_removes_exactly_what_nothing_needs(
    store: Store, catalog: Catalog, maker: Maker
) -> None:
    base, kept, gone, top = grow(store, catalog, maker, 4)
    with catalog.transaction() as tx:
        sandboxes.insert(tx, maker.sandbox(kept))
        mine = snapshots.insert(tx, maker.snapshot(top))
    assert store.sweep(catalog) == 0
    assert present(store) == {base, kept, gone, top}
    before = store.bytes_of([gone, top])
    with catalog.transaction() as tx:
        snapshots.delete(tx, mine.id)
    assert store.sweep(catalog) == before > 0
    assert present(store) == set(rows(catalog)) == {base, kept}
    assert store.sweep(catalog) == 0


def test_sweep_fsyncs_the_folder_before_it_drops_the_rows(
    store: Store,
    catalog: Catalog,
    maker: Maker,
    synced: list[str],
    arm: Callable[[str], None],
) -> None:
    grow(store, catalog, maker, 2)
    synced.clear()
    arm("sweep.unlinked=error")
    with pytest.raises(OSError, match=r"sweep\.unlinked"):
        store.sweep(catalog)
    assert synced == ["layers"]
    assert present(store) == set()
    assert set(rows(catalog).values()) == {LayerState.GARBAGE}


@pytest.mark.parametrize("step", ["sweep.tombstoned", "sweep.unlinked"])
def test_a_sweep_that_was_stopped_is_taken_up_again(
    store: Store, catalog: Catalog, maker: Maker, arm: Callable[[str], None], step: str
) -> None:
    base, gone, top = grow(store, catalog, maker, 3)
    with catalog.transaction() as tx:
        sandboxes.insert(tx, maker.sandbox(base))
    arm(f"{step}=error")
    with pytest.raises(OSError, match=step):
        store.sweep(catalog)
    assert rows(catalog) == {
        base: LayerState.ACTIVE,
        gone: LayerState.GARBAGE,
        top: LayerState.GARBAGE,
    }
    assert present(store) == ({base, gone, top} if step == "sweep.tombstoned" else {base})
    arm("")
    store.layout.layer(gone).unlink(missing_ok=True)  # one of two was gone already
    store.sweep(catalog)
    assert present(store) == set(rows(catalog)) == {base}


def test_a_stopped_sweep_is_no_loss_to_report(
    store: Store,
    catalog: Catalog,
    maker: Maker,
    arm: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    grow(store, catalog, maker, 2)
    arm("sweep.unlinked=error")
    with pytest.raises(OSError, match="failpoint"):
        store.sweep(catalog)
    store.sweep_strays(catalog)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_losses_are_told(
    store: Store, catalog: Catalog, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    base, lost = grow(store, catalog, maker, 2)
    store.layout.layer(lost).unlink()
    (store.layout.work / "half-made").mkdir()
    (store.layout.work / "half-made" / "disk").write_bytes(b"")
    (store.layout.work / "blob-staged").write_bytes(b"")
    found = store.sweep_strays(catalog)
    assert found.moved == ()
    assert found.missing_layers == {lost}
    assert files(store) == {f"layers/{base}.qcow2"}
    assert list(store.layout.work.iterdir()) == []
    told = {record.levelno: record.getMessage() for record in caplog.records}
    assert lost in told[logging.ERROR]
    assert set(rows(catalog)) == {base, lost}


def test_a_new_catalog_does_not_cost_the_layers_of_a_lost_one(
    store: Store, catalog: Catalog
) -> None:
    """Somebody removed catalog.db: every layer looks like a stray then."""
    store.sweep_strays(catalog)
    orphan = new()
    store.make_overlays([orphan])
    with pytest.raises(CorruptError) as caught:
        store.sweep_strays(catalog)
    assert caught.value.reason == "CATALOG_LOST"
    assert present(store) == {orphan.id}


def test_a_record_of_a_layer_is_what_its_file_says(
    store: Store, catalog: Catalog, maker: Maker
) -> None:
    made = grow(store, catalog, maker, 3)
    with catalog.transaction() as tx:
        chain: list[Layer] = layers.chain(tx, made[-1])
    for layer in chain:
        backing = read(store.layout.layer(layer.id)).backing_file
        assert backing == (f"{layer.parent}.qcow2".encode() if layer.parent else None)
