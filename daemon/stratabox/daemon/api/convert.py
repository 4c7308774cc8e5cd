"""Records to messages, and the parts of messages to arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from stratabox.daemon.lifecycle.common.events import Event, Happening
from stratabox.daemon.lifecycle.common.once import Key
from stratabox.daemon.lifecycle.keeping import Rhythm
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.daemon.rpc.errors import status_of
from stratabox.storage.catalog.space import Space
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError
from stratabox.storage.model.records import (
    Attachment,
    Image,
    Machine,
    Mount,
    Sandbox,
    Schedule,
    Snapshot,
)
from stratabox.storage.model.states import (
    Boot,
    Identity,
    Level,
    SandboxState,
    SnapshotState,
    TimeoutAction,
)
from stratabox.v1 import records_pb2, sandboxes_pb2

_KEY_BYTES = 256
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_LEVELS = {
    Level.CRASH: records_pb2.SNAPSHOT_LEVEL_CRASH,
    Level.APPLICATION: records_pb2.SNAPSHOT_LEVEL_APPLICATION,
    Level.MEMORY: records_pb2.SNAPSHOT_LEVEL_MEMORY,
}
_IDENTITIES = {
    Identity.KEEP: records_pb2.IDENTITY_POLICY_KEEP,
    Identity.RENEW: records_pb2.IDENTITY_POLICY_RENEW,
}
_ON_TIMEOUT = {
    TimeoutAction.TERMINATE: records_pb2.TIMEOUT_ACTION_TERMINATE,
    TimeoutAction.PAUSE: records_pb2.TIMEOUT_ACTION_PAUSE,
    TimeoutAction.SNAPSHOT: records_pb2.TIMEOUT_ACTION_SNAPSHOT,
}
_HAPPENINGS = {
    Happening.PRESENT: records_pb2.EVENT_TYPE_PRESENT,
    Happening.CREATED: records_pb2.EVENT_TYPE_CREATED,
    Happening.UPDATED: records_pb2.EVENT_TYPE_UPDATED,
    Happening.DELETED: records_pb2.EVENT_TYPE_DELETED,
}


def sandbox(
    record: Sandbox, depths: Mapping[int, int], memory_bytes: int, takes: Space
) -> records_pb2.Sandbox:
    """A sandbox's message.

    :param depths: each disk's chain depth by its index.
    :param memory_bytes: what its memory takes while it is paused to disk.
    :param takes: what all of it takes on the disk.
    """
    return records_pb2.Sandbox(
        id=record.id,
        name=record.name,
        state=records_pb2.SandboxState.Value(f"SANDBOX_STATE_{record.state.upper()}"),
        state_reason=record.state_reason,
        ready=record.ready,
        image_id=record.image,
        image_name=record.image_name,
        source_snapshot_id=record.source_snapshot or "",
        cpus=record.cpus,
        memory=record.memory,
        storage=record.storage,
        env=record.env,
        metadata=record.metadata,
        tags=record.tags,
        created_at=timestamp(record.created_at),
        updated_at=timestamp(record.updated_at),
        started_at=timestamp(record.started_at),
        ready_at=timestamp(record.ready_at),
        terminated_at=timestamp(record.terminated_at),
        disks=[
            records_pb2.Disk(
                index=disk.index,
                size_bytes=disk.size,
                serial=disk.serial,
                chain_depth=depths.get(disk.index, 0),
            )
            for disk in record.disks
        ],
        machine=machine(record.machine),
        generation=record.generation,
        paused_to_disk=record.ram_parked is not None,
        memory_bytes=memory_bytes,
        expires_at=timestamp(record.expires_at),
        on_timeout=_ON_TIMEOUT[record.on_timeout],
        space=space(takes),
        keep_last=record.keep_last,
        snapshot_schedule=schedule(record.schedule),
        volumes=[mount(each) for each in record.volumes],
        left_behind=[mount(each) for each in record.left_behind],
    )


def space(takes: Space) -> records_pb2.Space:
    """What a record takes on the disk."""
    return records_pb2.Space(
        logical_bytes=takes.logical, own_bytes=takes.own, shared_bytes=takes.shared
    )


def schedule(record: Schedule | None) -> records_pb2.SnapshotSchedule | None:
    """A schedule's message; None leaves the field unset."""
    if record is None:
        return None
    return records_pb2.SnapshotSchedule(
        every=duration(record.every),
        level=level(record.level),
        next_at=timestamp(record.next_at),
    )


def mount(record: Mount) -> records_pb2.VolumeMount:
    """A volume's place in a sandbox, as a message."""
    return records_pb2.VolumeMount(
        volume=record.volume,
        volume_name=record.volume_name,
        path=record.path,
        read_only=record.read_only,
        state=(
            records_pb2.AttachmentState.Value(f"ATTACHMENT_STATE_{record.state.upper()}")
            if isinstance(record, Attachment)
            else records_pb2.ATTACHMENT_STATE_UNSPECIFIED
        ),
    )


def wishes_from(messages: Iterable[records_pb2.VolumeMount]) -> list[Wish]:
    """The volumes that a sandbox is to have."""
    return [Wish(volume=each.volume, path=each.path, read_only=each.read_only) for each in messages]


def machine(record: Machine) -> records_pb2.Machine:
    """A machine's message."""
    return records_pb2.Machine(
        machine_type=record.machine_type,
        accelerator=record.accelerator,
        cpu_model=record.cpu_model,
        qemu_version=record.qemu_version,
        firmware_sha256=record.firmware_sha256,
        volumes=record.volumes,
    )


def snapshot(record: Snapshot, takes: Space) -> records_pb2.Snapshot:
    """A snapshot's message.

    :param takes: what all of it takes on the disk.
    """
    ram = record.ram
    return records_pb2.Snapshot(
        id=record.id,
        name=record.name,
        state=records_pb2.SnapshotState.Value(f"SNAPSHOT_STATE_{record.state.upper()}"),
        consistency=level(record.consistency),
        requested_level=level(record.requested_level),
        source_sandbox_id=record.source_sandbox,
        source_sandbox_name=record.source_sandbox_name,
        image_id=record.image,
        size_bytes=record.size,
        layer_bytes=record.layer_bytes,
        cpus=record.cpus,
        memory=record.memory,
        storage=record.storage,
        env=record.env,
        metadata=record.metadata,
        created_at=timestamp(record.created_at),
        ready_at=timestamp(record.ready_at),
        expires_at=timestamp(record.expires_at),
        failure_reason=record.failure_reason,
        frozen_filesystems=record.frozen,
        stall=duration(record.stall),
        parent_snapshot_id=record.parent or "",
        generation=record.generation,
        memory_bytes=ram.own_bytes if ram else 0,
        pause_ms=ram.pause / timedelta(milliseconds=1) if ram else 0,
        page_tracking=(
            records_pb2.PageTracking.Value(f"PAGE_TRACKING_{ram.tracking.upper()}")
            if ram
            else records_pb2.PAGE_TRACKING_UNSPECIFIED
        ),
        machine=machine(record.machine),
        space=space(takes),
        volumes=[mount(each) for each in record.volumes],
    )


def image(record: Image, layer_bytes: int, takes: Space) -> records_pb2.Image:
    """An image's message.

    :param layer_bytes: what its disk takes.
    :param takes: the same, and what of it is its own.
    """
    boot = record.kernel_boot
    return records_pb2.Image(
        id=record.id,
        name=record.name,
        state=records_pb2.ImageState.Value(f"IMAGE_STATE_{record.state.upper()}"),
        boot=(
            records_pb2.BOOT_METHOD_KERNEL
            if record.boot is Boot.KERNEL
            else records_pb2.BOOT_METHOD_DISK
        ),
        origin=record.origin,
        size_bytes=record.size,
        layer_bytes=layer_bytes,
        space=space(takes),
        kernel_sha256=boot.kernel if boot else "",
        initrd_sha256=boot.initrd if boot else "",
        kernel_command_line=boot.command_line if boot else "",
        created_at=timestamp(record.created_at),
        generation=record.generation,
        cloud_init=record.cloud_init,
    )


def failure(error: StrataboxError) -> records_pb2.Failure:
    """An error inside a reply."""
    status = status_of(error)
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return records_pb2.Failure(reason=info.reason, message=status.message, metadata=info.metadata)


def happening(event: Event) -> records_pb2.EventType.ValueType:
    """What happened."""
    return _HAPPENINGS[event.happening]


def level(value: Level | None) -> records_pb2.SnapshotLevel.ValueType:
    """A level; unspecified for none."""
    return records_pb2.SNAPSHOT_LEVEL_UNSPECIFIED if value is None else _LEVELS[value]


def level_from(value: records_pb2.SnapshotLevel.ValueType) -> Level | None:
    """A level; None for unspecified. :raise InvalidArgumentError: for one that is not known."""
    if value == records_pb2.SNAPSHOT_LEVEL_UNSPECIFIED:
        return None
    for ours, theirs in _LEVELS.items():
        if theirs == value:
            return ours
    raise InvalidArgumentError(f"there is no snapshot level {value}", field="level")


def identity_from(value: records_pb2.IdentityPolicy.ValueType) -> Identity | None:
    """An identity policy; None for unspecified.

    :raise InvalidArgumentError: for one that is not known.
    """
    if value == records_pb2.IDENTITY_POLICY_UNSPECIFIED:
        return None
    for ours, theirs in _IDENTITIES.items():
        if theirs == value:
            return ours
    raise InvalidArgumentError(f"there is no identity policy {value}", field="identity")


def on_timeout_from(value: records_pb2.TimeoutAction.ValueType) -> TimeoutAction:
    """What is done when the time is up; unspecified: terminate.

    :raise InvalidArgumentError: for one that is not known.
    """
    if value == records_pb2.TIMEOUT_ACTION_UNSPECIFIED:
        return TimeoutAction.TERMINATE
    for ours, theirs in _ON_TIMEOUT.items():
        if theirs == value:
            return ours
    raise InvalidArgumentError(f"there is no action {value} on timeout", field="on_timeout")


def rhythm_from(
    message: records_pb2.Sandbox | sandboxes_pb2.CreateSandboxRequest,
) -> Rhythm | None:
    """How often snapshots are taken by themselves; None where it is not set.

    :raise InvalidArgumentError: for a level that is not known, or a span that is none.
    """
    if not message.HasField("snapshot_schedule"):
        return None
    wanted = message.snapshot_schedule
    every = seconds_from(wanted.every, "snapshot_schedule.every")
    return Rhythm(every=timedelta(seconds=every), level=level_from(wanted.level))


def sandbox_states(values: Iterable[records_pb2.SandboxState.ValueType]) -> list[SandboxState]:
    """States of a filter. :raise InvalidArgumentError: for one that is not known."""
    return [
        SandboxState(_enum_word(records_pb2.SandboxState.Name, value, "SANDBOX_STATE_"))
        for value in values
    ]


def snapshot_states(values: Iterable[records_pb2.SnapshotState.ValueType]) -> list[SnapshotState]:
    """States of a filter; "deleted" fits nothing.

    :raise InvalidArgumentError: for one that is not known.
    """
    words = [_enum_word(records_pb2.SnapshotState.Name, v, "SNAPSHOT_STATE_") for v in values]
    return [SnapshotState(word) for word in words if word != "deleted"]


_Value = TypeVar("_Value", bound=int)


def _enum_word(name_of: object, value: int, prefix: str) -> str:
    try:
        name: str = name_of(value)  # type: ignore[operator]
    except ValueError as error:
        raise InvalidArgumentError(f"there is no state {value}", field="states") from error
    word = name.removeprefix(prefix).lower()
    if word == "unspecified":
        raise InvalidArgumentError("a state to filter by is not set", field="states")
    return word


def resources_from(message: records_pb2.Resources) -> Resources:
    """The size of a guest."""
    return Resources(
        cpus=message.cpus if message.HasField("cpus") else None,
        memory=message.memory if message.HasField("memory") else None,
        storage=message.storage if message.HasField("storage") else None,
    )


def timestamp(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A time; None leaves the field unset."""
    if time is None:
        return None
    # As FromDatetime does, at a fraction of its time: a page of a list has hundreds.
    since = time - _EPOCH
    return timestamp_pb2.Timestamp(
        seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000
    )


def time_from(message: timestamp_pb2.Timestamp, field: str) -> datetime:
    """A time. :raise InvalidArgumentError: when it is outside the calendar."""
    try:
        return message.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"{field} is not a time", field=field) from error


def duration(span: timedelta | None) -> duration_pb2.Duration | None:
    """A span of time; None leaves the field unset."""
    if span is None:
        return None
    message = duration_pb2.Duration()
    message.FromTimedelta(span)
    return message


def seconds_from(message: duration_pb2.Duration, field: str) -> float:
    """A span in seconds. :raise InvalidArgumentError: when it is negative or beyond a year."""
    seconds = message.seconds + message.nanos / 1e9
    if not 0 <= seconds <= 366 * 86400:
        raise InvalidArgumentError(
            f"{field} of {seconds:g} s is not within 0 s - 1 year", field=field
        )
    return seconds


def key_from(method: str, request: Message) -> Key | None:
    """A request's idempotency key, and the hash of all else in it.

    :raise InvalidArgumentError: when the key is too long.
    """
    text: str = request.idempotency_key  # type: ignore[attr-defined]
    if not text:
        return None
    if len(text.encode()) > _KEY_BYTES:
        raise InvalidArgumentError(
            f"idempotency_key is longer than {_KEY_BYTES} bytes", field="idempotency_key"
        )
    bare = type(request)()
    bare.CopyFrom(request)
    bare.ClearField("idempotency_key")
    digest = hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
    return Key(key=text, method=method, request=digest)
