"""What sealed layers hold: by that, and not by ids or files, two stores know a layer again.

`content` is of the clusters that a layer holds itself. `reads_as` is of all that is read through
it: of its content on top of what its parent reads as. Two layers that read as the same are the same
disk; the same disk may have other names, too, as it can be cut into layers in many ways. So a layer
that takes another one's place, because they read the same, takes its name as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from stratabox.storage.catalog.database import Transaction, json_of
from stratabox.storage.catalog.lookup import own
from stratabox.storage.model.ids import LayerId, Sha256


def name_of(content: Sha256, below: Sha256 | None) -> Sha256:
    """What a layer reads as.

    :param below: what its parent reads as; None: it has none.
    """
    both = f"stratabox layer {content} on {below or 'nothing'}"
    return Sha256(hashlib.sha256(both.encode()).hexdigest())


def note(tx: Transaction, layer: LayerId, content: Sha256, below: Sha256 | None) -> None:
    """Keep what was found out about a sealed layer, if it is still there.

    :param below: what its parent reads as; None: it has none.
    """
    tx.execute(
        "UPDATE layers SET content = ?, reads_as = coalesce(reads_as, ?) WHERE id = ?",
        (content, name_of(content, below), layer),
    )


def carry_over(tx: Transaction, old: LayerId, new: LayerId) -> None:
    """One layer takes the place of another, as it reads the same."""
    tx.execute(
        "UPDATE layers SET reads_as ="
        " coalesce((SELECT reads_as FROM layers WHERE id = ?), reads_as) WHERE id = ?",
        (old, new),
    )


def reading_as(tx: Transaction, name: Sha256, size: int) -> LayerId | None:
    """A sealed layer of which it is known that it reads as this, and that a record has.

    An image, or a record of whom the transaction is for: who knows a sum does not get another's
    bytes by it.

    One that others merely stand on may be merged into them at any moment: none to build on.

    :param size: of its disk, bytes.
    """
    row = tx.row(
        f"""
        SELECT min(id) AS id FROM layers
         WHERE reads_as = :name AND size = :size AND state = 'sealed' AND (
            EXISTS (SELECT 1 FROM snapshot_disks JOIN snapshots ON snapshots.id = snapshot
                     WHERE layer = layers.id AND {own(tx, "snapshots")})
            OR EXISTS (SELECT 1 FROM images WHERE layer = layers.id)
            OR EXISTS (SELECT 1 FROM volume_snapshots
                        WHERE layer = layers.id AND {own(tx, "volume_snapshots")})
        )
        """,
        {"name": name, "size": size, "workspace": tx.workspace},
    )
    return None if row is None or row["id"] is None else LayerId(row["id"])


def unknown_images(tx: Transaction, size: int) -> list[LayerId]:
    """Layers of images with disks of that size of which it is not known what they read as."""
    rows = tx.rows(
        "SELECT layers.id FROM layers JOIN images ON images.layer = layers.id"
        " WHERE reads_as IS NULL AND layers.size = ? AND layers.state = 'sealed'",
        (size,),
    )
    return [LayerId(row["id"]) for row in rows]


def not_sealed(tx: Transaction, layers: Collection[LayerId]) -> set[LayerId]:
    """Those of some layers that are gone, or going."""
    rows = tx.rows(
        "SELECT id FROM layers WHERE state = 'sealed' AND id IN (SELECT value FROM json_each(?))",
        (json_of(sorted(layers)),),
    )
    return set(layers) - {LayerId(row["id"]) for row in rows}
