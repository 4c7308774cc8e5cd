"""Volumes, and who has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.lifecycle.volumes import attaching
from stratabox.daemon.lifecycle.volumes.volumes import NewVolume
from stratabox.daemon.tenki import convert, finding, reading
from stratabox.daemon.tenki.errors import unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import lookup, tenki_lists, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.keyset import By
from stratabox.storage.catalog.tenki_tags import OF_VOLUMES
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.records import GIB, MIB, Volume
from stratabox.storage.model.states import SandboxState
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

SMALLEST, LARGEST = MIB, 100 * GIB

_Sort = records_pb2.VolumeSortField


@dataclass(frozen=True, kw_only=True)
class VolumeCalls:
    """Message in, one call, message out."""

    parts: Parts
    accounts: Accounts

    @unary
    async def CreateVolume(
        self, request: sandbox_pb2.CreateVolumeRequest, context: Context
    ) -> sandbox_pb2.CreateVolumeResponse:
        """Make an empty volume; it is there when this answers."""
        reading.require_workspace(request.workspace_id)
        size = _size(request.size_bytes, "size_bytes")
        record = await self.parts.volumes.create(
            NewVolume(name=reading.name(request.name), size=size)
        )
        return sandbox_pb2.CreateVolumeResponse(volume=await self._message(record))

    @unary
    async def GetVolume(
        self, request: sandbox_pb2.GetVolumeRequest, context: Context
    ) -> sandbox_pb2.GetVolumeResponse:
        """Return one volume, with who has it."""
        record = await finding.volume(self.parts, request.volume_id)
        return sandbox_pb2.GetVolumeResponse(
            volume=await self._message(record),
            active_attachments=[convert.attachment(each) for each in record.attachments],
        )

    @unary
    async def ListVolumes(
        self, request: sandbox_pb2.ListVolumesRequest, context: Context
    ) -> sandbox_pb2.ListVolumesResponse:
        """List volumes, newest first where nothing else is asked for."""
        reading.require_workspace(request.workspace_id)
        wanted = tenki_lists.VolumeFilter(
            states=[_state(each) for each in dict.fromkeys(request.states)], search=request.search
        )
        page = lookup.Page(size=request.page_size, token=request.page_token)
        order = _order(request)

        def look(tx: Transaction) -> sandbox_pb2.ListVolumesResponse:
            records, token = tenki_lists.volumes_page(tx, wanted, page, order)
            response = sandbox_pb2.ListVolumesResponse(
                volumes=_messages(tx, records), next_page_token=token
            )
            if request.include_facets:
                response.facets.CopyFrom(_facets(tenki_lists.volume_states(tx, wanted)))
            return response

        return await self.parts.world.read(look)

    @unary
    async def UpdateVolume(
        self, request: sandbox_pb2.UpdateVolumeRequest, context: Context
    ) -> sandbox_pb2.UpdateVolumeResponse:
        """Change a volume's name or tags."""
        parts = self.parts
        record = await finding.volume(parts, request.volume_id)
        tags = reading.tags(request.tags)
        if request.HasField("name"):
            record = await parts.volumes.update(
                record.id, name=reading.name(request.name), metadata=None
            )
        if tags or request.clear_tags:

            def write(tx: Transaction) -> Volume:
                OF_VOLUMES.put(tx, record.id, () if request.clear_tags else tags)
                return volumes.change(tx, record.id)

            record = await parts.world.write(write)
        return sandbox_pb2.UpdateVolumeResponse(volume=await self._message(record))

    @unary
    async def ResizeVolume(
        self, request: sandbox_pb2.ResizeVolumeRequest, context: Context
    ) -> sandbox_pb2.ResizeVolumeResponse:
        """Grow a volume, and its file system where a guest has it."""
        size = _size(request.new_size_bytes, "new_size_bytes")
        record = await finding.volume(self.parts, request.volume_id)
        grown = await self.parts.volumes.resize(record.id, size)
        return sandbox_pb2.ResizeVolumeResponse(volume=await self._message(grown))

    @unary
    async def DeleteVolume(
        self, request: sandbox_pb2.DeleteVolumeRequest, context: Context
    ) -> sandbox_pb2.DeleteVolumeResponse:
        """Remove a volume that nobody has."""
        record = await finding.volume(self.parts, request.volume_id)
        await self.parts.volumes.delete(record.id)
        return sandbox_pb2.DeleteVolumeResponse()

    @unary
    async def AttachVolume(
        self, request: sandbox_pb2.AttachVolumeRequest, context: Context
    ) -> sandbox_pb2.AttachVolumeResponse:
        """Give a session a volume; in one that runs it is mounted when this answers.

        Its top is then the sessions' user's, unless it is somebody's other than root's.
        """
        parts = self.parts
        guest, _ = await finding.living(parts, request.session_id)
        volume = await finding.volume(parts, request.volume.volume_id)
        (wish,) = reading.wishes([request.volume])
        session = await parts.world.tasks.see_through(attaching.attach(parts.world, guest, wish))
        attachment = next(each for each in session.volumes if each.volume == volume.id)
        if session.state is SandboxState.RUNNING and not attachment.read_only:
            await self.accounts.give(session.id, [attachment.path])
        return sandbox_pb2.AttachVolumeResponse(attachment=convert.attachment(attachment))

    @unary
    async def DetachVolume(
        self, request: sandbox_pb2.DetachVolumeRequest, context: Context
    ) -> sandbox_pb2.DetachVolumeResponse:
        """Take a volume from a session; it is gone from there when this answers."""
        parts = self.parts
        guest, _ = await finding.living(parts, request.session_id)
        volume = await finding.volume(parts, request.volume_id)
        work = attaching.detach(parts.world, guest, volume.id, force=request.force_detach)
        await parts.world.tasks.see_through(work)
        return sandbox_pb2.DetachVolumeResponse()

    async def _message(self, record: Volume) -> records_pb2.Volume:
        return (await self.parts.world.read(lambda tx: _messages(tx, [record])))[0]


def _messages(tx: Transaction, records: Sequence[Volume]) -> list[records_pb2.Volume]:
    tags = OF_VOLUMES.of_all(tx, [record.id for record in records])
    return [convert.volume(record, tags[record.id]) for record in records]


def _size(size: int, field: str) -> int:
    """A volume's size, as whole MiB. :raise InvalidArgumentError: INVALID_RESOURCES."""
    if not SMALLEST <= size <= LARGEST:
        raise InvalidArgumentError(
            f"{field} {size} is not within {SMALLEST}-{LARGEST} bytes",
            reason="INVALID_RESOURCES",
            field=field,
        )
    return -(-size // MIB) * MIB


def _state(value: records_pb2.VolumeState.ValueType) -> str:
    name = reading.enum_name(records_pb2.VolumeState, value, "states")
    return name.removeprefix("VOLUME_STATE_")


def _order(request: sandbox_pb2.ListVolumesRequest) -> Sequence[By]:
    if request.sort_by:
        name = reading.enum_name(_Sort, request.sort_by, "sort_by")
        expression = tenki_lists.VOLUMES_BY[name.removeprefix("VOLUME_SORT_FIELD_")]
        return (By(expression, descending=request.sort_desc),)
    return (By(tenki_lists.VOLUMES_BY["CREATED_AT"], descending=True),)


def _facets(found: dict[str, int]) -> records_pb2.VolumeListFacets:
    return records_pb2.VolumeListFacets(
        total=sum(found.values()),
        state_counts=[
            records_pb2.VolumeStateCount(
                state=records_pb2.VolumeState.Value(f"VOLUME_STATE_{name}"), count=count
            )
            for name, count in sorted(found.items())
        ],
    )
