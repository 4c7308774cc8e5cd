"""Rows of the volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from stratabox.storage.catalog import attachments, lookup, quotas
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of
from stratabox.storage.model.errors import AlreadyExistsError, NotFoundError
from stratabox.storage.model.ids import LayerId, SandboxId, VolumeId
from stratabox.storage.model.records import Volume
from stratabox.storage.model.states import NEXT_VOLUME, VolumeState, check_step

DISK_FAILED = "DISK FAILED: "
"""How the reason begins of a volume whose disk gave an I/O error; until it is next opened."""

_WRITTEN_BY = "id IN (SELECT volume FROM attachments WHERE sandbox = ? AND NOT read_only)"


def insert(tx: Transaction, volume: Volume) -> Volume:
    """Add a volume; returns it with its generation.

    :raise AlreadyExistsError: VOLUME_ALREADY_EXISTS, when the name is taken.
    :raise NotFoundError: WORKSPACE_NOT_FOUND.
    :raise QuotaExceededError: QUOTA_EXCEEDED.
    """
    _require_free(tx, volume)
    volume = replace(volume, generation=tx.next_generation())
    tx.insert("volumes", {"id": volume.id, "workspace": volume.workspace, **_columns(volume)})
    quotas.require(tx, volume.workspace, "disk")
    tx.noted.append(("created", volume.workspace, volume))
    return volume


def resolve(tx: Transaction, reference: str) -> VolumeId:
    """The id behind an id, name or start of an id.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return VolumeId(lookup.resolve(tx, "volumes", "volume", reference))


def get(tx: Transaction, volume: VolumeId) -> Volume:
    """One volume, with who has it. :raise NotFoundError: VOLUME_NOT_FOUND."""
    row = tx.row("SELECT * FROM volumes WHERE id = ?", (volume,))
    if row is None:
        raise NotFoundError(
            f"there is no volume {volume!r}", reason="VOLUME_NOT_FOUND", volume=volume
        )
    return _volume(tx, row)


def change(tx: Transaction, volume: VolumeId, **changes: Any) -> Volume:
    """Change a volume: the one function through which its row ever changes.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise AlreadyExistsError: VOLUME_ALREADY_EXISTS, when the new name is taken.
    :raise QuotaExceededError: QUOTA_EXCEEDED, when it is to be larger.
    :raise InternalError: when the change of state is not legal.
    """
    old = get(tx, volume)
    new = replace(old, **changes, updated_at=tx.now, generation=tx.next_generation())
    check_step(NEXT_VOLUME, old.state, new.state)
    if new.name != old.name:
        _require_free(tx, new)
    tx.update("volumes", volume, _columns(new))
    if new.size > old.size:
        quotas.require(tx, new.workspace, "disk")
    tx.noted.append(("updated", new.workspace, new))
    return new


def note_written(tx: Transaction, sandbox: SandboxId) -> None:
    """A guest is about to write the volumes of this sandbox: until it lets go they are not clean.

    Callers see nothing of it, so no record's generation grows.
    """
    tx.execute(f"UPDATE volumes SET clean = 0 WHERE {_WRITTEN_BY}", (sandbox,))


def note_clean(tx: Transaction, sandbox: SandboxId) -> None:
    """A guest has shut down in good order: the volumes that it wrote are clean.

    Not those whose disk has failed: what it wrote last may not be there.
    """
    tx.execute(f"UPDATE volumes SET clean = 1 WHERE {_WRITTEN_BY} AND reason = ''", (sandbox,))


def note_failed(tx: Transaction, volume: VolumeId, what: str) -> None:
    """The host's disk gave an I/O error under a volume. The first one is what is told.

    :param what: for people: what failed, and what to do.
    """
    if not get(tx, volume).reason:
        change(tx, volume, reason=DISK_FAILED + what)


def note_opened(tx: Transaction, sandbox: SandboxId, *, booting: bool) -> None:
    """A QEMU has opened the volumes of this sandbox, as `note_written` says.

    :param booting: its guest mounts them anew; what was said of a failed disk is over by that.
    """
    note_written(tx, sandbox)
    for each in attachments.of_sandbox(tx, sandbox) if booting else ():
        forget_failure(tx, each.volume)


def forget_failure(tx: Transaction, volume: VolumeId) -> None:
    """It is opened and mounted anew: whether its disk still fails shows then."""
    if get(tx, volume).reason.startswith(DISK_FAILED):
        change(tx, volume, reason="")


def delete(tx: Transaction, volume: VolumeId) -> None:
    """Remove the row; a layer that nothing else needs becomes garbage by it."""
    row = tx.row("SELECT * FROM volumes WHERE id = ?", (volume,))
    if row is not None:
        tx.noted.append(("deleted", row["workspace"], _volume(tx, row)))
    tx.execute("DELETE FROM volumes WHERE id = ?", (volume,))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which volumes; everything given must fit."""

    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


def list_page(
    tx: Transaction, wanted: Filter, page: lookup.Page = lookup.FIRST_PAGE
) -> tuple[list[Volume], str]:
    """One page, newest first, and the next page's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    values: dict[str, Any] = {}
    conditions = []
    if wanted.name:
        conditions.append("name = :name")
        values["name"] = wanted.name
    conditions += lookup.entries_condition("metadata", wanted.metadata, values)
    rows, token = lookup.list_page(tx, "volumes", page, conditions, values)
    return [_volume(tx, row) for row in rows], token


def everything(tx: Transaction) -> list[Volume]:
    """All volumes, oldest first."""
    return [_volume(tx, row) for row in tx.rows("SELECT * FROM volumes ORDER BY created_at, id")]


def _require_free(tx: Transaction, volume: Volume) -> None:
    taken = tx.row(
        "SELECT id FROM volumes WHERE workspace = ? AND name = ? AND id != ?",
        (volume.workspace, volume.name, volume.id),
    )
    if taken:
        raise AlreadyExistsError(
            f"there is a volume {volume.name!r} already: choose another name or delete it",
            reason="VOLUME_ALREADY_EXISTS",
            volume=taken["id"],
        )


def _columns(volume: Volume) -> dict[str, Any]:
    return {
        "name": volume.name,
        "state": volume.state,
        "reason": volume.reason,
        "size": volume.size,
        "layer": volume.layer,
        "filesystem": volume.filesystem,
        "clean": volume.clean,
        "source": volume.source,
        "metadata": json_of(dict(volume.metadata)),
        "created_at": text_of(volume.created_at),
        "updated_at": text_of(volume.updated_at),
        "generation": volume.generation,
    }


def _volume(tx: Transaction, row: Row) -> Volume:
    return Volume(
        id=VolumeId(row["id"]),
        workspace=row["workspace"],
        name=row["name"],
        state=VolumeState(row["state"]),
        reason=row["reason"],
        size=row["size"],
        layer=None if row["layer"] is None else LayerId(row["layer"]),
        filesystem=row["filesystem"],
        clean=bool(row["clean"]),
        source=row["source"],
        metadata=json.loads(row["metadata"]),
        attachments=attachments.of_volume(tx, VolumeId(row["id"])),
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
        generation=row["generation"],
    )
