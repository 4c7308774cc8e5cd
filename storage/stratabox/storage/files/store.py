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
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.catalog import garbage, layers, rams, seeds
from stratabox.storage.catalog.database import Catalog, json_of
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable, strays
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.stock import blobs_of_living, blobs_of_snapshots
from stratabox.storage.files.strays import Found
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, Sha256, mint
from stratabox.storage.qcow2 import empty

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
        durable.sync_folder(layout.root)

    def make_overlays(self, overlays: Iterable[NewOverlay], folder: Path | None = None) -> None:
        """Make the files of new active layers, durably; none is left when this raises.

        :param folder: stage them there, for `place_overlays`; None: among the layers.
        :raise NoSpaceError: when the disk is full.
        """
        folder = folder or self.layout.layers
        made: list[Path] = []
        try:
            with durable.naming_a_full_disk():
                for overlay in overlays:
                    path = self.layout.staged(folder, overlay.id)
                    # A bare name: relative to the folder of the child, which is the same one.
                    parent = overlay.parent and self.layout.layer_name(overlay.parent)
                    empty.create(path, overlay.size, parent)
                    made.append(path)
                durable.sync_folder(folder)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise

    def place_overlays(self, ids: Iterable[LayerId], folder: Path) -> None:
        """Move staged overlays among the layers, durably, once their rows are written.

        A QEMU that has them open goes on: it opened nothing by name.
        """
        for layer in ids:
            self.layout.staged(folder, layer).rename(self.layout.layer(layer))
        durable.sync_folder(self.layout.layers)

    def remove_overlays(self, ids: Iterable[LayerId]) -> None:
        """Remove files of layers that never became part of anything."""
        for layer in ids:
            self.layout.layer(layer).unlink(missing_ok=True)
        durable.sync_folder(self.layout.layers)

    def remove_ram(self, ram: str) -> None:
        """Remove files of saved memory that never became part of anything."""
        for path in (self.layout.ram_file(ram), self.layout.state_file(ram)):
            path.unlink(missing_ok=True)
        durable.sync_folder(self.layout.ram)

    def seal(self, ids: Iterable[LayerId]) -> dict[LayerId, int]:
        """Make layers durable and read-only, once nothing writes them any more.

        :return: bytes that each takes on the disk.
        :raise CorruptError: LAYER_MISSING, when a file is not there.
        """
        sizes = {}
        for layer in ids:
            path = self.layout.layer(layer)
            if not path.exists():
                raise CorruptError(
                    f"the file of layer {layer} is missing", reason="LAYER_MISSING", layer=layer
                )
            path.chmod(0o400)  # before the fsync, which makes the mode durable too
            durable.sync_file(path)
            sizes[layer] = durable.allocated_bytes(path)
        return sizes

    def adopt_image_layer(self, source: Path, layer: LayerId | None = None) -> LayerId:
        """Take a standalone qcow2 into the store as a sealed layer; `source` is moved.

        `source` must lie on the state folder's file system, as the work folder does.

        :param layer: its id, that of the record which is being made: so a file that a killed daemon
            left is known to be that record's.
        """
        layer = layer or LayerId(mint())
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

    def sweep(self, catalog: Catalog, *, whole: bool = False) -> int:
        """Remove the layers that nothing needs: tombstone, unlink, fsync, drop the rows.

        :param whole: look at every layer, not only at those that have lost something.
        :return: bytes that came free.
        """
        freed_ram = self._sweep_ram(catalog)
        with catalog.transaction() as tx:
            if whole:
                garbage.suspect_all(tx)
            doomed = garbage.take(tx)
            layers.mark_garbage(tx, doomed)
        if not doomed:
            return freed_ram
        hit("sweep.tombstoned")
        freed = self.bytes_of(doomed)
        for layer in doomed:
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

    def sweep_strays(
        self,
        catalog: Catalog,
        *,
        explained: Collection[str] = (),
        keep: Collection[Sha256] = (),
    ) -> Found:
        """At start, before anything runs: make files and rows agree, as ``strays.settle`` does.

        :param keep: blobs that stay although no record needs them yet.
        """
        found = strays.settle(self.layout, catalog, explained=explained, keep=keep)
        self._sweep_firmware()
        for layer in sorted(found.missing_layers):
            log.error("layer %s is in the catalog but its file is gone: data is lost", layer)
        for ram in sorted(found.missing_rams):
            log.error("saved memory %s is in the catalog but a file of it is gone", ram)
        return found

    def sweep_blobs(
        self, catalog: Catalog, keep: Iterable[Sha256], *, of_snapshots: Set[str] | None = None
    ) -> None:
        """Remove the blobs that no record needs and `keep` does not name.

        Safe only while no image is being made: a blob is stored before its image's row is.

        :param of_snapshots: what snapshots need, where that is known already.
        """
        with catalog.transaction() as tx:
            wanted = blobs_of_living(tx) | set(keep)
            wanted |= blobs_of_snapshots(tx) if of_snapshots is None else of_snapshots
            # No image keeps these for a snapshot that was taken since those were looked at.
            wanted |= seeds.of_snapshots(tx)
        for path in self.layout.blobs.iterdir():
            if path.name not in wanted:
                path.unlink()
        self._sweep_firmware()

    def drop_seed(self, catalog: Catalog, seed: Sha256) -> None:
        """Remove a seed unless some record needs it."""
        with catalog.transaction() as tx:
            needed = seeds.is_needed(tx, seed)
        if not needed:
            self.layout.blob(seed).unlink(missing_ok=True)

    def _sweep_firmware(self) -> None:
        for folder in self.layout.firmware.iterdir():
            # Hard links: one whose blob is gone is the last name of its file.
            if any(_names_of(path) == 1 for path in folder.iterdir()):
                shutil.rmtree(folder)


def _names_of(path: Path) -> int:
    """How many names a file has; 0: it is gone, as what `firmware_folder` has staged meanwhile."""
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0
