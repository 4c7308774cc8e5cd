"""From a session's id to its guest and record, in the states that a call takes."""

from __future__ import annotations

from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.tenki import convert, errors
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import snapshots, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import SnapshotId, VolumeId, is_id
from stratabox.storage.model.records import Sandbox, Snapshot, Volume
from stratabox.storage.model.states import SandboxState


async def session(parts: Parts, session_id: str) -> tuple[Guest, Sandbox]:
    """A session in whatever state. Only a whole id names one.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    """
    if is_id(session_id):
        guest, record = await parts.guests.find(session_id)
        if record.id == session_id:  # and not of that name
            return guest, record
    raise NotFoundError("session not found", reason="SANDBOX_NOT_FOUND")


async def living(parts: Parts, session_id: str) -> tuple[Guest, Sandbox]:
    """A session that is not over.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    :raise DeniedError: SESSION_TERMINATED.
    """
    guest, record = await session(parts, session_id)
    if record.state.is_over:
        raise errors.terminated()
    return guest, record


async def running(parts: Parts, session_id: str) -> Guest:
    """The guest of a session that runs; of one that has been started, once it is ready.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    :raise DeniedError: SESSION_TERMINATED or SESSION_NOT_RUNNING.
    :raise StrataboxError: as ``Guest.wait_ready``.
    """
    guest, record = await living(parts, session_id)
    require_running(record)
    if not record.ready:
        await guest.wait_ready(parts.world.config.ready_timeout)
    return guest


async def snapshot(parts: Parts, snapshot_id: str) -> Snapshot:
    """A snapshot. Only a whole id names one. :raise NotFoundError: SNAPSHOT_NOT_FOUND."""

    def look(tx: Transaction) -> Snapshot:
        found = snapshots.resolve(tx, snapshot_id) if is_id(snapshot_id) else None
        if found != snapshot_id:
            raise NotFoundError(
                "snapshot not found", reason="SNAPSHOT_NOT_FOUND", snapshot=snapshot_id
            )
        return snapshots.get(tx, SnapshotId(snapshot_id))

    return await parts.world.read(look)


async def volume(parts: Parts, volume_id: str) -> Volume:
    """A volume. Only a whole id names one. :raise NotFoundError: VOLUME_NOT_FOUND."""

    def look(tx: Transaction) -> Volume:
        found = volumes.resolve(tx, volume_id) if is_id(volume_id) else None
        if found != volume_id:
            raise NotFoundError("volume not found", reason="VOLUME_NOT_FOUND", volume=volume_id)
        return volumes.get(tx, VolumeId(volume_id))

    return await parts.world.read(look)


def require_running(record: Sandbox) -> None:
    """:raise DeniedError: SESSION_TERMINATED or SESSION_NOT_RUNNING."""
    if record.state.is_over:
        raise errors.terminated()
    if record.state is not SandboxState.RUNNING:
        raise errors.not_running(convert.state_name(record))
