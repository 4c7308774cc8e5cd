"""VolumesService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert, messages
from stratabox.daemon.api.errors import unary
from stratabox.daemon.api.sandboxes import mask_paths
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.volumes import attaching
from stratabox.daemon.lifecycle.volumes.volumes import NewVolume, Volumes
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import lookup, space, volume_snapshots, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError, NotFoundError
from stratabox.storage.model.ids import VolumeId, is_id
from stratabox.storage.model.records import Sandbox, Volume, VolumeSnapshot
from stratabox.v1 import records_pb2, volumes_pb2, volumes_pb2_grpc

Context = ServicerContext[Any, Any]

_MUTABLE = {"name", "metadata"}


@dataclass(frozen=True, kw_only=True)
class VolumesServicer(volumes_pb2_grpc.VolumesServiceServicer):
    """Message in, one call, message out."""

    world: World
    guests: Guests
    volumes: Volumes

    @unary
    async def CreateVolume(
        self, request: volumes_pb2.CreateVolumeRequest, context: Context
    ) -> volumes_pb2.Volume:
        """Make a volume, empty or a copy."""
        source = request.WhichOneof("source")
        if source and not getattr(request, source):
            raise InvalidArgumentError(f"{source} is empty", field=source)
        wanted = NewVolume(
            name=request.name,
            size=request.size_bytes,
            metadata=dict(request.metadata),
            volume=request.volume,
            snapshot=request.volume_snapshot,
        )
        key = convert.key_from("CreateVolume", request)
        return await self._message(await self.volumes.create(wanted, key))

    @unary
    async def GetVolume(
        self, request: volumes_pb2.GetVolumeRequest, context: Context
    ) -> volumes_pb2.Volume:
        """Return one volume."""
        return await self._message(
            await self.world.read(lambda tx: volumes.get(tx, volumes.resolve(tx, request.volume)))
        )

    @unary
    async def ListVolumes(
        self, request: volumes_pb2.ListVolumesRequest, context: Context
    ) -> volumes_pb2.ListVolumesResponse:
        """List volumes, newest first."""
        wanted = volumes.Filter(name=request.name, metadata=dict(request.metadata))
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[volumes_pb2.Volume], str]:
            records, token = volumes.list_page(tx, wanted, page)
            return _volumes(tx, self.world, records), token

        found, token = await self.world.read(look)
        return volumes_pb2.ListVolumesResponse(volumes=found, next_page_token=token)

    @unary
    async def UpdateVolume(
        self, request: volumes_pb2.UpdateVolumeRequest, context: Context
    ) -> volumes_pb2.Volume:
        """Change name or metadata."""
        paths = mask_paths(request.update_mask.paths, _MUTABLE)
        new = request.volume
        record = await self.volumes.update(
            new.id,
            name=new.name if "name" in paths else None,
            metadata=dict(new.metadata) if "metadata" in paths else None,
        )
        return await self._message(record)

    @unary
    async def ResizeVolume(
        self, request: volumes_pb2.ResizeVolumeRequest, context: Context
    ) -> volumes_pb2.Volume:
        """Grow a volume."""
        return await self._message(await self.volumes.resize(request.volume, request.size_bytes))

    @unary
    async def DeleteVolume(
        self, request: volumes_pb2.DeleteVolumeRequest, context: Context
    ) -> volumes_pb2.DeleteVolumeResponse:
        """Remove a volume that nobody has."""
        volume, freed = await self.volumes.delete(request.volume)
        return volumes_pb2.DeleteVolumeResponse(id=volume, freed_bytes=freed)

    @unary
    async def AttachVolume(
        self, request: volumes_pb2.AttachVolumeRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Give a sandbox a volume."""
        guest, _ = await self.guests.find(request.sandbox)
        (wish,) = convert.wishes_from([request.mount])
        work = attaching.attach(self.world, guest, wish)
        return await self._sandbox(await self.world.tasks.see_through(work))

    @unary
    async def DetachVolume(
        self, request: volumes_pb2.DetachVolumeRequest, context: Context
    ) -> records_pb2.Sandbox:
        """Take a volume from a sandbox."""
        guest, _ = await self.guests.find(request.sandbox)
        work = attaching.detach(self.world, guest, request.volume, force=request.force)
        return await self._sandbox(await self.world.tasks.see_through(work))

    @unary
    async def SnapshotVolume(
        self, request: volumes_pb2.SnapshotVolumeRequest, context: Context
    ) -> volumes_pb2.VolumeSnapshot:
        """Capture a volume."""
        key = convert.key_from("SnapshotVolume", request)
        level = convert.level_from(request.level)
        record = await self.volumes.snapshot(request.volume, request.name, level, key)
        return await self._snapshot(record)

    @unary
    async def GetVolumeSnapshot(
        self, request: volumes_pb2.GetVolumeSnapshotRequest, context: Context
    ) -> volumes_pb2.VolumeSnapshot:
        """Return one snapshot."""

        def look(tx: Transaction) -> VolumeSnapshot:
            return volume_snapshots.get(tx, volume_snapshots.resolve(tx, request.volume_snapshot))

        return await self._snapshot(await self.world.read(look))

    @unary
    async def ListVolumeSnapshots(
        self, request: volumes_pb2.ListVolumeSnapshotsRequest, context: Context
    ) -> volumes_pb2.ListVolumeSnapshotsResponse:
        """List snapshots, newest first."""
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> tuple[list[volumes_pb2.VolumeSnapshot], str]:
            of = _also_gone(tx, request.volume) if request.volume else None
            records, token = volume_snapshots.list_page(tx, of, page)
            return _snapshots(tx, self.world, records), token

        found, token = await self.world.read(look)
        return volumes_pb2.ListVolumeSnapshotsResponse(
            volume_snapshots=found, next_page_token=token
        )

    @unary
    async def DeleteVolumeSnapshot(
        self, request: volumes_pb2.DeleteVolumeSnapshotRequest, context: Context
    ) -> volumes_pb2.DeleteVolumeSnapshotResponse:
        """Remove a snapshot."""
        snapshot, freed = await self.volumes.delete_snapshot(request.volume_snapshot)
        return volumes_pb2.DeleteVolumeSnapshotResponse(id=snapshot, freed_bytes=freed)

    async def _message(self, record: Volume) -> volumes_pb2.Volume:
        return (await self.world.read(lambda tx: _volumes(tx, self.world, [record])))[0]

    async def _snapshot(self, record: VolumeSnapshot) -> volumes_pb2.VolumeSnapshot:
        return (await self.world.read(lambda tx: _snapshots(tx, self.world, [record])))[0]

    async def _sandbox(self, record: Sandbox) -> records_pb2.Sandbox:
        found = await self.world.read(lambda tx: messages.of_sandboxes(tx, self.world, [record]))
        return found[0]


def _also_gone(tx: Transaction, reference: str) -> VolumeId:
    """The id of a volume; also of one that is gone and has snapshots.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    """
    try:
        return volumes.resolve(tx, reference)
    except NotFoundError:
        gone = VolumeId(reference)
        if is_id(reference) and volume_snapshots.any_of_volume(tx, gone):
            return gone
        raise


def _volumes(tx: Transaction, world: World, records: Sequence[Volume]) -> list[volumes_pb2.Volume]:
    spaces = space.of_volumes(tx, records, world.taken)
    return [
        volumes_pb2.Volume(
            id=record.id,
            name=record.name,
            state=volumes_pb2.VolumeState.Value(f"VOLUME_STATE_{record.state.upper()}"),
            reason=record.reason,
            size_bytes=record.size,
            source_id=record.source or "",
            metadata=record.metadata,
            attachments=[
                volumes_pb2.VolumeAttachment(
                    sandbox_id=each.sandbox,
                    path=each.path,
                    read_only=each.read_only,
                    state=convert.mount(each).state,
                )
                for each in record.attachments
            ],
            created_at=convert.timestamp(record.created_at),
            updated_at=convert.timestamp(record.updated_at),
            generation=record.generation,
            space=convert.space(takes),
            clean=record.clean,
            workspace=record.workspace,
        )
        for record, takes in zip(records, spaces, strict=True)
    ]


def _snapshots(
    tx: Transaction, world: World, records: Sequence[VolumeSnapshot]
) -> list[volumes_pb2.VolumeSnapshot]:
    spaces = space.of_volume_snapshots(tx, records, world.taken)
    return [
        volumes_pb2.VolumeSnapshot(
            id=record.id,
            name=record.name,
            workspace=record.workspace,
            volume_id=record.volume,
            volume_name=record.volume_name,
            size_bytes=record.size,
            consistency=convert.level(record.consistency),
            created_at=convert.timestamp(record.created_at),
            generation=record.generation,
            space=convert.space(takes),
        )
        for record, takes in zip(records, spaces, strict=True)
    ]
