"""The records of jobs in the background."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from stratabox.client.records import Snapshot


class JobKind(StrEnum):
    """Why a layer is written anew."""

    #: Layers below it are needed by nothing else: they go with it into one.
    MERGE = "merge"
    #: It stands too high: it is put down onto the lowest layer of its chain.
    FLATTEN = "flatten"
    #: By request: its data is compressed.
    COMPACT = "compact"
    UNKNOWN = "unknown"


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    #: By request.
    PAUSED = "paused"
    #: The new layer has taken the old one's place, for running guests too.
    DONE = "done"
    FAILED = "failed"
    #: By request, or because nothing needs it any more.
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One layer that is written anew in the background."""

    id: str
    kind: JobKind
    state: JobState
    #: The layer that is replaced.
    layer_id: str
    #: Of those that stand on it, 100 at most.
    snapshot_ids: tuple[str, ...]
    sandbox_ids: tuple[str, ...]
    done_bytes: int
    #: 0: not known yet.
    total_bytes: int
    #: Why it failed, was cancelled or waits.
    reason: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What was done to compress a snapshot."""

    #: As it is now.
    snapshot: Snapshot
    #: None, where it was compressed already.
    jobs: tuple[Job, ...]
