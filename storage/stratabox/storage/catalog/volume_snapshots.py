"""Rows of the volumes' snapshots."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from stratabox.storage.catalog import lookup, quotas
from stratabox.storage.catalog.database import Row, Transaction, text_of
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import LayerId, VolumeId, VolumeSnapshotId
from stratabox.storage.model.records import VolumeSnapshot
from stratabox.storage.model.states import Level


def insert(tx: Transaction, snapshot: VolumeSnapshot) -> VolumeSnapshot:
    """Add a snapshot; returns it with its generation. It never changes.

    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    :raise QuotaExceededError: QUOTA_EXCEEDED.
    """
    snapshot = replace(snapshot, generation=tx.next_generation())
    tx.insert(
        "volume_snapshots",
        {
            "id": snapshot.id,
            "workspace": snapshot.workspace,
            "name": snapshot.name,
            "volume": snapshot.volume,
            "volume_name": snapshot.volume_name,
            "layer": snapshot.layer,
            "size": snapshot.size,
            "filesystem": snapshot.filesystem,
            "consistency": snapshot.consistency,
            "created_at": text_of(snapshot.created_at),
            "generation": snapshot.generation,
        },
    )
    quotas.require(tx, snapshot.workspace, "snapshots", "disk")
    return snapshot


def resolve(tx: Transaction, reference: str) -> VolumeSnapshotId:
    """The id behind an id, name or start of an id.

    :raise NotFoundError: VOLUME_SNAPSHOT_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return VolumeSnapshotId(lookup.resolve(tx, "volume_snapshots", "volume snapshot", reference))


def get(tx: Transaction, snapshot: VolumeSnapshotId) -> VolumeSnapshot:
    """One snapshot. :raise NotFoundError: VOLUME_SNAPSHOT_NOT_FOUND."""
    row = tx.row("SELECT * FROM volume_snapshots WHERE id = ?", (snapshot,))
    if row is None:
        raise NotFoundError(
            f"there is no volume snapshot {snapshot!r}",
            reason="VOLUME_SNAPSHOT_NOT_FOUND",
            volume_snapshot=snapshot,
        )
    return _snapshot(row)


def delete(tx: Transaction, snapshot: VolumeSnapshotId) -> None:
    """Remove the row; layers that nothing else needs become garbage by it."""
    tx.execute("DELETE FROM volume_snapshots WHERE id = ?", (snapshot,))


def list_page(
    tx: Transaction, volume: VolumeId | None, page: lookup.Page = lookup.FIRST_PAGE
) -> tuple[list[VolumeSnapshot], str]:
    """One page, newest first, and the next page's token ("" on the last).

    :param volume: only its snapshots, also when it is gone; None: all.
    :raise InvalidArgumentError: for a page that cannot be.
    """
    values: dict[str, Any] = {}
    conditions = []
    if volume is not None:
        conditions.append("volume = :volume")
        values["volume"] = volume
    rows, token = lookup.list_page(tx, "volume_snapshots", page, conditions, values)
    return [_snapshot(row) for row in rows], token


def any_of_volume(tx: Transaction, volume: VolumeId) -> bool:
    """Tell whether a volume, also one that is gone, has snapshots that may be seen."""
    found = tx.rows(
        "SELECT id FROM volume_snapshots"
        f" WHERE volume = :volume AND {lookup.own(tx, 'volume_snapshots')} LIMIT 1",
        {"volume": volume, "workspace": tx.workspace},
    )
    return bool(found)


def _snapshot(row: Row) -> VolumeSnapshot:
    return VolumeSnapshot(
        id=VolumeSnapshotId(row["id"]),
        workspace=row["workspace"],
        name=row["name"],
        volume=VolumeId(row["volume"]),
        volume_name=row["volume_name"],
        layer=LayerId(row["layer"]),
        size=row["size"],
        filesystem=row["filesystem"],
        consistency=Level(row["consistency"]),
        created_at=datetime.fromisoformat(row["created_at"]),
        generation=row["generation"],
    )
