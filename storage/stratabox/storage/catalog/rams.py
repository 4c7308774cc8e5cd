"""Rows of saved memory: which RAM file adds to which."""

from __future__ import annotations

import json
from datetime import timedelta

from stratabox.storage.catalog.database import Transaction, json_of
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import SavedRam


def insert(tx: Transaction, ram_id: str, ram: SavedRam) -> None:
    """Add one, under its snapshot's id."""
    tx.insert(
        "rams",
        {
            "id": ram_id,
            "parent": ram.parent,
            "own_bytes": ram.own_bytes,
            "state_sha256": ram.state_sha256,
            "tracking": ram.tracking,
            "pause_us": ram.pause // timedelta(microseconds=1),
            "cpu_features": json_of(ram.cpu_features),
        },
    )


def find(tx: Transaction, ram_id: str) -> SavedRam | None:
    """The saved memory of a snapshot, if it has one."""
    row = tx.row("SELECT * FROM rams WHERE id = ?", (ram_id,))
    if row is None:
        return None
    return SavedRam(
        parent=row["parent"],
        own_bytes=row["own_bytes"],
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
    parents = everything(tx)
    needed: set[str] = set()
    roots = tx.rows(
        """
        SELECT id FROM snapshots
        UNION SELECT ram_origin FROM sandboxes WHERE ram_origin IS NOT NULL
        UNION SELECT ram_since FROM sandboxes WHERE ram_since IS NOT NULL
        """
    )
    for root in roots:
        ram: str | None = root["id"]
        while ram is not None and ram in parents and ram not in needed:
            needed.add(ram)
            ram = parents[ram]
    depth: dict[str, int] = {}

    def depth_of(ram: str) -> int:
        if ram not in depth:
            parent = parents[ram]
            depth[ram] = 0 if parent is None else depth_of(parent) + 1
        return depth[ram]

    return sorted(set(parents) - needed, key=depth_of, reverse=True)


def drop(tx: Transaction, ram_id: str) -> None:
    """Remove the row of one whose files are gone."""
    tx.execute("DELETE FROM rams WHERE id = ?", (ram_id,))
