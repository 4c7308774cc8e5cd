"""Rows of what is under way.

A row is written in the same transaction as the first change of its operation and removed with the
last. What a daemon finds at its start was left by one that was killed, and is finished or undone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stratabox.storage.catalog.database import Transaction, json_of, text_of
from stratabox.storage.model.ids import OperationId, SandboxId, SnapshotId, mint


class Kind(StrEnum):
    """What is being done."""

    CREATE = "create"
    SNAPSHOT = "snapshot"
    CLONE = "clone"
    REVERT = "revert"
    PARK = "park"
    """Pause to disk."""
    VOLUME = "volume"
    """A volume's layer is sealed; `sandbox` is the one that writes it."""
    IMPORT = "import"
    """A snapshot comes from an archive; `snapshot` and the payload name the files to be."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing under way."""

    kind: Kind
    sandbox: SandboxId | None = None
    snapshot: SnapshotId | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    id: OperationId = field(default_factory=lambda: OperationId(mint()))


def begin(tx: Transaction, operation: Operation) -> Operation:
    """Write it down, before its first side effect."""
    tx.insert(
        "operations",
        {
            "id": operation.id,
            "kind": operation.kind,
            "sandbox": operation.sandbox,
            "snapshot": operation.snapshot,
            "payload": json_of(operation.payload),
            "created_at": text_of(tx.now),
        },
    )
    return operation


def amend(tx: Transaction, operation: OperationId, payload: Mapping[str, Any]) -> None:
    """Note how far it has come."""
    tx.update("operations", operation, {"payload": json_of(payload)})


def end(tx: Transaction, operation: OperationId) -> None:
    """It is done, or undone."""
    tx.execute("DELETE FROM operations WHERE id = ?", (operation,))


def unfinished(tx: Transaction) -> list[Operation]:
    """All of them, oldest first."""
    return [
        Operation(
            id=OperationId(row["id"]),
            kind=Kind(row["kind"]),
            sandbox=row["sandbox"],
            snapshot=row["snapshot"],
            payload=json.loads(row["payload"]),
        )
        for row in tx.rows("SELECT * FROM operations ORDER BY created_at, id")
    ]
