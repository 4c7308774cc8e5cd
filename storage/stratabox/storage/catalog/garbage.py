"""Which layers nothing needs any more, found from what was taken away, not by looking at all.

Triggers (``migrations/0004_store.sql``) note each layer that is new, or loses a user, a child or a
job, among the *suspects*; only a suspect can be garbage, and only what it stands on after it. So a
sweep costs what was changed, with a hundred thousand layers as with ten. At start all layers are
looked at once (`suspect_all`), for what a daemon that was killed has left.

`gc` says the same of a whole graph, purely; a test holds the two together.
"""

from __future__ import annotations

from collections import Counter

from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import LayerId

_NEEDED = """
    SELECT 1 FROM disks WHERE layer = :layer
    UNION ALL SELECT 1 FROM snapshot_disks WHERE layer = :layer
    UNION ALL SELECT 1 FROM images WHERE layer = :layer
    UNION ALL SELECT 1 FROM volumes WHERE layer = :layer
    UNION ALL SELECT 1 FROM volume_snapshots WHERE layer = :layer
    UNION ALL SELECT 1 FROM jobs
     WHERE state IN ('running', 'paused') AND :layer IN (layer, base, target)
"""


def suspect_all(tx: Transaction) -> None:
    """Have the next look go over every chain, from its top."""
    tx.execute(
        """
        INSERT OR IGNORE INTO suspects SELECT id FROM layers
         WHERE NOT EXISTS (SELECT 1 FROM layers child WHERE child.parent = layers.id)
        """
    )


def take(tx: Transaction) -> list[LayerId]:
    """The layers that are garbage now, children before parents; the suspects are cleared.

    Those that were found before, and whose files could not be removed then, are among them.
    """
    rows = tx.rows(
        """
        SELECT layer FROM suspects
        UNION SELECT id FROM layers WHERE state != 'sealed' AND state = 'garbage'  -- by its index
        """
    )
    pending = [LayerId(row["layer"]) for row in rows]
    doomed: dict[LayerId, None] = {}
    gone_children: Counter[LayerId] = Counter()
    while pending:
        layer = pending.pop()
        if layer in doomed or not _is_free(tx, layer, gone_children[layer]):
            continue
        row = tx.row("SELECT parent FROM layers WHERE id = ?", (layer,))
        if row is None:
            continue
        doomed[layer] = None
        if row["parent"] is not None:
            parent = LayerId(row["parent"])
            gone_children[parent] += 1
            pending.append(parent)
    tx.execute("DELETE FROM suspects")
    return list(doomed)


def _is_free(tx: Transaction, layer: LayerId, gone_children: int) -> bool:
    """Nobody names it, and it has no children but those that go."""
    if tx.rows(f"{_NEEDED} LIMIT 1", {"layer": layer}):
        return False
    children = tx.rows("SELECT 1 FROM layers WHERE parent = ? LIMIT ?", (layer, gone_children + 1))
    return len(children) <= gone_children
