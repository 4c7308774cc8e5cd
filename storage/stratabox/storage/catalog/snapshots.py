"""Rows of the snapshots and their disks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from stratabox.storage.catalog import lookup, machines, rams
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of, time_of
from stratabox.storage.catalog.disks import OF_SNAPSHOTS
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, SnapshotId
from stratabox.storage.model.records import Snapshot
from stratabox.storage.model.states import NEXT_SNAPSHOT, Level, SnapshotState, check_step


def insert(tx: Transaction, snapshot: Snapshot) -> Snapshot:
    """Add a snapshot; returns it with its generation."""
    snapshot = replace(snapshot, generation=tx.next_generation())
    tx.insert("snapshots", {"id": snapshot.id, **_columns(snapshot)})
    OF_SNAPSHOTS.insert(tx, snapshot.id, snapshot.disks)
    return snapshot


def resolve(tx: Transaction, reference: str) -> SnapshotId:
    """The id behind an id, name or start of an id.

    :raise NotFoundError: SNAPSHOT_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return SnapshotId(lookup.resolve(tx, "snapshots", "snapshot", reference, "state = 'ready'"))


def get(tx: Transaction, snapshot: SnapshotId) -> Snapshot:
    """One snapshot. :raise NotFoundError: SNAPSHOT_NOT_FOUND."""
    row = tx.row("SELECT * FROM snapshots WHERE id = ?", (snapshot,))
    if row is None:
        raise NotFoundError(
            f"there is no snapshot {snapshot!r}", reason="SNAPSHOT_NOT_FOUND", snapshot=snapshot
        )
    return _snapshot(tx, row)


def change(tx: Transaction, snapshot: SnapshotId, **changes: Any) -> Snapshot:
    """Change a snapshot: the one function through which its row ever changes.

    :raise NotFoundError: SNAPSHOT_NOT_FOUND.
    :raise InternalError: when the change of state is not legal.
    """
    old = get(tx, snapshot)
    new = replace(old, **changes, generation=tx.next_generation())
    check_step(NEXT_SNAPSHOT, old.state, new.state)
    tx.update("snapshots", snapshot, _columns(new))
    if new.disks != old.disks:
        OF_SNAPSHOTS.replace(tx, snapshot, new.disks)
    return new


def delete(tx: Transaction, snapshot: SnapshotId) -> None:
    """Remove the row and its disks' rows; layers that nothing else needs become garbage by it."""
    tx.execute("DELETE FROM snapshots WHERE id = ?", (snapshot,))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which snapshots; everything given must fit."""

    source: SandboxId | None = None
    states: Sequence[SnapshotState] = ()
    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


def list_page(
    tx: Transaction, wanted: Filter, page: lookup.Page = lookup.FIRST_PAGE
) -> tuple[list[Snapshot], str]:
    """One page, newest first, and the next page's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    values: dict[str, Any] = {}
    conditions = lookup.any_of("state", wanted.states, values)
    if wanted.source:
        conditions.append("source_sandbox = :source")
        values["source"] = wanted.source
    if wanted.name:
        conditions.append("name = :name")
        values["name"] = wanted.name
    conditions += lookup.entries_condition("metadata", wanted.metadata, values)
    rows, token = lookup.list_page(tx, "snapshots", page, conditions, values)
    return [_snapshot(tx, row) for row in rows], token


def everything(tx: Transaction) -> list[Snapshot]:
    """All snapshots, oldest first."""
    return [
        _snapshot(tx, row) for row in tx.rows("SELECT * FROM snapshots ORDER BY created_at, id")
    ]


def holding(tx: Transaction, layer: LayerId) -> SnapshotId | None:
    """The newest ready snapshot one of whose disks is exactly `layer`."""
    row = tx.row(
        "SELECT id FROM snapshots JOIN snapshot_disks ON snapshot = id"
        " WHERE layer = ? AND state = 'ready' ORDER BY created_at DESC, id DESC LIMIT 1",
        (layer,),
    )
    return None if row is None else SnapshotId(row["id"])


def any_of_source(tx: Transaction, source: SandboxId) -> bool:
    """Tell whether a sandbox, also one that is gone, has snapshots."""
    found = tx.rows("SELECT id FROM snapshots WHERE source_sandbox = ? LIMIT 1", (source,))
    return bool(found)


def expired(tx: Transaction) -> list[SnapshotId]:
    """Those whose time is over."""
    rows = tx.rows(
        "SELECT id FROM snapshots WHERE expires_at <= ? AND state IN ('ready', 'failed')",
        (text_of(tx.now),),
    )
    return [SnapshotId(row["id"]) for row in rows]


def users_of_image(tx: Transaction, image: ImageId) -> list[str]:
    """Ids of the snapshots that have disks standing on an image."""
    rows = tx.rows(
        "SELECT DISTINCT snapshots.id FROM snapshots"
        " JOIN snapshot_disks ON snapshot_disks.snapshot = snapshots.id WHERE image = ?",
        (image,),
    )
    return sorted(row["id"] for row in rows)


def _columns(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "state": snapshot.state,
        "requested_level": snapshot.requested_level,
        "consistency": snapshot.consistency,
        "source_sandbox": snapshot.source_sandbox,
        "source_sandbox_name": snapshot.source_sandbox_name,
        "image": snapshot.image,
        "image_name": snapshot.image_name,
        "cpus": snapshot.cpus,
        "memory": snapshot.memory,
        "storage": snapshot.storage,
        "machine": machines.dump(snapshot.machine),
        "env": json_of(dict(snapshot.env)),
        "metadata": json_of(dict(snapshot.metadata)),
        "created_at": text_of(snapshot.created_at),
        "ready_at": text_of(snapshot.ready_at),
        "expires_at": text_of(snapshot.expires_at),
        "failure_reason": snapshot.failure_reason,
        "frozen": snapshot.frozen,
        "stall_us": None if snapshot.stall is None else snapshot.stall // timedelta(microseconds=1),
        "layer_bytes": snapshot.layer_bytes,
        "parent": snapshot.parent,
        "generation": snapshot.generation,
    }


def _snapshot(tx: Transaction, row: Row) -> Snapshot:
    return Snapshot(
        id=SnapshotId(row["id"]),
        name=row["name"],
        state=SnapshotState(row["state"]),
        requested_level=None if row["requested_level"] is None else Level(row["requested_level"]),
        consistency=None if row["consistency"] is None else Level(row["consistency"]),
        source_sandbox=SandboxId(row["source_sandbox"]),
        source_sandbox_name=row["source_sandbox_name"],
        image=ImageId(row["image"]),
        image_name=row["image_name"],
        cpus=row["cpus"],
        memory=row["memory"],
        storage=row["storage"],
        machine=machines.load(row["machine"]),
        disks=OF_SNAPSHOTS.of(tx, row["id"]),
        env=json.loads(row["env"]),
        metadata=json.loads(row["metadata"]),
        created_at=datetime.fromisoformat(row["created_at"]),
        ready_at=time_of(row["ready_at"]),
        expires_at=time_of(row["expires_at"]),
        failure_reason=row["failure_reason"],
        frozen=row["frozen"],
        stall=None if row["stall_us"] is None else timedelta(microseconds=row["stall_us"]),
        layer_bytes=row["layer_bytes"],
        parent=None if row["parent"] is None else SnapshotId(row["parent"]),
        ram=rams.find(tx, row["id"]),
        generation=row["generation"],
    )
