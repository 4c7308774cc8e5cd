"""Which seeds are needed: disks by which cloud-init sets guests up, each made for one sandbox.

They are blobs, and those of its snapshots and their copies name them too. Indexes on the machines'
text (``migrations/0005_guest.sql``) make both questions cheap, however many records there are.
"""

from __future__ import annotations

from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import Sha256


def is_needed(tx: Transaction, seed: Sha256) -> bool:
    """Some sandbox or snapshot has it."""
    found = tx.rows(
        """
        SELECT 1 FROM sandboxes
         WHERE json_extract(machine, '$.seed') = :seed AND state != 'terminated'
        UNION ALL SELECT 1 FROM snapshots WHERE json_extract(machine, '$.seed') = :seed
        LIMIT 1
        """,
        {"seed": seed},
    )
    return bool(found)


def of_snapshots(tx: Transaction) -> set[str]:
    """All that snapshots have."""
    rows = tx.rows(
        "SELECT DISTINCT json_extract(machine, '$.seed') AS seed FROM snapshots"
        " WHERE json_extract(machine, '$.seed') IS NOT NULL"
    )
    return {row["seed"] for row in rows}
