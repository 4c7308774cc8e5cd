"""Rows of the snapshots and their disks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from stratabox.storage.catalog import (
    attachments,
    lookup,
    machines,
    networks,
    operations,
    probes,
    quotas,
    rams,
)
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of, time_of
from stratabox.storage.catalog.disks import OF_SNAPSHOTS
from stratabox.storage.catalog.operations import Kind
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, SnapshotId
from stratabox.storage.model.records import Disk, SavedRam, Snapshot
from stratabox.storage.model.states import NEXT_SNAPSHOT, Level, SnapshotState, check_step

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
"""Whatever looks like a blob's name in the text of a machine."""


def insert(tx: Transaction, snapshot: Snapshot, *, reserve: int = 0) -> Snapshot:
    """Add a snapshot; returns it with its generation.

    :param reserve: bytes that it will keep, for one that is only begun: they count until it is not.
    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    :raise QuotaExceededError: QUOTA_EXCEEDED.
    """
    snapshot = replace(snapshot, generation=tx.next_generation())
    own = {"id": snapshot.id, "workspace": snapshot.workspace, "reserved": reserve}
    tx.insert("snapshots", {**own, **_columns(snapshot)})
    OF_SNAPSHOTS.insert(tx, snapshot.id, snapshot.disks)
    quotas.require(tx, snapshot.workspace, "snapshots", "disk")
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
    return _snapshots(tx, [row])[0]


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
    dangling: bool = False
    """Only those whose sandbox is over."""


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
    if wanted.dangling:
        living = "SELECT id FROM sandboxes WHERE state != 'terminated'"
        conditions.append(f"source_sandbox NOT IN ({living})")
    narrow = bool(wanted.source or wanted.name)
    rows, token = lookup.list_page(tx, "snapshots", page, conditions, values, narrow=narrow)
    return _snapshots(tx, rows), token


def everything(tx: Transaction) -> list[Snapshot]:
    """All snapshots, oldest first. There may be very many: not for what happens often."""
    return _snapshots(tx, tx.rows("SELECT * FROM snapshots ORDER BY created_at, id"))


def some(
    tx: Transaction, source: SandboxId | None, after: Snapshot | None, count: int = 500
) -> list[Snapshot]:
    """A portion of all snapshots of whom the transaction is for, or of all of a sandbox, oldest
    first.

    :param after: the last one of the portion before.
    """
    conditions = [lookup.own(tx, "snapshots", narrow=source is not None)]
    if source:
        conditions.append("source_sandbox = :source")
    values: dict[str, Any] = {"source": source, "count": count, "workspace": tx.workspace}
    if after is not None:
        conditions.append("(created_at, id) > (:time, :id)")
        values |= {"time": text_of(after.created_at), "id": after.id}
    rows = tx.rows(
        f"SELECT * FROM snapshots WHERE {' AND '.join(conditions)}"
        " ORDER BY created_at, id LIMIT :count",
        values,
    )
    return _snapshots(tx, rows)


def lately_saved(tx: Transaction, count: int) -> list[Snapshot]:
    """Those with memory that were taken last, so many, and those that sandboxes were made from."""
    rows = tx.rows(
        """
        SELECT * FROM snapshots WHERE id IN (
            SELECT id FROM (SELECT snapshots.id FROM rams JOIN snapshots USING (id)
                             ORDER BY created_at DESC LIMIT ?)
            UNION SELECT source_snapshot FROM sandboxes JOIN rams ON rams.id = source_snapshot
        )
        """,
        (count,),
    )
    return _snapshots(tx, rows)


def holding(tx: Transaction, layer: LayerId, workspace: str) -> SnapshotId | None:
    """A workspace's newest ready snapshot one of whose disks is exactly `layer`.

    Several workspaces' can be the layer of an image.
    """
    row = tx.row(
        "SELECT id FROM snapshots JOIN snapshot_disks ON snapshot = id"
        " WHERE layer = ? AND workspace = ? AND state = 'ready'"
        " ORDER BY created_at DESC, id DESC LIMIT 1",
        (layer, workspace),
    )
    return None if row is None else SnapshotId(row["id"])


def all_holding(tx: Transaction, layer: LayerId) -> list[SnapshotId]:
    """Every snapshot one of whose disks is exactly `layer`."""
    rows = tx.rows("SELECT DISTINCT snapshot FROM snapshot_disks WHERE layer = ?", (layer,))
    return [SnapshotId(row["snapshot"]) for row in rows]


def any_of_source(tx: Transaction, source: SandboxId) -> bool:
    """Tell whether a sandbox, also one that is gone, has snapshots that may be seen."""
    found = tx.rows(
        "SELECT id FROM snapshots WHERE source_sandbox = :source"
        f" AND {lookup.own(tx, 'snapshots', narrow=True)} LIMIT 1",
        {"source": source, "workspace": tx.workspace},
    )
    return bool(found)


def expired(tx: Transaction) -> list[SnapshotId]:
    """Those whose time is over."""
    rows = tx.rows(
        "SELECT id FROM snapshots WHERE expires_at <= ? AND state IN ('ready', 'failed')",
        (text_of(tx.now),),
    )
    return [SnapshotId(row["id"]) for row in rows]


def beyond(tx: Transaction, source: SandboxId, keep: int) -> list[SnapshotId]:
    """A sandbox's ready snapshots but for the newest so many, the oldest first.

    Those that expire by themselves neither count nor are named.
    """
    rows = tx.rows(
        "SELECT id FROM snapshots WHERE source_sandbox = ? AND state = 'ready'"
        " AND expires_at IS NULL ORDER BY created_at DESC, id DESC LIMIT -1 OFFSET ?",
        (source, keep),
    )
    return [SnapshotId(row["id"]) for row in reversed(rows)]


def is_needed_now(tx: Transaction, snapshot: SnapshotId) -> bool:
    """Whether an operation that is under way goes on from it: a restore, a clone, a revert."""
    for operation in operations.unfinished(tx):
        if operation.snapshot == snapshot:
            return True
        if operation.kind is Kind.CREATE:
            made = tx.row(
                "SELECT source_snapshot FROM sandboxes WHERE id = ?", (operation.sandbox,)
            )
            if made and made["source_snapshot"] == snapshot:
                return True
    return False


def some_blobs(tx: Transaction, after: int, limit: int = 2000) -> tuple[set[str], int | None]:
    """The blobs that a portion of the snapshots need, and where the next portion begins.

    New snapshots come last, so that who has gone through all portions has missed none.

    :return: None for the place when this was the last portion.
    """
    rows = tx.rows(
        "SELECT rowid, machine FROM snapshots WHERE rowid > ? ORDER BY rowid LIMIT ?",
        (after, limit),
    )
    found = {digest for row in rows for digest in _DIGEST.findall(row["machine"])}
    return found, rows[-1]["rowid"] if len(rows) == limit else None


def all_blobs(tx: Transaction) -> set[str]:
    """The blobs that all snapshots need. Takes long where there are very many."""
    wanted: set[str] = set()
    after: int | None = 0
    while after is not None:
        some, after = some_blobs(tx, after)
        wanted |= some
    return wanted


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
        "volumes": attachments.dump_mounts(snapshot.volumes),
        "probe": probes.dump(snapshot.probe),
        "network": networks.dump(snapshot.network),
        "generation": snapshot.generation,
    }


def _snapshots(tx: Transaction, rows: Sequence[Row]) -> list[Snapshot]:
    ids = [row["id"] for row in rows]
    disks, memories = OF_SNAPSHOTS.of_several(tx, ids), rams.find_several(tx, ids)
    return [_snapshot(row, disks.get(row["id"], ()), memories.get(row["id"])) for row in rows]


def _snapshot(row: Row, disks: tuple[Disk, ...], ram: SavedRam | None) -> Snapshot:
    return Snapshot(
        id=SnapshotId(row["id"]),
        workspace=row["workspace"],
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
        disks=disks,
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
        ram=ram,
        volumes=attachments.load_mounts(row["volumes"]),
        probe=probes.load(row["probe"]),
        network=networks.load(row["network"]),
        generation=row["generation"],
    )
