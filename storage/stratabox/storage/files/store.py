"""The store: puts layers and blobs on the disk, seals them, and removes what nothing needs.

All functions block and belong in a thread. Whatever comes is staged, fsynced, and only then
named by the catalog; whatever goes loses its row's meaning first (a tombstone), then its file,
then its row. So a file without a row is garbage, and a row without a file is a loss to report.

Layers are owned by the daemon, mode 0600 while active and 0400 once sealed. QEMU never opens one
by name: it gets descriptors, so its own uid needs no right to any file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.catalog import gc, images, layers, operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction, json_of
from stratabox.storage.catalog.machines import blobs_of
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, Sha256, mint
from stratabox.storage.model.states import LayerState
from stratabox.storage.qcow2 import qemu_img

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewOverlay:
    """An overlay to be made: an empty layer of `size` bytes on `parent` (None: on nothing)."""

    id: LayerId
    parent: LayerId | None
    size: int


class Store:
    """The files of one state folder."""

    def __init__(self, layout: Layout) -> None:
        """Make the folders that are missing. :raise OSError: when that cannot be done."""
        self.layout = layout
        for folder in layout.folders():
            folder.mkdir(mode=0o700, parents=folder == layout.root, exist_ok=True)

    def make_overlays(self, overlays: Iterable[NewOverlay]) -> None:
        """Make the files of new active layers, durably; none is left when this raises.

        :raise NoSpaceError: when the disk is full.
        """
        made: list[Path] = []
        try:
            with durable.naming_a_full_disk():
                for overlay in overlays:
                    path = self.layout.layer(overlay.id)
                    made.append(path)
                    if overlay.parent is None:
                        qemu_img.create_disk(path, overlay.size)
                    else:
                        # A bare name: relative to the folder of the child, which is the same one.
                        backing = self.layout.layer_name(overlay.parent)
                        qemu_img.create_overlay(path, backing, overlay.size)
                    path.chmod(0o600)
                    durable.sync_file(path)
                durable.sync_folder(self.layout.layers)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise

    def remove_overlays(self, ids: Iterable[LayerId]) -> None:
        """Remove files of layers that never became part of anything."""
        for layer in ids:
            self.layout.layer(layer).unlink(missing_ok=True)
        durable.sync_folder(self.layout.layers)

    def seal(self, ids: Iterable[LayerId]) -> int:
        """Make layers durable and read-only, once nothing writes them any more.

        :return: bytes that they take on the disk.
        :raise CorruptError: LAYER_MISSING, when a file is not there.
        """
        total = 0
        for layer in ids:
            path = self.layout.layer(layer)
            if not path.exists():
                raise CorruptError(
                    f"the file of layer {layer} is missing", reason="LAYER_MISSING", layer=layer
                )
            path.chmod(0o400)  # before the fsync, which makes the mode durable too
            durable.sync_file(path)
            total += durable.allocated_bytes(path)
        return total

    def adopt_image_layer(self, source: Path) -> LayerId:
        """Take a standalone qcow2 into the store as a sealed layer; `source` is moved.

        `source` must lie on the state folder's file system, as the work folder does.
        """
        layer = LayerId(mint())
        source.chmod(0o400)
        durable.sync_file(source)
        source.rename(self.layout.layer(layer))
        durable.sync_folder(self.layout.layers)
        return layer

    def put_blob(self, source: Path) -> Sha256:
        """Copy a file into the store under its SHA-256, durably. Twice is the same as once.

        :raise NoSpaceError: when the disk is full; nothing is left then.
        """
        digest = Sha256(durable.digest_file(source))
        target = self.layout.blob(digest)
        if not target.exists():
            staged = self.layout.work / f"blob-{mint()}"
            try:
                with durable.naming_a_full_disk():
                    shutil.copyfile(source, staged)
                    if durable.digest_file(staged) != digest:
                        raise CorruptError(f"{source} changed while it was copied")
                    staged.chmod(0o444)
                    durable.sync_file(staged)
                    staged.rename(target)
            finally:
                staged.unlink(missing_ok=True)
        # Also for one that was there: who renamed it may have been killed before doing this.
        durable.sync_folder(self.layout.blobs)
        return digest

    def firmware_folder(self, files: Mapping[str, Sha256]) -> Path:
        """A folder with those blobs under those names, for QEMU's ``-L``.

        Made again at every use, so that a lost one costs nothing. Named by the hash of its content.

        :raise CorruptError: BLOB_MISSING, when a blob is not there.
        """
        folder = self.layout.firmware / hashlib.sha256(json_of(dict(files)).encode()).hexdigest()
        # QEMU enters it under a uid of its own, through an inherited descriptor.
        folder.mkdir(mode=0o755, exist_ok=True)
        folder.chmod(0o755)
        for name, digest in files.items():
            blob = self.blob_path(digest)
            link = folder / name
            if not link.exists() or not link.samefile(blob):
                staged = folder / f".{mint()}"
                os.link(blob, staged)
                try:
                    staged.rename(link)
                finally:
                    # Somebody else was quicker: rename does nothing between two links of one file.
                    staged.unlink(missing_ok=True)
        return folder

    def blob_path(self, digest: Sha256) -> Path:
        """Where a blob lies. :raise CorruptError: BLOB_MISSING, when it is not there."""
        path = self.layout.blob(digest)
        if not path.exists():
            raise CorruptError(f"blob {digest} is missing", reason="BLOB_MISSING", blob=digest)
        return path

    def bytes_of(self, ids: Iterable[LayerId]) -> int:
        """Bytes that layers take on the disk now."""
        return sum(durable.allocated_bytes(self.layout.layer(layer)) for layer in ids)

    def sweep(self, catalog: Catalog) -> int:
        """Remove the layers that nothing needs: tombstone, unlink, fsync, drop the rows.

        :return: bytes that came free.
        """
        freed_ram = self._sweep_ram(catalog)
        with catalog.transaction() as tx:
            doomed = _find_garbage(tx)
            layers.mark_garbage(tx, doomed)
        if not doomed:
            return freed_ram
        hit("sweep.tombstoned")
        freed = self.bytes_of(doomed)
        for layer in sorted(doomed):
            self.layout.layer(layer).unlink(missing_ok=True)
        durable.sync_folder(self.layout.layers)
        hit("sweep.unlinked")
        with catalog.transaction() as tx:
            layers.drop(tx, doomed)
        log.info("removed %d layers, %d bytes", len(doomed), freed)
        return freed + freed_ram

    def _sweep_ram(self, catalog: Catalog) -> int:
        """Remove saved memory that nothing stands on; returns the bytes that came free.

        Without a tombstone: nothing can come to need a RAM file whose snapshot is gone.
        """
        with catalog.transaction() as tx:
            doomed = rams.garbage(tx)
        if not doomed:
            return 0
        freed = self.ram_bytes(doomed)
        for ram in doomed:
            self.layout.ram_file(ram).unlink(missing_ok=True)
            self.layout.state_file(ram).unlink(missing_ok=True)
        durable.sync_folder(self.layout.ram)
        with catalog.transaction() as tx:
            for ram in doomed:
                rams.drop(tx, ram)
        return freed

    def ram_bytes(self, ids: Iterable[str]) -> int:
        """Bytes that saved memory takes on the disk now."""
        return sum(
            durable.allocated_bytes(self.layout.ram_file(ram))
            + durable.allocated_bytes(self.layout.state_file(ram))
            for ram in ids
        )

    def sweep_strays(self, catalog: Catalog, *, keep: Iterable[Sha256] = ()) -> None:
        """At start, before anything runs: remove files that no row names, report rows without.

        Safe only while nothing is under way: a file is made before its row is written. What an
        operation that could not be settled has made stays: a guest may be writing it.

        :param keep: blobs that stay although no record needs them yet.
        :raise CorruptError: CATALOG_LOST, when there are layers and the catalog is a new one.
        """
        with catalog.transaction() as tx:
            known = {
                self.layout.layer_name(layer.id): layer.state for layer in layers.everything(tx)
            }
            spared = {
                self.layout.layer_name(disk["new"])
                for operation in operations.unfinished(tx)
                for disk in operation.payload.get("disks", ())
            }
            (store,) = tx.rows("SELECT generation FROM store")
        found = sum(1 for _ in self.layout.layers.iterdir())
        if store["generation"] == 0 and found:
            # Each layer was made for a record. A catalog that never held one is not theirs.
            raise CorruptError(
                f"the catalog {self.layout.catalog} is new, but {self.layout.layers} holds {found}"
                " files: put the catalog that belongs to them back, or move them away",
                reason="CATALOG_LOST",
            )
        for path in self.layout.layers.iterdir():
            if path.name not in known and path.name not in spared:
                log.warning("removing stray layer %s", path.name)
                path.unlink()
        with catalog.transaction() as tx:
            saved = set(rams.everything(tx))
        for path in self.layout.ram.iterdir():
            if path.stem not in saved:
                log.warning("removing stray %s", path.name)
                path.unlink()
        self.sweep_blobs(catalog, keep)
        for path in self.layout.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        present = {path.name for path in self.layout.layers.iterdir()}
        for name, state in known.items():
            if name not in present and state is not LayerState.GARBAGE:
                log.error("layer %s is in the catalog but its file is gone: data is lost", name)

    def sweep_blobs(self, catalog: Catalog, keep: Iterable[Sha256]) -> None:
        """Remove the blobs that no record needs and `keep` does not name.

        Safe only while no image is being made: a blob is stored before its image's row is.
        """
        with catalog.transaction() as tx:
            wanted = _needed_blobs(tx) | set(keep)
        for path in self.layout.blobs.iterdir():
            if path.name not in wanted:
                path.unlink()
        for folder in self.layout.firmware.iterdir():
            # Hard links: one whose blob is gone is the last name of its file.
            if any(path.stat().st_nlink == 1 for path in folder.iterdir()):
                shutil.rmtree(folder)


def _needed_blobs(tx: Transaction) -> set[Sha256]:
    wanted: set[Sha256] = set()
    for sandbox in sandboxes.everything(tx):
        if not sandbox.state.is_over:
            wanted |= blobs_of(sandbox.machine)
    for snapshot in snapshots.everything(tx):
        wanted |= blobs_of(snapshot.machine)
    for image in images.everything(tx):
        if image.kernel_boot:
            wanted |= {image.kernel_boot.kernel, image.kernel_boot.initrd}
    return wanted


def _find_garbage(tx: Transaction) -> set[LayerId]:
    every = {layer.id: layer.parent for layer in layers.everything(tx)}
    return gc.garbage(layers.referenced(tx), every)
