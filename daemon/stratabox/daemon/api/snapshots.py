"""SnapshotsService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert, messages, networks, probes
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.api.jobs import as_messages
from stratabox.daemon.api.sandboxes import expiry, mask_paths, ready_timeout
from stratabox.daemon.api.watching import one_by_one, watch
from stratabox.daemon.lifecycle.chains.compacting import compact
from stratabox.daemon.lifecycle.chains.jobs import Jobs
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.snapshots import NEVER, NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import lookup, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, NotFoundError
from stratabox.storage.model.ids import SandboxId, is_id
from stratabox.storage.model.records import Snapshot
from stratabox.v1 import records_pb2, snapshots_pb2, snapshots_pb2_grpc

Context = ServicerContext[Any, Any]

_MUTABLE = {"name", "metadata", "expires_at"}


@dataclass(frozen=True, kw_only=True)
class SnapshotsServicer(snapshots_pb2_grpc.SnapshotsServiceServicer):
    """Message in, one call, message out."""

    world: World
    sandboxes: Sandboxes
    snapshots: Snapshots
    jobs: Jobs

    @unary
    async def CreateSnapshot(
        self, request: snapshots_pb2.CreateSnapshotRequest, context: Context
    ) -> records_pb2.Snapshot:
        """Capture a sandbox."""
        expires_at = None
        if request.HasField("expires_at"):
            expires_at = convert.time_from(request.expires_at, "expires_at")
        wanted = NewSnapshot(
            name=request.name,
            level=convert.level_from(request.level),
            expires_at=expires_at,
            metadata=dict(request.metadata),
        )
        record = await self.snapshots.create(
            request.sandbox,
            wanted,
            wait=not request.HasField("wait") or request.wait,
            key=convert.key_from("CreateSnapshot", request),
        )
        return await self._message(record)

    @unary
    async def GetSnapshot(
        self, request: snapshots_pb2.GetSnapshotRequest, context: Context
    ) -> records_pb2.Snapshot:
        """Return one snapshot."""

        def look(tx: Transaction) -> records_pb2.Snapshot:
            record = snapshots.get(tx, snapshots.resolve(tx, request.snapshot))
            return messages.of_snapshots(tx, self.world, [record])[0]

        return await self.world.read(look)

    @unary
    async def ListSnapshots(
        self, request: snapshots_pb2.ListSnapshotsRequest, context: Context
    ) -> snapshots_pb2.ListSnapshotsResponse:
        """List snapshots, newest first."""
        states = convert.snapshot_states(request.states)
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[records_pb2.Snapshot], str]:
            wanted = snapshots.Filter(
                source=_source(tx, request.sandbox),
                states=states,
                name=request.name,
                metadata=dict(request.metadata),
            )
            if request.states and not states:
                return [], ""
            records, token = snapshots.list_page(tx, wanted, page)
            return messages.of_snapshots(tx, self.world, records), token

        found, token = await self.world.read(look)
        return snapshots_pb2.ListSnapshotsResponse(snapshots=found, next_page_token=token)

    @unary
    async def UpdateSnapshot(
        self, request: snapshots_pb2.UpdateSnapshotRequest, context: Context
    ) -> records_pb2.Snapshot:
        """Change name, metadata or expires_at."""
        paths = mask_paths(request.update_mask.paths, _MUTABLE)
        new = request.snapshot
        expires_at = None
        if "expires_at" in paths:
            expires_at = (
                convert.time_from(new.expires_at, "expires_at")
                if new.HasField("expires_at")
                else NEVER
            )
        record = await self.snapshots.update(
            new.id,
            name=new.name if "name" in paths else None,
            metadata=dict(new.metadata) if "metadata" in paths else None,
            expires_at=expires_at,
        )
        return await self._message(record)

    @unary
    async def DeleteSnapshot(
        self, request: snapshots_pb2.DeleteSnapshotRequest, context: Context
    ) -> snapshots_pb2.DeleteSnapshotResponse:
        """Remove a snapshot."""
        delete = self.snapshots.foresee_delete if request.dry_run else self.snapshots.delete
        done = await delete(request.snapshot)
        return snapshots_pb2.DeleteSnapshotResponse(
            id=done.id,
            freed_bytes=done.freed_bytes,
            kept_bytes=done.kept_bytes,
            kept_for=done.kept_for,
        )

    @unary
    async def RestoreSnapshot(
        self, request: snapshots_pb2.RestoreSnapshotRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Make a new sandbox from a snapshot."""
        if not request.snapshot:
            raise InvalidArgumentError("snapshot is empty", field="snapshot")
        wanted = NewSandbox(
            snapshot=request.snapshot,
            name=request.name,
            resources=convert.resources_from(request.resources),
            env=dict(request.env),
            metadata=dict(request.metadata),
            tags=tuple(request.tags),
            cold=request.cold,
            expires_at=expiry(request),
            on_timeout=convert.on_timeout_from(request.on_timeout),
            identity=convert.identity_from(request.identity),
            paused=request.paused,
            verify=request.verify,
            volumes=convert.wishes_from(request.volumes),
            probe=probes.probe_from(request),
            network=networks.wanted(request),
            ready_timeout=ready_timeout(self.world, request),
        )
        key = convert.key_from("RestoreSnapshot", request)
        record = await self.sandboxes.create(wanted, key)
        return (await self.world.read(lambda tx: messages.of_sandboxes(tx, self.world, [record])))[
            0
        ]

    @unary
    async def CompactSnapshot(
        self, request: snapshots_pb2.CompactSnapshotRequest, context: Context
    ) -> snapshots_pb2.CompactSnapshotResponse:
        """Have a snapshot compressed."""
        wait = not request.HasField("wait") or request.wait
        record, found = await compact(self.world, self.jobs, request.snapshot, wait=wait)
        return snapshots_pb2.CompactSnapshotResponse(
            snapshot=await self._message(record), jobs=await as_messages(self.world, found)
        )

    @streaming
    async def WatchSnapshots(
        self, request: snapshots_pb2.WatchSnapshotsRequest, context: Context
    ) -> AsyncIterator[snapshots_pb2.SnapshotEvent]:
        """Stream every change."""

        def look(tx: Transaction) -> tuple[AsyncIterator[Snapshot], Callable[[Snapshot], bool]]:
            source = _source(tx, request.sandbox)
            wanted = {snapshots.resolve(tx, reference) for reference in request.snapshots}

            def fits(record: Snapshot) -> bool:
                return (not wanted or record.id in wanted) and (
                    source is None or record.source_sandbox == source
                )

            if wanted:
                records = [snapshots.get(tx, snapshot) for snapshot in sorted(wanted)]
                return one_by_one(records), fits
            return self._all(source), fits

        async for event, record in watch(
            self.world.bus,
            Snapshot,
            lambda: self.world.read(look),
            changes_only=request.changes_only,
        ):
            yield snapshots_pb2.SnapshotEvent(
                type=convert.happening(event),
                snapshot=await self._message(record),
                time=convert.timestamp(event.time),
                freed_bytes=event.freed_bytes,
            )

    async def _all(self, source: SandboxId | None) -> AsyncIterator[Snapshot]:
        """All snapshots, or all of a sandbox, oldest first; never all of them at once."""
        place: Snapshot | None = None
        while records := await self.world.read(partial(snapshots.some, source=source, after=place)):
            for record in records:
                yield record
            place = records[-1]

    async def _message(self, record: Snapshot) -> records_pb2.Snapshot:
        return (await self.world.read(lambda tx: messages.of_snapshots(tx, self.world, [record])))[
            0
        ]


def _source(tx: Transaction, reference: str) -> SandboxId | None:
    """The sandbox whose snapshots are meant; one that is gone is known by its whole id."""
    if not reference:
        return None
    try:
        return sandboxes.resolve(tx, reference)
    except NotFoundError:
        if is_id(reference) and snapshots.any_of_source(tx, SandboxId(reference)):
            return SandboxId(reference)
        raise
