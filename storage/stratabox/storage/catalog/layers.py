"""Rows of the layers: what file stands on what file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from stratabox.storage.catalog import contents
from stratabox.storage.catalog.database import Row, Transaction, text_of, time_of
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId, Sha256
from stratabox.storage.model.records import Layer
from stratabox.storage.model.states import LayerState


def insert(tx: Transaction, layer: Layer) -> None:
    """Add a layer. Its file need not exist yet; its parent's row must."""
    tx.insert(
        "layers",
        {
            "id": layer.id,
            "parent": layer.parent,
            "state": layer.state,
            "size": layer.size,
            "created_at": text_of(layer.created_at),
            "sealed_at": text_of(layer.sealed_at),
            "backing": layer.backing or layer.parent,
            "bytes": layer.bytes,
            "compressed": layer.compressed,
            "sha256": layer.sha256,
            "content": layer.content,
            "reads_as": layer.reads_as,
        },
    )


def seal(tx: Transaction, sizes: Mapping[LayerId, int]) -> None:
    """From now on nothing writes these.

    :param sizes: what each takes on the disk, bytes.
    """
    for layer, taken in sizes.items():
        changes = {"state": LayerState.SEALED, "sealed_at": text_of(tx.now), "bytes": taken}
        tx.update("layers", layer, changes)


def get(tx: Transaction, layer: LayerId) -> Layer:
    """One layer. :raise CorruptError: LAYER_MISSING, when it has no row."""
    row = tx.row("SELECT * FROM layers WHERE id = ?", (layer,))
    if row is None:
        raise CorruptError(f"the catalog has no layer {layer}", reason="LAYER_MISSING", layer=layer)
    return _layer(row)


def resize(tx: Transaction, layer: LayerId, size: int) -> None:
    """An active layer has been grown to `size` bytes."""
    tx.update("layers", layer, {"size": size})


def compressed_bytes(tx: Transaction, ids: Iterable[LayerId]) -> int:
    """What those of these layers take on the disk that are compressed."""
    total = 0
    for layer in dict.fromkeys(ids):
        row = tx.row("SELECT bytes FROM layers WHERE id = ? AND compressed", (layer,))
        total += row["bytes"] if row else 0
    return total


def exists(tx: Transaction, layer: LayerId) -> bool:
    """Tell whether a layer has a row."""
    return tx.row("SELECT id FROM layers WHERE id = ?", (layer,)) is not None


def move_children(tx: Transaction, old: LayerId, new: LayerId) -> None:
    """What stood on one layer stands on another from now on, which reads the same."""
    tx.execute("UPDATE layers SET parent = ? WHERE parent = ?", (new, old))
    contents.carry_over(tx, old, new)


def chain(tx: Transaction, top: LayerId) -> list[Layer]:
    """The chain from `top` down to the image's layer.

    :raise CorruptError: LAYER_MISSING, when `top` has no row.
    """
    rows = tx.rows(
        """
        WITH RECURSIVE chain (id, depth) AS (
            SELECT ?, 0
            UNION ALL
            SELECT layers.parent, depth + 1 FROM layers JOIN chain USING (id)
            WHERE layers.parent IS NOT NULL
        )
        SELECT layers.* FROM layers JOIN chain USING (id) ORDER BY depth
        """,
        (top,),
    )
    if not rows:
        raise CorruptError(f"the catalog has no layer {top}", reason="LAYER_MISSING", layer=top)
    return [_layer(row) for row in rows]


def depth(tx: Transaction, top: LayerId) -> int:
    """Layers in the chain below and with `top`; 0 when it is gone.

    It is asked for records that may be older than the catalog: events, and answers on their way.
    """
    row = tx.row(
        """
        WITH RECURSIVE below (id, parent) AS (
            SELECT id, parent FROM layers WHERE id = ?
            UNION SELECT layers.id, layers.parent FROM layers JOIN below ON layers.id = below.parent
        )
        SELECT count(*) AS layers FROM below
        """,
        (top,),
    )
    assert row is not None
    return int(row["layers"])


def everything(tx: Transaction) -> list[Layer]:
    """All layers, garbage too."""
    return [_layer(row) for row in tx.rows("SELECT * FROM layers")]


def states(tx: Transaction) -> Iterator[tuple[LayerId, LayerState]]:
    """Each layer and its state, one after the other: there may be very many."""
    for row in tx.connection.execute("SELECT id, state FROM layers"):
        yield LayerId(row["id"]), LayerState(row["state"])


def without_bytes(tx: Transaction) -> list[LayerId]:
    """Sealed layers of which it is not known yet what they take on the disk."""
    rows = tx.rows("SELECT id FROM layers WHERE state = 'sealed' AND bytes = 0")
    return [LayerId(row["id"]) for row in rows]


def set_bytes(tx: Transaction, sizes: Mapping[LayerId, int]) -> None:
    """Note what sealed layers take on the disk."""
    for layer, taken in sizes.items():
        tx.update("layers", layer, {"bytes": taken})


def referenced(tx: Transaction) -> set[LayerId]:
    """Layers that a record names: the roots of what must stay."""
    rows = tx.rows(
        """
        SELECT layer FROM disks
        UNION SELECT layer FROM snapshot_disks
        UNION SELECT layer FROM images WHERE layer IS NOT NULL
        UNION SELECT layer FROM volumes WHERE layer IS NOT NULL
        UNION SELECT layer FROM volume_snapshots
        """
    )
    return {LayerId(row["layer"]) for row in rows}


def users(tx: Transaction, layer: LayerId) -> list[str]:
    """Ids of the records, but for images, whose chains go through `layer`."""
    rows = tx.rows(
        """
        WITH RECURSIVE above (id) AS (
            SELECT ? UNION SELECT layers.id FROM layers JOIN above ON layers.parent = above.id
        )
        SELECT sandbox AS id FROM disks WHERE layer IN above
        UNION SELECT snapshot FROM snapshot_disks WHERE layer IN above
        UNION SELECT id FROM volumes WHERE layer IN above
        UNION SELECT id FROM volume_snapshots WHERE layer IN above
        """,
        (layer,),
    )
    return sorted(row["id"] for row in rows)


def mark_garbage(tx: Transaction, ids: Iterable[LayerId]) -> None:
    """Tombstone: nothing may come to need these any more; their files can go."""
    for layer in ids:
        tx.update("layers", layer, {"state": LayerState.GARBAGE})


def drop(tx: Transaction, ids: Iterable[LayerId]) -> None:
    """Remove rows of layers whose files are gone, children before parents."""
    remaining = set(ids)
    leaves = sorted(remaining)
    while leaves:
        layer = leaves.pop()
        row = tx.row(
            "SELECT parent, EXISTS (SELECT 1 FROM layers child WHERE child.parent = layers.id)"
            " AS has_children FROM layers WHERE id = ?",
            (layer,),
        )
        if layer not in remaining or (row and row["has_children"]):
            continue  # it comes again with the last of its children
        tx.execute("DELETE FROM layers WHERE id = ?", (layer,))
        remaining.discard(layer)
        if row and row["parent"] in remaining:
            leaves.append(LayerId(row["parent"]))
    if remaining:
        raise CorruptError(
            f"layers to drop still have children: {sorted(remaining)}", reason="CATALOG_CORRUPT"
        )


def _layer(row: Row) -> Layer:
    return Layer(
        id=LayerId(row["id"]),
        parent=None if row["parent"] is None else LayerId(row["parent"]),
        state=LayerState(row["state"]),
        size=row["size"],
        created_at=datetime.fromisoformat(row["created_at"]),
        sealed_at=time_of(row["sealed_at"]),
        backing=None if row["backing"] is None else LayerId(row["backing"]),
        bytes=row["bytes"],
        compressed=bool(row["compressed"]),
        sha256=None if row["sha256"] is None else Sha256(row["sha256"]),
        content=None if row["content"] is None else Sha256(row["content"]),
        reads_as=None if row["reads_as"] is None else Sha256(row["reads_as"]),
    )
