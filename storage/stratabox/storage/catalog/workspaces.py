"""Rows of the workspaces, and what they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from stratabox.storage.catalog.database import Row, Transaction, text_of
from stratabox.storage.catalog.space import users_above
from stratabox.storage.model.errors import AlreadyExistsError, DeniedError
from stratabox.storage.model.ids import LayerId, SandboxId
from stratabox.storage.model.workspaces import (
    DEFAULT_WORKSPACE,
    RESOURCES,
    Quota,
    Usage,
    Workspace,
    not_found,
)


@dataclass(frozen=True, kw_only=True)
class Gone:
    """What went with a workspace."""

    keys: Sequence[str]
    """Ids of API keys; they are revoked."""
    sandboxes: Sequence[SandboxId]
    """That were terminated before."""


def insert(tx: Transaction, workspace: Workspace) -> None:
    """Add one.

    :raise AlreadyExistsError: WORKSPACE_ALREADY_EXISTS.
    """
    if find(tx, workspace.name):
        raise AlreadyExistsError(
            f"there is a workspace {workspace.name!r} already: choose another name",
            reason="WORKSPACE_ALREADY_EXISTS",
        )
    tx.insert(
        "workspaces",
        {
            "name": workspace.name,
            "created_at": text_of(workspace.created_at),
            **_limits(workspace.quota),
        },
    )


def find(tx: Transaction, name: str) -> Workspace | None:
    """The one with that name, if there is one."""
    row = tx.row("SELECT * FROM workspaces WHERE name = ?", (name,))
    return None if row is None else _workspace(row)


def get(tx: Transaction, name: str) -> Workspace:
    """The one with that name. :raise NotFoundError: WORKSPACE_NOT_FOUND."""
    found = find(tx, name)
    if found is None:
        raise not_found(name)
    return found


def everything(tx: Transaction) -> list[Workspace]:
    """All of them, by name."""
    return [_workspace(row) for row in tx.rows("SELECT * FROM workspaces ORDER BY name")]


def set_quota(tx: Transaction, name: str, quota: Quota) -> Workspace:
    """Give one another quota. What it has stays, also where that is more.

    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    """
    get(tx, name)
    changes = ", ".join(f"{each} = :{each}" for each in RESOURCES)
    values = {**_limits(quota), "name": name}
    tx.execute(f"UPDATE workspaces SET {changes} WHERE name = :name", values)
    return get(tx, name)


def delete(tx: Transaction, name: str) -> Gone:
    """Remove one that has nothing any more. Its keys are revoked.

    Records of sandboxes that are terminated, and what idempotency keys have made, go with it.

    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    :raise DeniedError: WORKSPACE_NOT_EMPTY; WORKSPACE_STAYS, for the default one.
    """
    get(tx, name)
    if name == DEFAULT_WORKSPACE:
        raise DeniedError(
            f"the workspace {name!r} stays: whoever names none is in it", reason="WORKSPACE_STAYS"
        )
    has = {
        what: _count(tx, f"SELECT count(*) FROM {table} WHERE workspace = ? AND {which}", name)
        for what, table, which in (
            ("sandboxes", "sandboxes", "state != 'terminated'"),
            ("snapshots", "snapshots", "1"),
            ("volumes", "volumes", "1"),
            ("volume snapshots", "volume_snapshots", "1"),
        )
    }
    left = {what: count for what, count in has.items() if count}
    if left:
        figures = ", ".join(f"{count} {what}" for what, count in left.items())
        raise DeniedError(
            f"workspace {name!r} has {figures}: delete them first, with --workspace {name}",
            reason="WORKSPACE_NOT_EMPTY",
            workspace=name,
            **{what.replace(" ", "_"): count for what, count in left.items()},
        )
    over = tx.rows("SELECT id FROM sandboxes WHERE workspace = ?", (name,))
    for table in ("previews", "sandboxes", "jobs", "idempotency"):
        tx.execute(f"DELETE FROM {table} WHERE workspace = ?", (name,))
    tx.execute("DELETE FROM workspaces WHERE name = ?", (name,))
    keys = tx.rows(
        "SELECT id FROM api_keys WHERE workspace = ? AND revoked_at IS NULL ORDER BY id", (name,)
    )
    tx.execute(
        "UPDATE api_keys SET revoked_at = ? WHERE workspace = ? AND revoked_at IS NULL",
        (text_of(tx.now), name),
    )
    return Gone(keys=[row["id"] for row in keys], sandboxes=[SandboxId(row["id"]) for row in over])


def of_layer(tx: Transaction, layer: LayerId) -> str:
    """Whose a layer is that is no image's: no chain leads from one workspace into another's.

    "" where nobody needs it.
    """
    for user in users_above(tx, [layer], 1):
        row = tx.row(_OF_RECORD, {"id": user})
        if row is not None:
            return str(row["workspace"])
    return ""


def usage(tx: Transaction, name: str) -> Usage:
    """What one has. Goes through the chains of all its records."""
    return Usage(
        **counted(tx, name, "sandboxes", "cpus", "memory"),
        **counted(tx, name, "disk"),
        **counted(tx, name, "snapshots"),
    )


def counted(tx: Transaction, name: str, *resources: str) -> dict[str, int]:
    """What one has of some of the resources; what is not asked for costs nothing."""
    found: dict[str, int] = {}
    if {"sandboxes", "cpus", "memory"} & set(resources):
        row = tx.row(
            "SELECT count(*) AS sandboxes, coalesce(sum(cpus), 0) AS cpus,"
            " coalesce(sum(memory), 0) AS memory"
            " FROM sandboxes WHERE workspace = ? AND state != 'terminated'",
            (name,),
        )
        assert row is not None
        found |= {each: int(row[each]) for each in ("sandboxes", "cpus", "memory")}
    if "snapshots" in resources:
        found["snapshots"] = sum(
            _count(tx, f"SELECT count(*) FROM {table} WHERE workspace = ?", name)
            for table in ("snapshots", "volume_snapshots")
        )
    if "disk" in resources:
        found["disk"] = _count(tx, _DISK, name)
    return {each: found[each] for each in resources}


_OF_RECORD = """
    SELECT workspace FROM sandboxes WHERE id = :id
    UNION SELECT workspace FROM snapshots WHERE id = :id
    UNION SELECT workspace FROM volumes WHERE id = :id
    UNION SELECT workspace FROM volume_snapshots WHERE id = :id
"""
# What may still grow counts by what it may grow to; what is sealed, by what it takes. The layers of
# images are nobody's.
_DISK = """
    WITH RECURSIVE
    mine (name) AS (VALUES (?)),
    below (id) AS (
        SELECT layer FROM disks JOIN sandboxes ON sandboxes.id = sandbox
         WHERE workspace = (SELECT name FROM mine)
        UNION SELECT layer FROM snapshot_disks JOIN snapshots ON snapshots.id = snapshot
         WHERE workspace = (SELECT name FROM mine)
        UNION SELECT layer FROM volumes
         WHERE workspace = (SELECT name FROM mine) AND layer IS NOT NULL
        UNION SELECT layer FROM volume_snapshots WHERE workspace = (SELECT name FROM mine)
        UNION SELECT parent FROM below JOIN layers USING (id)
         WHERE parent IS NOT NULL
    ),
    memories (id) AS (
        SELECT id FROM snapshots WHERE workspace = (SELECT name FROM mine)
        UNION SELECT ram_parked FROM sandboxes
         WHERE workspace = (SELECT name FROM mine) AND ram_parked IS NOT NULL
        UNION SELECT ram_origin FROM sandboxes
         WHERE workspace = (SELECT name FROM mine) AND ram_origin IS NOT NULL
        UNION SELECT ram_since FROM sandboxes
         WHERE workspace = (SELECT name FROM mine) AND ram_since IS NOT NULL
        UNION SELECT parent FROM memories JOIN rams USING (id) WHERE parent IS NOT NULL
    )
    SELECT coalesce((SELECT sum(bytes) FROM below JOIN layers USING (id)
                      WHERE NOT EXISTS (SELECT 1 FROM images WHERE images.layer = layers.id)), 0)
         + coalesce((SELECT sum(bytes) FROM memories JOIN rams USING (id)), 0)
         + coalesce((SELECT sum(disks.size) FROM disks JOIN sandboxes ON sandboxes.id = sandbox
                      WHERE workspace = (SELECT name FROM mine)), 0)
         + coalesce((SELECT sum(size) FROM volumes
                      WHERE workspace = (SELECT name FROM mine)), 0)
         + coalesce((SELECT sum(reserved) FROM snapshots
                      WHERE workspace = (SELECT name FROM mine) AND state = 'creating'), 0)
"""


def _count(tx: Transaction, query: str, name: str) -> int:
    (row,) = tx.rows(query, (name,))
    return int(row[0])


def _limits(quota: Quota) -> dict[str, int | None]:
    return {each: getattr(quota, each) for each in RESOURCES}


def _workspace(row: Row) -> Workspace:
    return Workspace(
        name=row["name"],
        created_at=datetime.fromisoformat(row["created_at"]),
        quota=Quota(**{each: row[each] for each in RESOURCES}),
    )
