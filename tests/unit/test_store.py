"""The files of the store: real qcow2 files, real fsyncs, and failures at the worst moment."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.records import Maker

from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import NewOverlay, Store
from stratabox.storage.model.errors import CorruptError, FailedError, NoSpaceError
from stratabox.storage.model.ids import LayerId, SandboxId, Sha256, mint
from stratabox.storage.model.records import MIB, KernelBoot, Layer
from stratabox.storage.model.states import LayerState, SandboxState
from stratabox.storage.qcow2 import header, qemu_img

SIZE = 64 * MIB


def new(parent: LayerId | None = None, size: int = SIZE) -> NewOverlay:
    return NewOverlay(LayerId(mint()), parent, size)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files(store: Store) -> set[str]:
    """Everything below the state folder but the catalog."""
    root = store.layout.root
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("catalog.db")
    }


def read(path: Path) -> header.Header:
    return header.parse(path.read_bytes()[: header.HEAD_BYTES])


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fsynced, in order; the fsyncs are done all the same."""
    names: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


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
    """Sizes that qemu-img refuses; the first has been made by then."""
    with pytest.raises(FailedError) as caught:
        store.make_overlays([new(), new(LayerId(mint())), new(size=1 << 63), new()])
    assert caught.value.reason == "QEMU_IMG_FAILED"
    assert files(store) == set()


def test_nothing_is_left_when_the_folder_is_gone(store: Store) -> None:
    store.layout.layers.rmdir()
    with pytest.raises(FailedError):
        store.make_overlays([new()])


def test_nothing_is_left_when_the_disk_is_full(small_disk: Callable[[int], Path]) -> None:
    store = Store(Layout(small_disk(320) / "state"))
    with pytest.raises(NoSpaceError) as caught:
        store.make_overlays([new(), new(), new()])
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
    size = store.seal(overlay.id for overlay in made)
    assert synced == [path.name for path in paths]
    assert [mode(path) for path in paths] == [0o400, 0o400]
    assert [durable.digest_file(path) for path in paths] == before
    assert size == sum(path.stat().st_blocks * 512 for path in paths)
    assert size == store.bytes_of(overlay.id for overlay in made) >= 64 * 1024
    assert store.seal(overlay.id for overlay in made) == size


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


# -- blobs and firmware ---------------------------------------------------------------------------


def test_a_blob_is_kept_by_its_content(store: Store, tmp_path: Path, synced: list[str]) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_bytes(b"kernel")
    same.write_bytes(b"kernel")
    other.write_bytes(b"")
    digest = store.put_blob(one)
    assert synced[-1] == "blobs"
    assert synced[0].startswith("blob-")
    assert store.put_blob(same) == digest == durable.digest_file(one)
    assert synced[-1] == "blobs", "somebody may have been killed before this"
    assert store.put_blob(other) != digest
    path = store.blob_path(digest)
    assert path.read_bytes() == b"kernel"
    assert mode(path) == 0o444
    assert len(list(store.layout.blobs.iterdir())) == 2
    assert list(store.layout.work.iterdir()) == []
    assert one.exists()


def test_a_blob_that_is_not_there(store: Store) -> None:
    with pytest.raises(CorruptError) as caught:
        store.blob_path(Sha256("f" * 64))
    assert caught.value.reason == "BLOB_MISSING"


def test_a_blob_for_which_there_is_no_room_leaves_nothing(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    store = Store(Layout(small_disk(320) / "state"))
    source = tmp_path / "initrd"
    source.write_bytes(os.urandom(1 << 20))
    with pytest.raises(NoSpaceError):
        store.put_blob(source)
    assert files(store) == set()


def firmware(store: Store, folder: Path, **contents: bytes) -> dict[str, Sha256]:
    made = {}
    for name, content in contents.items():
        path = folder / "firmware-source"
        path.write_bytes(content)
        made[name.replace("_", "-") + ".bin"] = store.put_blob(path)
    return made


def test_firmware_lies_under_the_names_that_qemu_asks_for(store: Store, tmp_path: Path) -> None:
    wanted = firmware(store, tmp_path, bios_256k=b"bios", kvmvapic=b"rom")
    folder = store.firmware_folder(wanted)
    assert mode(folder) == 0o755
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "bios-256k.bin": b"bios",
        "kvmvapic.bin": b"rom",
    }
    assert all(mode(path) == 0o444 for path in folder.iterdir())
    inodes = {path.stat().st_ino for path in folder.iterdir()}
    assert inodes == {store.blob_path(digest).stat().st_ino for digest in wanted.values()}


def test_firmware_that_was_lost_or_swapped_is_mended(store: Store, tmp_path: Path) -> None:
    wanted = firmware(store, tmp_path, bios_256k=b"bios", kvmvapic=b"rom")
    folder = store.firmware_folder(wanted)
    (folder / "kvmvapic.bin").unlink()
    (folder / "bios-256k.bin").unlink()
    (folder / "bios-256k.bin").write_bytes(b"not ours")
    folder.chmod(0o700)
    assert store.firmware_folder(wanted) == folder
    assert (folder / "bios-256k.bin").read_bytes() == b"bios"
    assert (folder / "kvmvapic.bin").read_bytes() == b"rom"
    assert mode(folder) == 0o755


def test_firmware_without_its_blob(store: Store, tmp_path: Path) -> None:
    wanted = firmware(store, tmp_path, bios_256k=b"bios")
    with pytest.raises(CorruptError) as caught:
        store.firmware_folder({**wanted, "kvmvapic.bin": Sha256("f" * 64)})
    assert caught.value.reason == "BLOB_MISSING"


def test_many_starts_at_once_share_one_firmware_folder(store: Store, tmp_path: Path) -> None:
    wanted = firmware(store, tmp_path, bios_256k=b"bios", kvmvapic=b"rom", linuxboot_dma=b"boot")
    failures: list[BaseException] = []
    for _ in range(10):
        barrier = threading.Barrier(8)

        def start(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                store.firmware_folder(wanted)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        folder = store.firmware_folder(wanted)
        assert {path.name for path in folder.iterdir()} == set(wanted)
        for path in folder.iterdir():
            path.unlink()
    assert failures == []


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


def test_strays_go_and_losses_are_told(
    store: Store, catalog: Catalog, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    base, lost = grow(store, catalog, maker, 2)
    store.layout.layer(lost).unlink()
    stray = new()
    store.make_overlays([stray])
    (store.layout.layers / "what.is.this").write_bytes(b"")
    (store.layout.work / "half-made").mkdir()
    (store.layout.work / "half-made" / "disk").write_bytes(b"")
    (store.layout.work / "blob-staged").write_bytes(b"")
    store.sweep_strays(catalog)
    assert files(store) == {f"layers/{base}.qcow2"}
    assert list(store.layout.work.iterdir()) == []
    told = {record.levelno: record.getMessage() for record in caplog.records}
    assert stray.id in caplog.text
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


def test_blobs_live_as_long_as_a_record_needs_them(
    store: Store, catalog: Catalog, maker: Maker, tmp_path: Path
) -> None:
    def blob(content: str) -> Sha256:
        path = tmp_path / "blob"
        path.write_text(content)
        return store.put_blob(path)

    def there() -> set[str]:
        return {path.read_text() for path in store.layout.blobs.iterdir()}

    def boot(name: str) -> KernelBoot:
        return KernelBoot(kernel=blob(f"{name} k"), initrd=blob(f"{name} i"), command_line="")

    store.firmware_folder({"bios-256k.bin": (bios := blob("bios"))})
    store.firmware_folder({"bios-256k.bin": (host := blob("host"))})
    old = maker.machine(firmware={"bios-256k.bin": bios})
    with catalog.transaction() as tx:
        image = images.insert(tx, maker.image(kernel_boot=boot("image")))
        sandbox = sandboxes.insert(
            tx,
            maker.sandbox(
                machine=maker.machine(firmware={}, kernel_boot=boot("sandbox")),
                state=SandboxState.STOPPED,
            ),
        )
        snapshot = snapshots.insert(tx, maker.snapshot(machine=old))
    blob("garbage")
    everything = {"image k", "image i", "sandbox k", "sandbox i", "bios", "host"}
    store.sweep_strays(catalog, keep=[host])
    assert there() == everything
    with catalog.transaction() as tx:
        sandboxes.change(tx, sandbox.id, state=SandboxState.TERMINATING)
    store.sweep_blobs(catalog, [host])
    assert there() == everything - {"sandbox k", "sandbox i"}
    assert {path.name for path in store.layout.firmware.iterdir()} == {bios, host}
    with catalog.transaction() as tx:
        images.delete(tx, image.id)
        snapshots.delete(tx, snapshot.id)
    store.sweep_blobs(catalog, [host])
    assert there() == {"host"}
    assert {path.name for path in store.layout.firmware.iterdir()} == {host}
    store.sweep_blobs(catalog, [])
    assert files(store) == set()


def test_a_record_of_a_layer_is_what_its_file_says(
    store: Store, catalog: Catalog, maker: Maker
) -> None:
    made = grow(store, catalog, maker, 3)
    with catalog.transaction() as tx:
        chain: list[Layer] = layers.chain(tx, made[-1])
    for layer in chain:
        backing = read(store.layout.layer(layer.id)).backing_file
        assert backing == (f"{layer.parent}.qcow2".encode() if layer.parent else None)
