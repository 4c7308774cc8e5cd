"""Rows of the sandboxes and their disks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from stratabox.storage.catalog import (
    attachments,
    lookup,
    machines,
    networks,
    ports,
    previews,
    probes,
    quotas,
    schedules,
)
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of, time_of
from stratabox.storage.catalog.disks import OF_SANDBOXES
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import ImageId, SandboxId, SnapshotId
from stratabox.storage.model.network import NO_NETWORK
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import (
    NEXT_SANDBOX,
    Identity,
    SandboxState,
    TimeoutAction,
    check_step,
)

_WITHOUT_PROCESS = (SandboxState.STOPPED, SandboxState.FAILED, SandboxState.TERMINATED)
"""Its process is gone for good in these; in TERMINATING it may still be there."""


def insert(tx: Transaction, sandbox: Sandbox) -> Sandbox:
    """Add a sandbox with its disks; returns it with its generation.

    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    :raise QuotaExceededError: QUOTA_EXCEEDED.
    """
    sandbox = replace(sandbox, generation=tx.next_generation())
    tx.insert("sandboxes", {"id": sandbox.id, "workspace": sandbox.workspace, **_columns(sandbox)})
    OF_SANDBOXES.insert(tx, sandbox.id, sandbox.disks)
    quotas.require(tx, sandbox.workspace, "sandboxes", "cpus", "memory", "disk")
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
        # Without a process nothing stands on any saved memory, and nobody is there to be told what
        # time it is. A copy that was never renewed is still to be.
        renews = new.identity_due is Identity.RENEW and not new.state.is_over
        due = Identity.RENEW if renews else None
        new = replace(new, ram_origin=None, ram_since=None, ram_parked=None, identity_due=due)
    check_step(NEXT_SANDBOX, old.state, new.state)
    tx.update("sandboxes", sandbox, _columns(new))
    if new.disks != old.disks:
        OF_SANDBOXES.replace(tx, sandbox, new.disks)
    if new.state is SandboxState.TERMINATED:
        ports.release(tx, sandbox)
        previews.release(tx, sandbox)
    if old.volumes and new.state in _WITHOUT_PROCESS:
        if new.state is SandboxState.TERMINATED:
            attachments.release(tx, sandbox)
        else:
            attachments.rest(tx, sandbox)
        new = replace(new, volumes=attachments.of_sandbox(tx, sandbox))
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
    narrow = bool(wanted.name)
    rows, token = lookup.list_page(tx, "sandboxes", page, conditions, values, narrow=narrow)
    return [_sandbox(tx, row) for row in rows], token


def everything(tx: Transaction, *, own: bool = False) -> list[Sandbox]:
    """All sandboxes, terminated ones too, oldest first.

    :param own: only those that whom the transaction is for may see.
    """
    which = lookup.own(tx, "sandboxes") if own else "1"
    rows = tx.rows(
        f"SELECT * FROM sandboxes WHERE {which} ORDER BY created_at, id",
        {"workspace": tx.workspace},
    )
    return [_sandbox(tx, row) for row in rows]


def memory_in_use(tx: Transaction) -> dict[SandboxId, int]:
    """RAM (MiB) of each sandbox that has a process, is about to get one, or is losing it."""
    rows = tx.rows(
        "SELECT id, memory FROM sandboxes WHERE ram_parked IS NULL"
        " AND state IN ('creating', 'running', 'paused', 'terminating')"
    )
    return {SandboxId(row["id"]): row["memory"] for row in rows}


def cpus_in_use(tx: Transaction) -> dict[SandboxId, int]:
    """CPUs of the same sandboxes."""
    rows = tx.rows(
        "SELECT id, cpus FROM sandboxes WHERE ram_parked IS NULL"
        " AND state IN ('creating', 'running', 'paused', 'terminating')"
    )
    return {SandboxId(row["id"]): row["cpus"] for row in rows}


def expired(tx: Transaction) -> list[SandboxId]:
    """Those whose time is up, the longest first."""
    rows = tx.rows(
        "SELECT id FROM sandboxes WHERE expires_at <= ?"
        " AND state NOT IN ('terminating', 'terminated') ORDER BY expires_at",
        (text_of(tx.now),),
    )
    return [SandboxId(row["id"]) for row in rows]


def due_for_snapshot(tx: Transaction) -> list[SandboxId]:
    """Those of which a snapshot is due by their schedule, and that can be captured."""
    rows = tx.rows(
        "SELECT id FROM sandboxes WHERE schedule_next_at <= ? AND state IN ('running', 'paused')"
        " ORDER BY schedule_next_at",
        (text_of(tx.now),),
    )
    return [SandboxId(row["id"]) for row in rows]


def that_keep_some(tx: Transaction) -> list[SandboxId]:
    """Those that keep only so many of their snapshots."""
    rows = tx.rows("SELECT id FROM sandboxes WHERE keep_last > 0 AND state != 'terminated'")
    return [SandboxId(row["id"]) for row in rows]


def free_uid(tx: Transaction, base: int, count: int, reserved: Collection[int] = ()) -> int | None:
    """The lowest uid of a range that no sandbox has; None when all are taken.

    :param reserved: these are taken too.
    """
    taken = {
        row["uid"]
        for row in tx.rows(
            "SELECT uid FROM sandboxes WHERE uid >= ? AND uid < ?", (base, base + count)
        )
    }
    free = (uid for uid in range(base, base + count) if uid not in taken and uid not in reserved)
    return next(free, None)


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
        "ram_parked": sandbox.ram_parked,
        "identity_due": sandbox.identity_due,
        "expires_at": text_of(sandbox.expires_at),
        "on_timeout": sandbox.on_timeout,
        "keep_last": sandbox.keep_last,
        **schedules.columns(sandbox.schedule),
        "left_behind": attachments.dump_mounts(sandbox.left_behind),
        "probe": probes.dump(sandbox.probe),
        "network": networks.dump(sandbox.network),
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
        workspace=row["workspace"],
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
        ram_parked=row["ram_parked"],
        identity_due=None if row["identity_due"] is None else Identity(row["identity_due"]),
        expires_at=time_of(row["expires_at"]),
        on_timeout=TimeoutAction(row["on_timeout"]),
        keep_last=row["keep_last"],
        schedule=schedules.load(row),
        volumes=attachments.of_sandbox(tx, row["id"]),
        left_behind=attachments.load_mounts(row["left_behind"]),
        probe=probes.load(row["probe"]),
        network=networks.load(row["network"]) or NO_NETWORK,
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
        started_at=time_of(row["started_at"]),
        ready_at=time_of(row["ready_at"]),
        terminated_at=time_of(row["terminated_at"]),
        generation=row["generation"],
    )
