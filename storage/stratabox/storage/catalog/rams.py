"""Rows of saved memory: which RAM file adds to which."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from stratabox.storage.catalog import operations
from stratabox.storage.catalog.database import Row, Transaction, json_of
from stratabox.storage.model.ids import SandboxId, Sha256
from stratabox.storage.model.records import SavedRam


def insert(tx: Transaction, ram_id: str, ram: SavedRam) -> None:
    """Add one, under its snapshot's id."""
    tx.insert(
        "rams",
        {
            "id": ram_id,
            "parent": ram.parent,
            "own_bytes": ram.own_bytes,
            "bytes": ram.bytes,
            "state_sha256": ram.state_sha256,
            "tracking": ram.tracking,
            "pause_us": ram.pause // timedelta(microseconds=1),
            "cpu_features": json_of(ram.cpu_features),
        },
    )


def find(tx: Transaction, ram_id: str) -> SavedRam | None:
    """The saved memory of a snapshot, if it has one."""
    return find_several(tx, [ram_id]).get(ram_id)


def find_several(tx: Transaction, ids: Sequence[str]) -> dict[str, SavedRam]:
    """The saved memory of those of some snapshots that have one."""
    rows = tx.rows(
        "SELECT * FROM rams WHERE id IN (SELECT value FROM json_each(?))", (json_of(ids),)
    )
    return {row["id"]: _ram(row) for row in rows}


def _ram(row: Row) -> SavedRam:
    return SavedRam(
        parent=row["parent"],
        own_bytes=row["own_bytes"],
        bytes=row["bytes"],
        state_sha256=Sha256(row["state_sha256"]),
        tracking=row["tracking"],
        pause=timedelta(microseconds=row["pause_us"]),
        cpu_features=tuple(json.loads(row["cpu_features"])),
    )


def everything(tx: Transaction) -> dict[str, str | None]:
    """Each RAM file's id → its parent."""
    return {row["id"]: row["parent"] for row in tx.rows("SELECT id, parent FROM rams")}


def garbage(tx: Transaction) -> list[str]:
    """Those that no snapshot and no running process stands on, children before parents."""
    ownerless = _ownerless(tx)
    parents = {**_children(tx), **ownerless}
    roots = (set(parents) - set(ownerless)) | held(tx)
    return in_order(set(ownerless) - needed(parents, roots), parents)


def merges(tx: Transaction) -> list[Merge]:
    """What can leave its chain now."""
    ownerless = _ownerless(tx)
    parents = {**_children(tx), **ownerless}
    return find_merges(parents, (set(parents) - set(ownerless)) | held(tx) & set(parents))


def pin(tx: Transaction, sandbox: SandboxId, ram_id: str | None) -> None:
    """Keep a file for what a sandbox's operation is about to put on it, until that has ended.

    No row says so before: meanwhile its snapshot may be deleted, and nobody else's it may be.
    """
    for operation in operations.unfinished(tx):
        if operation.sandbox == sandbox:
            operations.amend(tx, operation.id, {**operation.payload, "ram_base": ram_id})


def rebase(tx: Transaction, ram_id: str, parent: str | None, own_bytes: int, taken: int) -> None:
    """Its file holds more than before, and stands on another one now.

    :param taken: what its files take on the disk, bytes.
    """
    tx.update("rams", ram_id, {"parent": parent, "own_bytes": own_bytes, "bytes": taken})


def without_bytes(tx: Transaction) -> list[str]:
    """Those of which it is not known yet what their files take on the disk."""
    return [row["id"] for row in tx.rows("SELECT id FROM rams WHERE bytes = 0")]


def set_bytes(tx: Transaction, sizes: Mapping[str, int]) -> None:
    """Note what their files take on the disk."""
    for ram, taken in sizes.items():
        tx.update("rams", ram, {"bytes": taken})


def drop(tx: Transaction, ram_id: str) -> None:
    """Remove the row of one whose files are gone."""
    tx.execute("DELETE FROM rams WHERE id = ?", (ram_id,))


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A file that can take in all those below it down to `until`, which stays."""

    child: str
    until: str | None
    """None: down to the end of the chain."""


def find_merges(parents: Mapping[str, str | None], roots: Collection[str]) -> list[Merge]:
    """Who can take in those below it: each of them is nobody's, and has no other child.

    :param parents: each RAM file's id → its parent.
    :param roots: those that a snapshot or a process stands on.
    """
    kept = needed(parents, roots)
    children = Counter(parents[ram] for ram in kept)
    idle = {ram for ram in kept if ram not in roots and children[ram] == 1}
    found = []
    for child in sorted(kept - idle):
        until = parents[child]
        while until is not None and until in idle:
            until = parents[until]
        if until != parents[child]:
            found.append(Merge(child=child, until=until))
    return found


def needed(parents: Mapping[str, str | None], roots: Collection[str]) -> set[str]:
    """The roots and all that they stand on."""
    found: set[str] = set()
    for root in roots:
        ram: str | None = root
        while ram is not None and ram in parents and ram not in found:
            found.add(ram)
            ram = parents[ram]
    return found


def in_order(some: Collection[str], parents: Mapping[str, str | None]) -> list[str]:
    """Some of them, children before parents."""
    waiting = Counter(parents[ram] for ram in some)
    ready = sorted(ram for ram in some if not waiting[ram])
    ordered = []
    while ready:
        ram = ready.pop()
        ordered.append(ram)
        parent = parents[ram]
        waiting[parent] -= 1
        if parent in some and not waiting[parent]:
            assert parent is not None
            ready.append(parent)
    return ordered


def _ownerless(tx: Transaction) -> dict[str, str | None]:
    """Those that are no snapshot's → their parents. Triggers keep count of them: they are few."""
    return {
        row["id"]: row["parent"] for row in tx.rows("SELECT id, parent FROM rams WHERE ownerless")
    }


def _children(tx: Transaction) -> dict[str, str | None]:
    """Those that stand on ownerless ones → their parents."""
    rows = tx.rows(
        "SELECT id, parent FROM rams WHERE parent IN (SELECT id FROM rams WHERE ownerless)"
    )
    return {row["id"]: row["parent"] for row in rows}


def held(tx: Transaction) -> set[str]:
    """Those that a process, or a save under way, stands on."""
    rows = tx.rows(
        """
        SELECT ram_origin AS id FROM sandboxes WHERE ram_origin IS NOT NULL
        UNION SELECT ram_since FROM sandboxes WHERE ram_since IS NOT NULL
        UNION SELECT ram_parked FROM sandboxes WHERE ram_parked IS NOT NULL
        UNION SELECT json_extract(payload, '$.ram_base') FROM operations
         WHERE json_extract(payload, '$.ram_base') IS NOT NULL
        """
    )
    return {row["id"] for row in rows}
