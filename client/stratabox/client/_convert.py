"""Messages to records. Pure; called by the plans of `_sandboxes`, `_snapshots` and `_images`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from stratabox.client import errors, records
from stratabox.v1 import host_pb2, images_pb2, records_pb2, sandboxes_pb2, snapshots_pb2

E = TypeVar("E", bound=StrEnum)

# The proto's names less their prefix are the words of the records' enums.
_PREFIXES: dict[type[StrEnum], tuple[Any, str]] = {
    records.SandboxState: (records_pb2.SandboxState, "SANDBOX_STATE_"),
    records.SnapshotState: (records_pb2.SnapshotState, "SNAPSHOT_STATE_"),
    records.PageTracking: (records_pb2.PageTracking, "PAGE_TRACKING_"),
    records.SnapshotLevel: (records_pb2.SnapshotLevel, "SNAPSHOT_LEVEL_"),
    records.ImageState: (records_pb2.ImageState, "IMAGE_STATE_"),
    records.BootMethod: (records_pb2.BootMethod, "BOOT_METHOD_"),
    records.EventType: (records_pb2.EventType, "EVENT_TYPE_"),
    records.DiskFormat: (images_pb2.DiskFormat, "DISK_FORMAT_"),
}


def word(kind: type[E], number: int) -> E:
    """Turn an enum's number into its word; numbers that are not known here become `unknown`."""
    wire, prefix = _PREFIXES[kind]
    try:
        return kind(wire.Name(number).removeprefix(prefix).lower())
    except ValueError:
        return kind("unknown")


def word_or_none(kind: type[E], number: int) -> E | None:
    """Like `word`, with None for what is not set."""
    return word(kind, number) if number else None


def number(kind: type[StrEnum], value: str) -> Any:
    """Turn a word into its enum's number.

    :raise InvalidArgumentError: when that is no such word.
    """
    wire, prefix = _PREFIXES[kind]
    name = f"{prefix}{str(value).upper()}"
    if name not in wire.keys() or not wire.Value(name):  # noqa: SIM118 (not a mapping)
        words = ", ".join(member for member in kind if member != "unknown")
        raise errors.InvalidArgumentError(f"{str(value)!r} is none of: {words}")
    return wire.Value(name)


def time(message: Message, name: str) -> datetime | None:
    """Read a time stamp, None where it is not set."""
    if not message.HasField(name):
        return None
    stamp: Timestamp = getattr(message, name)
    return stamp.ToDatetime(UTC)


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(UTC)


def _delta(span: Duration) -> timedelta:
    return span.ToTimedelta()


def sandbox_fields(message: records_pb2.Sandbox) -> dict[str, Any]:
    """Read all fields of a `SandboxRecord`."""
    return {
        "id": message.id,
        "name": message.name,
        "state": word(records.SandboxState, message.state),
        "state_reason": message.state_reason or None,
        "ready": message.ready,
        "image_id": message.image_id or None,
        "image_name": message.image_name or None,
        "source_snapshot_id": message.source_snapshot_id or None,
        "cpus": message.cpus,
        "memory": message.memory,
        "storage": message.storage,
        "env": dict(message.env),
        "metadata": dict(message.metadata),
        "tags": tuple(message.tags),
        "created_at": _time(message.created_at),
        "updated_at": _time(message.updated_at),
        "started_at": time(message, "started_at"),
        "ready_at": time(message, "ready_at"),
        "terminated_at": time(message, "terminated_at"),
        "disks": tuple(
            records.Disk(
                index=disk.index,
                size_bytes=disk.size_bytes,
                serial=disk.serial,
                chain_depth=disk.chain_depth,
            )
            for disk in message.disks
        ),
        "machine": _machine(message.machine) if message.HasField("machine") else None,
        "generation": message.generation,
    }


def _machine(message: records_pb2.Machine) -> records.Machine:
    return records.Machine(
        machine_type=message.machine_type,
        accelerator=message.accelerator,
        cpu_model=message.cpu_model,
        qemu_version=message.qemu_version,
        firmware_sha256=message.firmware_sha256,
    )


def snapshot(message: records_pb2.Snapshot) -> records.Snapshot:
    """Turn the message into the record."""
    return records.Snapshot(
        id=message.id,
        name=message.name,
        state=word(records.SnapshotState, message.state),
        consistency=word_or_none(records.SnapshotLevel, message.consistency),
        requested_level=word_or_none(records.SnapshotLevel, message.requested_level),
        source_sandbox_id=message.source_sandbox_id or None,
        source_sandbox_name=message.source_sandbox_name or None,
        image_id=message.image_id or None,
        parent_snapshot_id=message.parent_snapshot_id or None,
        size_bytes=message.size_bytes,
        layer_bytes=message.layer_bytes,
        cpus=message.cpus,
        memory=message.memory,
        storage=message.storage,
        env=dict(message.env),
        metadata=dict(message.metadata),
        created_at=_time(message.created_at),
        ready_at=time(message, "ready_at"),
        expires_at=time(message, "expires_at"),
        failure_reason=message.failure_reason or None,
        frozen_filesystems=message.frozen_filesystems,
        stall=_delta(message.stall) if message.HasField("stall") else None,
        memory_bytes=message.memory_bytes,
        pause_ms=message.pause_ms or None,
        page_tracking=word_or_none(records.PageTracking, message.page_tracking),
        generation=message.generation,
    )


def image(message: records_pb2.Image) -> records.Image:
    """Turn the message into the record."""
    return records.Image(
        id=message.id,
        name=message.name,
        state=word(records.ImageState, message.state),
        boot=word(records.BootMethod, message.boot),
        origin=message.origin,
        size_bytes=message.size_bytes,
        layer_bytes=message.layer_bytes,
        kernel_sha256=message.kernel_sha256 or None,
        initrd_sha256=message.initrd_sha256 or None,
        kernel_command_line=message.kernel_command_line or None,
        created_at=_time(message.created_at),
        generation=message.generation,
    )


def execute_result(message: sandboxes_pb2.ExecuteCommandResponse) -> records.ExecuteResult:
    """Turn the message into the record."""
    return records.ExecuteResult(
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal if message.HasField("signal") else None,
        stdout=message.stdout,
        stderr=message.stderr,
        stdout_truncated=message.stdout_truncated,
        stderr_truncated=message.stderr_truncated,
        timed_out=message.timed_out,
        duration=_delta(message.duration),
    )


def failure(message: records_pb2.Failure) -> errors.StrataboxError:
    """Turn an error inside a reply into the exception that it would have been."""
    return errors.from_reason(message.reason, message.message, dict(message.metadata))


def snapshot_deletion(message: snapshots_pb2.DeleteSnapshotResponse) -> records.SnapshotDeletion:
    """Turn the message into the record."""
    return records.SnapshotDeletion(
        id=message.id,
        freed_bytes=message.freed_bytes,
        kept_bytes=message.kept_bytes,
        kept_for=tuple(message.kept_for),
    )


def image_deletion(message: images_pb2.DeleteImageResponse) -> records.ImageDeletion:
    """Turn the message into the record."""
    return records.ImageDeletion(id=message.id, freed_bytes=message.freed_bytes)


def sandbox_event(message: sandboxes_pb2.SandboxEvent) -> records.SandboxEvent:
    """Turn the message into the record."""
    return records.SandboxEvent(
        type=word(records.EventType, message.type),
        sandbox=records.SandboxRecord(**sandbox_fields(message.sandbox)),
        time=_time(message.time),
    )


def snapshot_event(message: snapshots_pb2.SnapshotEvent) -> records.SnapshotEvent:
    """Turn the message into the record."""
    return records.SnapshotEvent(
        type=word(records.EventType, message.type),
        snapshot=snapshot(message.snapshot),
        time=_time(message.time),
        freed_bytes=message.freed_bytes,
    )


def build_progress(message: images_pb2.BuildProgress) -> records.BuildProgress:
    """Turn the message into the record."""
    return records.BuildProgress(
        step=message.step,
        fraction=message.fraction if message.HasField("fraction") else None,
    )


def host(message: host_pb2.Host) -> records.Host:
    """Turn the message into the record."""
    return records.Host(
        version=message.version,
        state_dir=message.state_dir,
        launcher=message.launcher,
        accelerator=message.accelerator,
        accelerator_reason=message.accelerator_reason,
        qemu_version=message.qemu_version,
        settings=tuple(
            records.Setting(key=one.key, value=one.value, source=one.source)
            for one in message.settings
        ),
        pid=message.pid,
    )
