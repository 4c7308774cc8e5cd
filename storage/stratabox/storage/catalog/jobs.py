"""Rows of the jobs: layers that are written anew in the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from stratabox.storage.catalog import lookup, workspaces
from stratabox.storage.catalog.database import Row, Transaction, text_of, time_of
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import JobId, LayerId
from stratabox.storage.model.records import Job
from stratabox.storage.model.states import JobKind, JobState

KEPT = timedelta(hours=24)
"""How long a job that is over can be looked at."""

_ACTIVE = "state IN ('queued', 'running', 'paused')"


def insert(tx: Transaction, job: Job) -> Job:
    """Add a job; it is theirs whose layers it writes anew."""
    owner = workspaces.of_layer(tx, job.layer)
    tx.insert("jobs", {"id": job.id, "workspace": owner, **_columns(job)})
    tx.noted.append(("created", owner, job))
    return job


def resolve(tx: Transaction, reference: str) -> JobId:
    """The id behind an id or the start of one.

    :raise NotFoundError: JOB_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME.
    """
    return JobId(lookup.resolve_id(tx, "jobs", "job", reference))


def get(tx: Transaction, job: JobId) -> Job:
    """One job. :raise NotFoundError: JOB_NOT_FOUND."""
    row = tx.row("SELECT * FROM jobs WHERE id = ?", (job,))
    if row is None:
        raise NotFoundError(f"there is no job {job!r}", reason="JOB_NOT_FOUND", job=job)
    return _job(row)


def change(tx: Transaction, job: JobId, **changes: Any) -> Job:
    """Change a job: the one function through which its row ever changes.

    One that is over stays what it is.

    :raise NotFoundError: JOB_NOT_FOUND.
    """
    old = get(tx, job)
    if old.state.is_over:
        return old
    new = replace(old, **changes)
    if new.state.is_over:
        new = replace(new, ended_at=tx.now, ended_generation=tx.next_generation())
    tx.update("jobs", job, _columns(new))
    row = tx.row("SELECT workspace FROM jobs WHERE id = ?", (job,))
    assert row is not None
    tx.noted.append(("updated", row["workspace"], new))
    return new


def forget(tx: Transaction, job: JobId) -> None:
    """Remove the row of one that was planned and is not needed any more."""
    tx.execute("DELETE FROM jobs WHERE id = ?", (job,))


def prune(tx: Transaction) -> None:
    """Remove the rows of those that were over long ago."""
    tx.execute("DELETE FROM jobs WHERE ended_at < ?", (text_of(tx.now - KEPT),))


def everything(tx: Transaction, *, over: bool = False, own: bool = False) -> list[Job]:
    """All that are under way or wait, oldest first.

    :param over: those that are over, too.
    :param own: only those that whom the transaction is for may see.
    """
    which = "1" if over else _ACTIVE
    whose = lookup.own(tx, "jobs") if own else "1"
    rows = tx.rows(
        f"SELECT * FROM jobs WHERE {which} AND {whose} ORDER BY rowid",
        {"workspace": tx.workspace},
    )
    return [_job(row) for row in rows]


def in_states(tx: Transaction, *states: JobState) -> list[Job]:
    """Those in one of these states, oldest first."""
    values: dict[str, Any] = {}
    (condition,) = lookup.any_of("state", states, values)
    return [
        _job(row) for row in tx.rows(f"SELECT * FROM jobs WHERE {condition} ORDER BY rowid", values)
    ]


def of_layer(tx: Transaction, layer: LayerId) -> list[Job]:
    """Those that write or wrote that layer anew, oldest first."""
    return [
        _job(row) for row in tx.rows("SELECT * FROM jobs WHERE layer = ? ORDER BY rowid", (layer,))
    ]


def follow(tx: Transaction, old: LayerId, new: LayerId, *, but: JobId) -> None:
    """A layer has taken the place of another: what waits is about the new one from now on."""
    for column in ("layer", "base"):
        tx.execute(
            f"UPDATE jobs SET {column} = ? WHERE {column} = ? AND id != ? AND {_ACTIVE}",
            (new, old, but),
        )


def targets(tx: Transaction) -> Sequence[LayerId]:
    """Layers that are being written, whose files have no row yet."""
    rows = tx.rows("SELECT target FROM jobs WHERE state IN ('running', 'paused')")
    return [LayerId(row["target"]) for row in rows]


def _columns(job: Job) -> dict[str, Any]:
    return {
        "kind": job.kind,
        "state": job.state,
        "layer": job.layer,
        "base": job.base,
        "target": job.target,
        "done_bytes": job.done_bytes,
        "total_bytes": job.total_bytes,
        "reason": job.reason,
        "created_at": text_of(job.created_at),
        "started_at": text_of(job.started_at),
        "ended_at": text_of(job.ended_at),
        "ended_generation": job.ended_generation,
    }


def _job(row: Row) -> Job:
    return Job(
        id=JobId(row["id"]),
        kind=JobKind(row["kind"]),
        state=JobState(row["state"]),
        layer=LayerId(row["layer"]),
        base=None if row["base"] is None else LayerId(row["base"]),
        target=LayerId(row["target"]),
        done_bytes=row["done_bytes"],
        total_bytes=row["total_bytes"],
        reason=row["reason"],
        created_at=datetime.fromisoformat(row["created_at"]),
        started_at=time_of(row["started_at"]),
        ended_at=time_of(row["ended_at"]),
        ended_generation=row["ended_generation"],
    )
