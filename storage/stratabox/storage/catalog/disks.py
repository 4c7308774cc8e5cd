"""Rows of the disks: which layer holds each disk of a sandbox or snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stratabox.storage.catalog.database import Transaction, json_of
from stratabox.storage.model.ids import LayerId
from stratabox.storage.model.records import Disk


@dataclass(frozen=True)
class DiskTable:
    """One of the two tables, which differ only in whose disks they keep."""

    name: str
    owner: str
    """The column with the owner's id."""

    def insert(self, tx: Transaction, owner: str, disks: Iterable[Disk]) -> None:
        """Add an owner's disks."""
        for disk in disks:
            tx.insert(
                self.name,
                {
                    self.owner: owner,
                    "idx": disk.index,
                    "layer": disk.layer,
                    "size": disk.size,
                    "serial": disk.serial,
                },
            )

    def replace(self, tx: Transaction, owner: str, disks: Iterable[Disk]) -> None:
        """Put others in the place of all of an owner's disks."""
        tx.execute(f"DELETE FROM {self.name} WHERE {self.owner} = ?", (owner,))
        self.insert(tx, owner, disks)

    def of(self, tx: Transaction, owner: str) -> tuple[Disk, ...]:
        """An owner's disks, root first."""
        return self.of_several(tx, [owner]).get(owner, ())

    def of_several(self, tx: Transaction, owners: Sequence[str]) -> dict[str, tuple[Disk, ...]]:
        """The disks of some, root first; who has none is left out."""
        rows = tx.rows(
            f"SELECT * FROM {self.name} WHERE {self.owner} IN (SELECT value FROM json_each(?))"
            f" ORDER BY {self.owner}, idx",
            (json_of(owners),),
        )
        found: dict[str, tuple[Disk, ...]] = {}
        for row in rows:
            disk = Disk(
                index=row["idx"],
                layer=LayerId(row["layer"]),
                size=row["size"],
                serial=row["serial"],
            )
            found[row[self.owner]] = (*found.get(row[self.owner], ()), disk)
        return found


OF_SANDBOXES = DiskTable("disks", "sandbox")
OF_SNAPSHOTS = DiskTable("snapshot_disks", "snapshot")
