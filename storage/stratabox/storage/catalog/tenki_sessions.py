"""Rows of what Tenki's API knows of a sandbox beyond the sandbox's own row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of, time_of
from stratabox.storage.model.ids import SandboxId


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a session is beyond its sandbox. A sandbox that was made otherwise has the defaults."""

    owner: str = ""
    """Id of the API key that made it; "": the Unix socket."""
    inbound: bool = True
    """Its ports may be exposed."""
    sticky: bool = False
    """It runs until somebody ends it."""
    timeout_at: datetime | None = None
    """When it is over while it runs; None: never."""
    pause_retention: timedelta | None = None
    """How long it is kept while it is paused; None: for ever."""
    paused_at: datetime | None = None
    """Set while it is paused, and until it is ready again."""
    last_resume_error: str = ""


@dataclass(frozen=True)
class SnapshotsTaken:
    """What there is of a sandbox's snapshots."""

    number: int = 0
    bytes: int = 0
    """On the host's disk, in the layers and the memory that they sealed."""


def insert(tx: Transaction, sandbox: SandboxId, session: Session) -> None:
    """Add what is known of a new sandbox."""
    tx.insert("tenki_sessions", {"sandbox": sandbox, **_columns(session)})


def of(tx: Transaction, sandbox: SandboxId) -> Session:
    """What is known of one sandbox."""
    row = tx.row("SELECT * FROM tenki_sessions WHERE sandbox = ?", (sandbox,))
    return Session() if row is None else _session(row)


def of_all(tx: Transaction, sandboxes: Sequence[SandboxId]) -> dict[SandboxId, Session]:
    """What is known of several; each of them is there."""
    rows = tx.rows(
        "SELECT * FROM tenki_sessions WHERE sandbox IN (SELECT value FROM json_each(?))",
        (json_of(list(sandboxes)),),
    )
    known = {SandboxId(row["sandbox"]): _session(row) for row in rows}
    return {sandbox: known.get(sandbox, Session()) for sandbox in sandboxes}


def snapshots_of_all(
    tx: Transaction, sandboxes: Sequence[SandboxId]
) -> dict[SandboxId, SnapshotsTaken]:
    """What there is of the snapshots of several sandboxes; each of them is there."""
    rows = tx.rows(
        "SELECT source_sandbox, count(*) AS number,"
        " sum(layer_bytes + coalesce((SELECT bytes FROM rams WHERE rams.id = snapshots.id), 0))"
        " AS bytes FROM snapshots"
        " WHERE source_sandbox IN (SELECT value FROM json_each(?)) GROUP BY source_sandbox",
        (json_of(list(sandboxes)),),
    )
    found = {
        SandboxId(row["source_sandbox"]): SnapshotsTaken(row["number"], row["bytes"])
        for row in rows
    }
    return {sandbox: found.get(sandbox, SnapshotsTaken()) for sandbox in sandboxes}


def change(tx: Transaction, sandbox: SandboxId, **changes: Any) -> Session:
    """Change what is known of a sandbox whose row exists."""
    new = replace(of(tx, sandbox), **changes)
    tx.execute("DELETE FROM tenki_sessions WHERE sandbox = ?", (sandbox,))
    insert(tx, sandbox, new)
    return new


def _columns(session: Session) -> dict[str, Any]:
    retention = session.pause_retention
    return {
        "owner": session.owner,
        "inbound": session.inbound,
        "sticky": session.sticky,
        "timeout_at": text_of(session.timeout_at),
        "pause_retention": None if retention is None else retention.total_seconds(),
        "paused_at": text_of(session.paused_at),
        "last_resume_error": session.last_resume_error,
    }


def _session(row: Row) -> Session:
    retention = row["pause_retention"]
    return Session(
        owner=row["owner"],
        inbound=bool(row["inbound"]),
        sticky=bool(row["sticky"]),
        timeout_at=time_of(row["timeout_at"]),
        pause_retention=None if retention is None else timedelta(seconds=retention),
        paused_at=time_of(row["paused_at"]),
        last_resume_error=row["last_resume_error"],
    )
