"""Rows of the disks: which layer holds each disk of a sandbox or snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stratabox.storage.catalog.database import Transaction
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
        rows = tx.rows(f"SELECT * FROM {self.name} WHERE {self.owner} = ? ORDER BY idx", (owner,))
        return tuple(
            Disk(
                index=row["idx"],
                layer=LayerId(row["layer"]),
                size=row["size"],
                serial=row["serial"],
            )
            for row in rows
        )


OF_SANDBOXES = DiskTable("disks", "sandbox")
OF_SNAPSHOTS = DiskTable("snapshot_disks", "snapshot")
