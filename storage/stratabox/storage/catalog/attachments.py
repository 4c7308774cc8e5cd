"""Rows of the attachments: which sandbox has which volume, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from stratabox.storage.catalog.database import Row, Transaction, json_of
from stratabox.storage.model.ids import SandboxId, VolumeId
from stratabox.storage.model.records import Attachment, Mount
from stratabox.storage.model.states import AttachmentState

_SELECT = (
    "SELECT attachments.*, volumes.name AS volume_name FROM attachments"
    " JOIN volumes ON volumes.id = attachments.volume"
)


def of_sandbox(tx: Transaction, sandbox: str) -> tuple[Attachment, ...]:
    """A sandbox's volumes, by their slots."""
    rows = tx.rows(f"{_SELECT} WHERE sandbox = ? ORDER BY slot", (sandbox,))
    return tuple(_attachment(row) for row in rows)


def of_volume(tx: Transaction, volume: VolumeId) -> tuple[Attachment, ...]:
    """Who has a volume: one writer, or any number of readers."""
    rows = tx.rows(f"{_SELECT} WHERE volume = ? ORDER BY sandbox", (volume,))
    return tuple(_attachment(row) for row in rows)


def insert(tx: Transaction, attachment: Attachment) -> None:
    """Claim a volume for a sandbox. Whether it may is the caller's to check (`claims`)."""
    tx.insert(
        "attachments",
        {
            "volume": attachment.volume,
            "sandbox": attachment.sandbox,
            "path": attachment.path,
            "read_only": attachment.read_only,
            "slot": attachment.slot,
            "state": attachment.state,
        },
    )


def change(tx: Transaction, sandbox: SandboxId, volume: VolumeId, state: AttachmentState) -> None:
    """Note where an attachment is in its life."""
    tx.execute(
        "UPDATE attachments SET state = ? WHERE sandbox = ? AND volume = ?",
        (state, sandbox, volume),
    )


def delete(tx: Transaction, sandbox: SandboxId, volume: VolumeId) -> None:
    """Release one of a sandbox's volumes."""
    tx.execute("DELETE FROM attachments WHERE sandbox = ? AND volume = ?", (sandbox, volume))


def release(tx: Transaction, sandbox: SandboxId) -> None:
    """Release all of a sandbox's volumes."""
    tx.execute("DELETE FROM attachments WHERE sandbox = ?", (sandbox,))


def rest(tx: Transaction, sandbox: SandboxId) -> None:
    """A sandbox's process is gone: what was on its way out is released, the rest is claimed."""
    tx.execute(
        "DELETE FROM attachments WHERE sandbox = ? AND state = ?",
        (sandbox, AttachmentState.DETACHING),
    )
    tx.execute(
        "UPDATE attachments SET state = ? WHERE sandbox = ?", (AttachmentState.ATTACHED, sandbox)
    )


def mount_of(attachment: Attachment) -> Mount:
    """What stays of an attachment where it is only told of."""
    return Mount(
        volume=attachment.volume,
        volume_name=attachment.volume_name,
        path=attachment.path,
        read_only=attachment.read_only,
        slot=attachment.slot,
    )


def dump_mounts(mounts: Iterable[Mount]) -> str:
    """The text of a column of mounts."""
    return json_of([asdict(mount) for mount in mounts])


def load_mounts(text: str) -> tuple[Mount, ...]:
    """The mounts behind a column's text."""
    return tuple(Mount(**values) for values in json.loads(text))


def _attachment(row: Row) -> Attachment:
    return Attachment(
        volume=VolumeId(row["volume"]),
        volume_name=row["volume_name"],
        sandbox=SandboxId(row["sandbox"]),
        path=row["path"],
        read_only=bool(row["read_only"]),
        slot=row["slot"],
        state=AttachmentState(row["state"]),
    )
