"""Rows of the layers: what file stands on what file."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from stratabox.storage.catalog.database import Row, Transaction, text_of, time_of
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import LayerId
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
        },
    )


def seal(tx: Transaction, ids: Iterable[LayerId]) -> None:
    """From now on nothing writes these."""
    for layer in ids:
        tx.update("layers", layer, {"state": LayerState.SEALED, "sealed_at": text_of(tx.now)})


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


def referenced(tx: Transaction) -> set[LayerId]:
    """Layers that a record names: the roots of what must stay."""
    rows = tx.rows(
        """
        SELECT layer FROM disks
        UNION SELECT layer FROM snapshot_disks
        UNION SELECT layer FROM images WHERE layer IS NOT NULL
        """
    )
    return {LayerId(row["layer"]) for row in rows}


def users(tx: Transaction, layer: LayerId) -> list[str]:
    """Ids of the sandboxes and snapshots whose chains go through `layer`."""
    rows = tx.rows(
        """
        WITH RECURSIVE above (id) AS (
            SELECT ? UNION SELECT layers.id FROM layers JOIN above ON layers.parent = above.id
        )
        SELECT sandbox AS id FROM disks WHERE layer IN above
        UNION SELECT snapshot FROM snapshot_disks WHERE layer IN above
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
    while remaining:
        parents = {
            row["parent"]
            for row in tx.rows("SELECT DISTINCT parent FROM layers WHERE parent IS NOT NULL")
        }
        leaves = remaining - parents
        if not leaves:
            raise CorruptError(
                f"layers to drop still have children: {sorted(remaining)}", reason="CATALOG_CORRUPT"
            )
        for layer in leaves:
            tx.execute("DELETE FROM layers WHERE id = ?", (layer,))
        remaining -= leaves


def _layer(row: Row) -> Layer:
    return Layer(
        id=LayerId(row["id"]),
        parent=None if row["parent"] is None else LayerId(row["parent"]),
        state=LayerState(row["state"]),
        size=row["size"],
        created_at=datetime.fromisoformat(row["created_at"]),
        sealed_at=time_of(row["sealed_at"]),
    )
