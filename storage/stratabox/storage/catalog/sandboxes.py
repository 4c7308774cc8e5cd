"""Rows of the sandboxes and their disks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from stratabox.storage.catalog import lookup, machines
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of, time_of
from stratabox.storage.catalog.disks import OF_SANDBOXES
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import ImageId, SandboxId, SnapshotId
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import NEXT_SANDBOX, SandboxState, check_step


def insert(tx: Transaction, sandbox: Sandbox) -> Sandbox:
    """Add a sandbox with its disks; returns it with its generation."""
    sandbox = replace(sandbox, generation=tx.next_generation())
    tx.insert("sandboxes", {"id": sandbox.id, **_columns(sandbox)})
    OF_SANDBOXES.insert(tx, sandbox.id, sandbox.disks)
    return sandbox


def resolve(tx: Transaction, reference: str) -> SandboxId:
    """The id behind an id, name or start of an id; live sandboxes before terminated ones.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return SandboxId(lookup.resolve(tx, "sandboxes", "sandbox", reference, "state != 'terminated'"))


def get(tx: Transaction, sandbox: SandboxId) -> Sandbox:
    """One sandbox. :raise NotFoundError: SANDBOX_NOT_FOUND."""
    row = tx.row("SELECT * FROM sandboxes WHERE id = ?", (sandbox,))
    if row is None:
        raise NotFoundError(
            f"there is no sandbox {sandbox!r}", reason="SANDBOX_NOT_FOUND", sandbox=sandbox
        )
    return _sandbox(tx, row)


def change(tx: Transaction, sandbox: SandboxId, **changes: Any) -> Sandbox:
    """Change a sandbox: the one function through which its row ever changes.

    `disks` replaces all of its disks.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    :raise InternalError: when the change of state is not legal.
    """
    old = get(tx, sandbox)
    new = replace(old, **changes, updated_at=tx.now, generation=tx.next_generation())
    if not (new.state.has_process or new.state is SandboxState.CREATING):
        # Without a process nothing stands on any saved memory.
        new = replace(new, ram_origin=None, ram_since=None)
    check_step(NEXT_SANDBOX, old.state, new.state)
    tx.update("sandboxes", sandbox, _columns(new))
    if new.disks != old.disks:
        OF_SANDBOXES.replace(tx, sandbox, new.disks)
    return new


def delete(tx: Transaction, sandbox: SandboxId) -> None:
    """Remove the row and its disks' rows; the layers become garbage by it."""
    tx.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox,))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which sandboxes; everything given must fit."""

    states: Sequence[SandboxState] = ()
    name: str = ""
    tags: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    image: ImageId | None = None
    include_terminated: bool = False


def list_page(
    tx: Transaction, wanted: Filter, page: lookup.Page = lookup.FIRST_PAGE
) -> tuple[list[Sandbox], str]:
    """One page, newest first, and the next page's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    values: dict[str, Any] = {}
    conditions = lookup.any_of("state", wanted.states, values)
    if not wanted.states and not wanted.include_terminated:
        conditions.append("state != 'terminated'")
    if wanted.name:
        conditions.append("name = :name")
        values["name"] = wanted.name
    if wanted.image:
        conditions.append("image = :image")
        values["image"] = wanted.image
    for number, tag in enumerate(wanted.tags):
        values[f"tag{number}"] = tag
        conditions.append(f"EXISTS (SELECT 1 FROM json_each(tags) WHERE value = :tag{number})")
    conditions += lookup.entries_condition("metadata", wanted.metadata, values)
    rows, token = lookup.list_page(tx, "sandboxes", page, conditions, values)
    return [_sandbox(tx, row) for row in rows], token


def everything(tx: Transaction) -> list[Sandbox]:
    """All sandboxes, terminated ones too, oldest first."""
    return [_sandbox(tx, row) for row in tx.rows("SELECT * FROM sandboxes ORDER BY created_at, id")]


def free_uid(tx: Transaction, base: int, count: int) -> int | None:
    """The lowest uid of a range that no sandbox has; None when all are taken."""
    taken = {
        row["uid"]
        for row in tx.rows(
            "SELECT uid FROM sandboxes WHERE uid >= ? AND uid < ?", (base, base + count)
        )
    }
    return next((uid for uid in range(base, base + count) if uid not in taken), None)


def users_of_image(tx: Transaction, image: ImageId) -> list[str]:
    """Ids of the sandboxes that still have disks standing on an image."""
    rows = tx.rows(
        "SELECT DISTINCT sandboxes.id FROM sandboxes JOIN disks ON disks.sandbox = sandboxes.id"
        " WHERE image = ?",
        (image,),
    )
    return sorted(row["id"] for row in rows)


def _columns(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "name": sandbox.name,
        "state": sandbox.state,
        "state_reason": sandbox.state_reason,
        "ready": sandbox.ready,
        "clean_shutdown": sandbox.clean_shutdown,
        "image": sandbox.image,
        "image_name": sandbox.image_name,
        "source_snapshot": sandbox.source_snapshot,
        "cpus": sandbox.cpus,
        "memory": sandbox.memory,
        "storage": sandbox.storage,
        "machine": machines.dump(sandbox.machine),
        "env": json_of(dict(sandbox.env)),
        "metadata": json_of(dict(sandbox.metadata)),
        "tags": json_of(sandbox.tags),
        "uid": sandbox.uid,
        "vmgenid": sandbox.vmgenid,
        "ram_origin": sandbox.ram_origin,
        "ram_since": sandbox.ram_since,
        "created_at": text_of(sandbox.created_at),
        "updated_at": text_of(sandbox.updated_at),
        "started_at": text_of(sandbox.started_at),
        "ready_at": text_of(sandbox.ready_at),
        "terminated_at": text_of(sandbox.terminated_at),
        "generation": sandbox.generation,
    }


def _sandbox(tx: Transaction, row: Row) -> Sandbox:
    return Sandbox(
        id=SandboxId(row["id"]),
        name=row["name"],
        state=SandboxState(row["state"]),
        state_reason=row["state_reason"],
        ready=bool(row["ready"]),
        clean_shutdown=bool(row["clean_shutdown"]),
        image=ImageId(row["image"]),
        image_name=row["image_name"],
        source_snapshot=None
        if row["source_snapshot"] is None
        else SnapshotId(row["source_snapshot"]),
        cpus=row["cpus"],
        memory=row["memory"],
        storage=row["storage"],
        machine=machines.load(row["machine"]),
        disks=OF_SANDBOXES.of(tx, row["id"]),
        env=json.loads(row["env"]),
        metadata=json.loads(row["metadata"]),
        tags=tuple(json.loads(row["tags"])),
        uid=row["uid"],
        vmgenid=row["vmgenid"],
        ram_origin=row["ram_origin"],
        ram_since=row["ram_since"],
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
        started_at=time_of(row["started_at"]),
        ready_at=time_of(row["ready_at"]),
        terminated_at=time_of(row["terminated_at"]),
        generation=row["generation"],
    )
