"""Tags of snapshots and volumes, which only Tenki's API knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from stratabox.storage.catalog.database import Transaction, json_of


@dataclass(frozen=True)
class TagRows:
    """The tags of one kind of thing."""

    table: str
    column: str
    """That names whose they are."""

    def of_all(self, tx: Transaction, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The tags of several; each of them is there."""
        rows = tx.rows(
            f"SELECT * FROM {self.table} WHERE {self.column} IN (SELECT value FROM json_each(?))",
            (json_of(list(ids)),),
        )
        found = {row[self.column]: tuple(json.loads(row["tags"])) for row in rows}
        return {each: found.get(each, ()) for each in ids}

    def put(self, tx: Transaction, thing: str, tags: Sequence[str]) -> None:
        """Replace the tags of one, which is there."""
        tx.execute(f"DELETE FROM {self.table} WHERE {self.column} = ?", (thing,))
        if tags:
            tx.insert(self.table, {self.column: thing, "tags": json_of(tuple(tags))})


OF_SNAPSHOTS = TagRows("tenki_snapshot_tags", "snapshot")
OF_VOLUMES = TagRows("tenki_volume_tags", "volume")
