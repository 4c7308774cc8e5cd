"""Compressing a snapshot: the one use case that asks for jobs."""

from __future__ import annotations

from stratabox.daemon.lifecycle.chains.jobs import Jobs
from stratabox.daemon.lifecycle.creation import require_ready
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import chains, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import ConflictError, FailedError
from stratabox.storage.model.records import Job, Snapshot
from stratabox.storage.model.states import JobState


async def compact(
    world: World, jobs: Jobs, reference: str, *, wait: bool
) -> tuple[Snapshot, list[Job]]:
    """Have a snapshot's own layers compressed. Nobody's leaving ends it.

    :param wait: return when it is done.
    :return: the snapshot as it is then, and the jobs; none, where all is compressed already.
    :raise NotFoundError: SNAPSHOT_NOT_FOUND.
    :raise DeniedError: SNAPSHOT_NOT_READY, INVALID_STATE.
    :raise FailedError: COMPACT_FAILED, when a job failed.
    :raise ConflictError: INTERRUPTED, when a job was cancelled.
    """

    def ask(tx: Transaction) -> tuple[Snapshot, list[Job]]:
        snapshot = snapshots.get(tx, snapshots.resolve(tx, reference))
        require_ready(snapshot)
        return snapshot, chains.ask_to_compact(tx, snapshot)

    snapshot, asked = await world.write(ask)
    jobs.ask()
    if not wait or not asked:
        return snapshot, asked
    done = [await jobs.wait(job.id) for job in asked]
    for job in done:
        if job.state is JobState.FAILED:
            raise FailedError(
                f"snapshot {snapshot.name!r} is not compressed: {job.reason}",
                reason="COMPACT_FAILED",
                job=job.id,
                cause=job.reason.partition(":")[0],
            )
        if job.state is JobState.CANCELLED:
            raise ConflictError(
                f"snapshot {snapshot.name!r} is not compressed: its job was cancelled"
                f" ({job.reason})",
                reason="INTERRUPTED",
                job=job.id,
            )
    return await world.read(lambda tx: snapshots.get(tx, snapshot.id)), done
