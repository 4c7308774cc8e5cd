"""Kernels, initrds and firmware: kept by their content, as long as a record needs them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import CorruptError, NoSpaceError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import KernelBoot
from stratabox.storage.model.states import SandboxState
from support.files import files, mode
from support.records import Maker


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

    bios_folder = store.firmware_folder({"bios-256k.bin": (bios := blob("bios"))})
    host_folder = store.firmware_folder({"bios-256k.bin": (host := blob("host"))})
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
    assert set(store.layout.firmware.iterdir()) == {bios_folder, host_folder}
    with catalog.transaction() as tx:
        images.delete(tx, image.id)
        snapshots.delete(tx, snapshot.id)
    store.sweep_blobs(catalog, [host])
    assert there() == {"host"}
    assert set(store.layout.firmware.iterdir()) == {host_folder}
    store.sweep_blobs(catalog, [])
    # What nothing explained at start is kept aside.
    (left,) = files(store)
    assert left.startswith("quarantine/")
    assert (store.layout.root / left).read_text() == "garbage"


def test_a_start_that_puts_its_firmware_there_meanwhile_stops_no_sweep(
    store: Store, catalog: Catalog, tmp_path: Path
) -> None:
    wanted = firmware(store, tmp_path, bios_256k=b"bios")
    folder = store.firmware_folder(wanted)
    # Of what is staged, its name is seen, and then it is gone.
    (folder / ".staged").symlink_to("gone")
    store.sweep_blobs(catalog, wanted.values())
    assert folder.exists()
    store.sweep_blobs(catalog, [])
    assert not folder.exists()


async def test_blobs_of_an_image_that_is_begun_meanwhile_stay(
    store: Store, catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel")
    path = store.blob_path(store.put_blob(tmp_path / "kernel"))
    busy: set[str] = set()

    async def read(look: Callable[[Transaction], Any]) -> Any:
        busy.add("an image, which finds this blob there and names it")
        with catalog.transaction() as tx:
            return look(tx)

    with ThreadPoolExecutor(1) as worker:
        world = cast(
            World,
            SimpleNamespace(read=read, worker=worker, store=store, catalog=catalog, firmware={}),
        )
        await World.sweep_blobs(world, busy)
        assert path.exists()
        busy.clear()
        await World.sweep_blobs(world, ())
        assert not path.exists()
