"""The plans of `client.volumes`, and of a sandbox's own volumes."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from google.protobuf.field_mask_pb2 import FieldMask

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Plan, Script, Steps
from stratabox.client.records import AttachmentState, Page, SnapshotLevel
from stratabox.client.volume_records import (
    Volume,
    VolumeAttachment,
    VolumeDeletion,
    VolumeSnapshot,
    VolumeState,
)
from stratabox.v1 import volumes_pb2 as pb

SERVICE = "volumes"


class VolumePlans:
    """Making, keeping, growing and capturing volumes: disks that outlive sandboxes.

    `Sandbox.attach_volume` and `detach_volume` give them to sandboxes and take them back. What is
    said of names, units and errors at `client.sandboxes` holds here too; names are unique.
    """

    def create(
        self,
        name: str | None = None,
        *,
        size_bytes: int = 0,
        from_volume: str | None = None,
        from_snapshot: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[Volume]:
        """Make a volume with an empty ext4 file system, or a copy of another one.

        :param name: None: made up.
        :param size_bytes: 1 MiB to 16 TiB in whole MiB. A copy: as large as its source, where 0.
        :param from_volume: A copy of it as it is now, also while it is written.
        :param from_snapshot: A copy of what that snapshot of a volume holds.
        :param idempotency_key: The same key within 24 hours returns the same volume.
        :raise VolumeAlreadyExistsError: when the name is taken.
        :raise InvalidResourcesError: when the size cannot be.
        :raise NoSpaceError: when the host has no room, or its budget none.
        """
        with _requests.checked():
            request = pb.CreateVolumeRequest(
                name=name or "",
                size_bytes=size_bytes,
                metadata=metadata or {},
                idempotency_key=idempotency_key or "",
            )
            if from_volume:
                request.volume = from_volume
            if from_snapshot:
                request.volume_snapshot = from_snapshot
        return Call(SERVICE, "CreateVolume", request, _volume)

    def get(self, volume: str) -> Plan[Volume]:
        """Return one volume as it is now."""
        with _requests.checked():
            request = pb.GetVolumeRequest(volume=volume)
        return Call(SERVICE, "GetVolume", request, _volume)

    def list_page(
        self,
        *,
        page_size: int | None = None,
        page_token: str | None = None,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan[Page[Volume]]:
        """Return one page of the list, newest first.

        :param page_size: At most so many, 1-1000; None: 100.
        :param page_token: `next_page_token` of the page before, with the same filters.
        :raise InvalidArgumentError: when the token cannot be right.
        """
        with _requests.checked():
            request = pb.ListVolumesRequest(
                page_size=page_size or 0,
                page_token=page_token or "",
                name=name or "",
                metadata=metadata or {},
            )
        return Call(SERVICE, "ListVolumes", request, _volume_page)

    def list(
        self, *, name: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Plan[builtins.list[Volume]]:
        """Return all volumes that fit every filter, newest first.

        :param name: With exactly this name.
        :param metadata: With all of these entries.
        """

        def steps() -> Steps[builtins.list[Volume]]:
            found: builtins.list[Volume] = []
            token: str | None = None
            while True:
                page: Page[Volume] = yield self.list_page(
                    page_size=1000, page_token=token, name=name, metadata=metadata
                )
                found += page.items
                token = page.next_page_token
                if token is None:
                    return found

        return Script(steps())

    def update(
        self,
        volume: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan[Volume]:
        """Replace what is given, whole; leave what is None.

        :raise VolumeAlreadyExistsError: when the name is taken.
        """
        given = {"name": name, "metadata": metadata}
        with _requests.checked():
            request = pb.UpdateVolumeRequest(
                volume=pb.Volume(id=volume, name=name or "", metadata=metadata or {}),
                update_mask=FieldMask(paths=[key for key in given if given[key] is not None]),
            )
        return Call(SERVICE, "UpdateVolume", request, _volume)

    def resize(self, volume: str, size_bytes: int) -> Plan[Volume]:
        """Grow a volume, also while a guest writes it: its file system grows with it then.

        Otherwise the file system grows when the volume is next mounted to write.

        :raise InvalidResourcesError: when it would become smaller, or too large.
        :raise VolumeInUseError: when sandboxes have it to read.
        :raise InvalidStateError: when the sandbox that has it is paused.
        :raise VolumeGrowFailedError: when the disk has grown and the guest's file system has not.
        """
        with _requests.checked():
            request = pb.ResizeVolumeRequest(volume=volume, size_bytes=size_bytes)
        return Call(SERVICE, "ResizeVolume", request, _volume)

    def delete(self, volume: str) -> Plan[VolumeDeletion]:
        """Remove a volume that no sandbox has; its snapshots and copies stay.

        :raise VolumeInUseError: when a sandbox has it; the message names it.
        """
        with _requests.checked():
            request = pb.DeleteVolumeRequest(volume=volume)
        return Call(SERVICE, "DeleteVolume", request, _deletion)

    def snapshot(
        self,
        volume: str,
        *,
        name: str | None = None,
        level: SnapshotLevel | str | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[VolumeSnapshot]:
        """Capture a volume, also while a guest writes it.

        :param level: "crash" or "application": that one or nothing. None: application where it can
            be had.
        :raise InvalidStateError: when that level cannot be had.
        :raise NoSpaceError: when the host has no room, or its budget none.
        """
        with _requests.checked():
            request = pb.SnapshotVolumeRequest(
                volume=volume,
                name=name or "",
                level=_requests.level(level, None),
                idempotency_key=idempotency_key or "",
            )
        return Call(SERVICE, "SnapshotVolume", request, _snapshot)

    def get_snapshot(self, volume_snapshot: str) -> Plan[VolumeSnapshot]:
        """Return one snapshot of a volume."""
        with _requests.checked():
            request = pb.GetVolumeSnapshotRequest(volume_snapshot=volume_snapshot)
        return Call(SERVICE, "GetVolumeSnapshot", request, _snapshot)

    def list_snapshots_page(
        self,
        *,
        page_size: int | None = None,
        page_token: str | None = None,
        volume: str | None = None,
    ) -> Plan[Page[VolumeSnapshot]]:
        """Return one page of the snapshots of volumes, newest first.

        :param page_size: At most so many, 1-1000; None: 100.
        :param page_token: `next_page_token` of the page before, with the same filter.
        :param volume: Only of this one; by id also of one that is gone.
        :raise InvalidArgumentError: when the token cannot be right.
        """
        with _requests.checked():
            request = pb.ListVolumeSnapshotsRequest(
                page_size=page_size or 0, page_token=page_token or "", volume=volume or ""
            )
        return Call(SERVICE, "ListVolumeSnapshots", request, _snapshot_page)

    def list_snapshots(self, *, volume: str | None = None) -> Plan[builtins.list[VolumeSnapshot]]:
        """Return all snapshots of volumes, newest first.

        :param volume: Only of this one; by id also of one that is gone.
        """

        def steps() -> Steps[builtins.list[VolumeSnapshot]]:
            found: builtins.list[VolumeSnapshot] = []
            token: str | None = None
            while True:
                page: Page[VolumeSnapshot] = yield self.list_snapshots_page(
                    page_size=1000, page_token=token, volume=volume
                )
                found += page.items
                token = page.next_page_token
                if token is None:
                    return found

        return Script(steps())

    def delete_snapshot(self, volume_snapshot: str) -> Plan[VolumeDeletion]:
        """Remove a snapshot of a volume; what was made from it goes on working."""
        with _requests.checked():
            request = pb.DeleteVolumeSnapshotRequest(volume_snapshot=volume_snapshot)
        return Call(SERVICE, "DeleteVolumeSnapshot", request, _deletion)


def _volume(message: pb.Volume) -> Volume:
    return Volume(
        id=message.id,
        name=message.name,
        state=_convert.word(VolumeState, message.state),
        reason=message.reason or None,
        size_bytes=message.size_bytes,
        source_id=message.source_id or None,
        metadata=dict(message.metadata),
        attachments=tuple(
            VolumeAttachment(
                sandbox_id=each.sandbox_id,
                path=each.path,
                read_only=each.read_only,
                state=_convert.word(AttachmentState, each.state),
            )
            for each in message.attachments
        ),
        created_at=_convert.moment(message.created_at),
        updated_at=_convert.moment(message.updated_at),
        generation=message.generation,
        space=_convert.space(message.space),
        clean=message.clean,
    )


def _volume_page(message: pb.ListVolumesResponse) -> Page[Volume]:
    items = tuple(_volume(one) for one in message.volumes)
    return Page(items=items, next_page_token=message.next_page_token or None)


def _snapshot(message: pb.VolumeSnapshot) -> VolumeSnapshot:
    return VolumeSnapshot(
        id=message.id,
        name=message.name,
        volume_id=message.volume_id,
        volume_name=message.volume_name,
        size_bytes=message.size_bytes,
        consistency=_convert.word(SnapshotLevel, message.consistency),
        created_at=_convert.moment(message.created_at),
        generation=message.generation,
        space=_convert.space(message.space),
    )


def _snapshot_page(message: pb.ListVolumeSnapshotsResponse) -> Page[VolumeSnapshot]:
    items = tuple(_snapshot(one) for one in message.volume_snapshots)
    return Page(items=items, next_page_token=message.next_page_token or None)


def _deletion(
    message: pb.DeleteVolumeResponse | pb.DeleteVolumeSnapshotResponse,
) -> VolumeDeletion:
    return VolumeDeletion(id=message.id, freed_bytes=message.freed_bytes)
