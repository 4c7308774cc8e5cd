"""Snapshots, which are of the level memory here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.snapshots import NEVER, NewSnapshot
from stratabox.daemon.tenki import convert, finding, reading
from stratabox.daemon.tenki.errors import UnservedError, not_running, unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import layers, lookup, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.tenki_tags import OF_SNAPSHOTS
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Snapshot
from stratabox.storage.model.states import Level, SandboxState
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SnapshotCalls:
    """Message in, one call, message out."""

    parts: Parts

    @unary
    async def CreateSnapshot(
        self, request: sandbox_pb2.CreateSnapshotRequest, context: Context
    ) -> sandbox_pb2.CreateSnapshotResponse:
        """Take a snapshot, memory and disks. One that fails is told of by its state."""
        parts = self.parts
        if request.store_raw_image:
            raise UnservedError("CreateSnapshot with store_raw_image")
        guest, record = await finding.living(parts, request.session_id)
        if record.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
            raise not_running(convert.state_name(record))
        if record.state is SandboxState.RUNNING and not record.ready:
            await guest.wait_ready(parts.world.config.ready_timeout)
        expires_at = None
        if request.HasField("expires_at"):
            expires_at = reading.time(request.expires_at, "expires_at")
        wanted = NewSnapshot(name=request.name, level=Level.MEMORY, expires_at=expires_at)
        try:
            taken = await parts.snapshots.create(
                record.id, wanted, wait=not getattr(request, "async")
            )
        except FailedError as error:
            if error.reason != "SNAPSHOT_FAILED":
                raise
            taken = await finding.snapshot(parts, wanted.id)
        return sandbox_pb2.CreateSnapshotResponse(snapshot=await self._message(taken))

    @unary
    async def GetSnapshot(
        self, request: sandbox_pb2.GetSnapshotRequest, context: Context
    ) -> sandbox_pb2.GetSnapshotResponse:
        """Return one snapshot."""
        record = await finding.snapshot(self.parts, request.snapshot_id)
        return sandbox_pb2.GetSnapshotResponse(snapshot=await self._message(record))

    @unary
    async def ListSnapshots(
        self, request: sandbox_pb2.ListSnapshotsRequest, context: Context
    ) -> sandbox_pb2.ListSnapshotsResponse:
        """List snapshots, newest first."""
        found, token = await self._list(request, snapshots.Filter())
        return sandbox_pb2.ListSnapshotsResponse(snapshots=found, next_page_token=token)

    @unary
    async def ListWorkspaceSnapshots(
        self, request: sandbox_pb2.ListWorkspaceSnapshotsRequest, context: Context
    ) -> sandbox_pb2.ListWorkspaceSnapshotsResponse:
        """List the workspace's snapshots, newest first."""
        reading.require_workspace(request.workspace_id)
        found, token = await self._list(request, snapshots.Filter())
        return sandbox_pb2.ListWorkspaceSnapshotsResponse(snapshots=found, next_page_token=token)

    @unary
    async def ListSessionSnapshots(
        self, request: sandbox_pb2.ListSessionSnapshotsRequest, context: Context
    ) -> sandbox_pb2.ListSessionSnapshotsResponse:
        """List one session's snapshots, newest first; also of one that is over."""
        _, session = await finding.session(self.parts, request.session_id)
        wanted = snapshots.Filter(source=SandboxId(session.id))
        found, token = await self._list(request, wanted)
        return sandbox_pb2.ListSessionSnapshotsResponse(snapshots=found, next_page_token=token)

    @unary
    async def ListDanglingSnapshots(
        self, request: sandbox_pb2.ListDanglingSnapshotsRequest, context: Context
    ) -> sandbox_pb2.ListDanglingSnapshotsResponse:
        """List the snapshots whose session is over, newest first."""
        found, token = await self._list(request, snapshots.Filter(dangling=True))
        return sandbox_pb2.ListDanglingSnapshotsResponse(snapshots=found, next_page_token=token)

    @unary
    async def UpdateSnapshot(
        self, request: sandbox_pb2.UpdateSnapshotRequest, context: Context
    ) -> sandbox_pb2.UpdateSnapshotResponse:
        """Change a snapshot's name, expiry or tags."""
        parts = self.parts
        record = await finding.snapshot(parts, request.snapshot_id)
        tags = reading.tags(request.tags)
        expires_at = None
        if request.HasField("expires_at"):
            expires_at = reading.time(request.expires_at, "expires_at")
        record = await parts.snapshots.update(
            record.id,
            name=reading.name(request.name) if request.HasField("name") else None,
            expires_at=NEVER if request.clear_expires_at else expires_at,
        )
        if tags or request.clear_tags:

            def write(tx: Transaction) -> Snapshot:
                OF_SNAPSHOTS.put(tx, record.id, () if request.clear_tags else tags)
                return snapshots.change(tx, record.id)

            record = await parts.world.write(write)
            parts.world.bus.publish(Happening.UPDATED, record)
        return sandbox_pb2.UpdateSnapshotResponse(snapshot=await self._message(record))

    @unary
    async def DeleteSnapshot(
        self, request: sandbox_pb2.DeleteSnapshotRequest, context: Context
    ) -> sandbox_pb2.DeleteSnapshotResponse:
        """Remove a snapshot. Sessions that were made from it go on."""
        record = await finding.snapshot(self.parts, request.snapshot_id)
        message = await self._message(record)
        await self.parts.snapshots.delete(record.id)
        message.state = records_pb2.SNAPSHOT_STATE_DELETED
        return sandbox_pb2.DeleteSnapshotResponse(snapshot=message)

    async def _list(
        self, request: Any, wanted: snapshots.Filter
    ) -> tuple[list[records_pb2.Snapshot], str]:
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[records_pb2.Snapshot], str]:
            records, token = snapshots.list_page(tx, wanted, page)
            return of_snapshots(tx, records), token

        return await self.parts.world.read(look)

    async def _message(self, record: Snapshot) -> records_pb2.Snapshot:
        return (await self.parts.world.read(lambda tx: of_snapshots(tx, [record])))[0]


def of_snapshots(tx: Transaction, records: Sequence[Snapshot]) -> list[records_pb2.Snapshot]:
    """Snapshots' messages, in their order."""
    tags = OF_SNAPSHOTS.of_all(tx, [record.id for record in records])
    return [
        convert.snapshot(
            record,
            tags=tags[record.id],
            compressed=layers.compressed_bytes(tx, [disk.layer for disk in record.disks]),
        )
        for record in records
    ]
