"""At start: files that no row names, and rows whose files are gone.

What an operation of ours was making when it was killed is removed: its row, or the record that it
was for, names the files. Everything else that has no row is moved to the quarantine, as all that
was made since a backup of the catalog that was put back.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.catalog import layers, rams, sandboxes
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files import durable, quarantine
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.stock import (
    blobs_of_living,
    blobs_of_snapshots,
    files_of,
    under_way,
)
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, Sha256
from stratabox.storage.model.states import LayerState

_MERGING = ".merging"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What did not agree."""

    moved: tuple[Path, ...] = ()
    """Where the files are now that nothing explained."""
    missing_layers: frozenset[LayerId] = frozenset()
    """Layers with a row whose file is gone."""
    missing_rams: frozenset[str] = frozenset()
    """Saved memory with a row of which a file is gone."""


def settle(
    layout: Layout,
    catalog: Catalog,
    *,
    explained: Collection[str] = (),
    keep: Iterable[Sha256] = (),
) -> Found:
    """Remove, or move to the quarantine, the files that no row names; tell the rows without.

    Safe only while nothing is under way: a file is made before its row is written. What an
    operation that could not be settled has made stays: a guest may be writing it.

    :param explained: ids of what operations were making that have been settled since, and names of
        blobs.
    :param keep: blobs that stay although no record needs them yet.
    :raise CorruptError: CATALOG_LOST, when there are layers and the catalog is a new one.
    :raise OSError: when the disk fails.
    """
    with catalog.transaction() as tx:
        known = dict(layers.states(tx))
        saved = set(rams.everything(tx))
        unsettled = under_way(tx)
        living = {str(sandbox.id) for sandbox in sandboxes.everything(tx)}
        blobs = blobs_of_living(tx) | blobs_of_snapshots(tx) | set(keep)
        (store,) = tx.rows("SELECT generation FROM store")
    in_layers, in_ram = _names(layout.layers), _names(layout.ram)
    if store["generation"] == 0 and in_layers:
        # Each layer was made for a record. A catalog that never held one is not theirs.
        raise CorruptError(
            f"the catalog {layout.catalog} is new, but {layout.layers} holds {len(in_layers)}"
            " files: put the catalog that belongs to them back, or move them away",
            reason="CATALOG_LOST",
        )
    rows = {layout.layer_name(layer) for layer in known}
    rows |= {path.name for ram in saved for path in _files_of(layout, ram)}
    # Blobs have no other name than their sum.
    ours = {*explained, *files_of(explained), *(f"{ram}{_MERGING}" for ram in saved)}
    strays = [
        folder / name
        for folder, names in ((layout.layers, in_layers), (layout.ram, in_ram))
        for name in sorted(names - rows - files_of(unsettled))
    ]
    strays += [layout.blobs / name for name in sorted(_names(layout.blobs) - blobs - unsettled)]
    _remove([path for path in strays if path.name in ours])
    nobodys = [path for path in strays if path.name not in ours]
    moved = quarantine.move(layout, nobodys) if nobodys else {}
    for path in layout.sandboxes.iterdir():
        if path.name not in living:  # a warm spare's
            shutil.rmtree(path)
    for path in layout.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return Found(
        moved=tuple(moved.values()),
        missing_layers=frozenset(
            layer
            for layer, state in known.items()
            if state is not LayerState.GARBAGE and layout.layer_name(layer) not in in_layers
        ),
        missing_rams=frozenset(
            ram for ram in saved if not {path.name for path in _files_of(layout, ram)} <= in_ram
        ),
    )


def _remove(paths: Iterable[Path]) -> None:
    folders = set()
    for path in paths:
        path.unlink(missing_ok=True)
        folders.add(path.parent)
    for folder in folders:
        durable.sync_folder(folder)


def _files_of(layout: Layout, ram: str) -> tuple[Path, Path]:
    return layout.ram_file(ram), layout.state_file(ram)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
