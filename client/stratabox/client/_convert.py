"""Messages to records. Pure; called by the plans of `_sandboxes`, `_snapshots` and `_images`."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from stratabox.client import (
    archives,
    background,
    errors,
    event_records,
    file_records,
    host_records,
    port_records,
    probe_records,
    records,
    volume_records,
)
from stratabox.client.network_records import Network, NetworkMode
from stratabox.v1 import (
    events_pb2,
    files_pb2,
    host_pb2,
    images_pb2,
    jobs_pb2,
    network_pb2,
    ports_pb2,
    records_pb2,
    sandboxes_pb2,
    snapshots_pb2,
    transfers_pb2,
    volumes_pb2,
)

E = TypeVar("E", bound=StrEnum)

# The proto's names less their prefix are the words of the records' enums.
_PREFIXES: dict[type[StrEnum], tuple[Any, str]] = {
    records.SandboxState: (records_pb2.SandboxState, "SANDBOX_STATE_"),
    records.TimeoutAction: (records_pb2.TimeoutAction, "TIMEOUT_ACTION_"),
    records.AttachmentState: (records_pb2.AttachmentState, "ATTACHMENT_STATE_"),
    volume_records.VolumeState: (volumes_pb2.VolumeState, "VOLUME_STATE_"),
    records.SnapshotState: (records_pb2.SnapshotState, "SNAPSHOT_STATE_"),
    records.PageTracking: (records_pb2.PageTracking, "PAGE_TRACKING_"),
    records.SnapshotLevel: (records_pb2.SnapshotLevel, "SNAPSHOT_LEVEL_"),
    records.Identity: (records_pb2.IdentityPolicy, "IDENTITY_POLICY_"),
    records.ImageState: (records_pb2.ImageState, "IMAGE_STATE_"),
    background.JobKind: (jobs_pb2.JobKind, "JOB_KIND_"),
    background.JobState: (jobs_pb2.JobState, "JOB_STATE_"),
    records.BootMethod: (records_pb2.BootMethod, "BOOT_METHOD_"),
    records.EventType: (records_pb2.EventType, "EVENT_TYPE_"),
    event_records.Subject: (events_pb2.Subject, "SUBJECT_"),
    records.DiskFormat: (images_pb2.DiskFormat, "DISK_FORMAT_"),
    file_records.FileKind: (files_pb2.FileKind, "FILE_KIND_"),
    file_records.WriteMode: (files_pb2.WriteMode, "WRITE_MODE_"),
    file_records.WatchMethod: (files_pb2.WatchMethod, "WATCH_METHOD_"),
    file_records.FileChangeType: (files_pb2.FileChangeType, "FILE_CHANGE_TYPE_"),
    NetworkMode: (network_pb2.NetworkMode, "NETWORK_MODE_"),
    port_records.PortDirection: (ports_pb2.PortDirection, "PORT_DIRECTION_"),
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


def moment(stamp: Timestamp) -> datetime:
    """Read a time stamp that is always set."""
    return _time(stamp)


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
        "paused_to_disk": message.paused_to_disk,
        "memory_bytes": message.memory_bytes,
        "expires_at": time(message, "expires_at"),
        "on_timeout": word(records.TimeoutAction, message.on_timeout or 1),
        "space": space(message.space),
        "keep_last": message.keep_last,
        "snapshot_schedule": (
            _schedule(message.snapshot_schedule) if message.HasField("snapshot_schedule") else None
        ),
        "volumes": tuple(mount(each) for each in message.volumes),
        "left_behind": tuple(mount(each) for each in message.left_behind),
        "readiness_probe": probe_of(message),
        "network": network_of(message) or Network(mode=NetworkMode.NONE),
    }


def network_of(found: records_pb2.Sandbox | records_pb2.Snapshot) -> Network | None:
    """Read a record's network policy; none when it has none."""
    if not found.HasField("network"):
        return None
    mode = word(NetworkMode, found.network.mode)
    return Network(mode=mode, allow=tuple(found.network.allow))


def probe_of(
    found: records_pb2.Sandbox | records_pb2.Snapshot,
) -> probe_records.ReadinessProbe | None:
    """Read a record's probe; none when it has none."""
    if not found.HasField("readiness_probe"):
        return None
    read = found.readiness_probe
    command: str | tuple[str, ...] | None = None
    port, path = None, None
    match read.WhichOneof("check"):
        case "command":
            command = read.command.shell or tuple(read.command.argv)
        case "port":
            port = read.port
        case "http":
            port, path = read.http.port, read.http.path
    return probe_records.ReadinessProbe(
        command=command,
        port=port,
        path=path,
        interval=_delta(read.interval),
        timeout=_delta(read.timeout),
        start_period=(_delta(read.start_period) if read.HasField("start_period") else None),
    )


def space(message: records_pb2.Space) -> records.Space:
    """Turn the message into the record."""
    return records.Space(
        logical_bytes=message.logical_bytes,
        own_bytes=message.own_bytes,
        shared_bytes=message.shared_bytes,
    )


def mount(message: records_pb2.VolumeMount) -> records.VolumeMount:
    """Turn the message into the record."""
    return records.VolumeMount(
        volume=message.volume,
        volume_name=message.volume_name or None,
        path=message.path,
        read_only=message.read_only,
        state=word_or_none(records.AttachmentState, message.state),
    )


def _schedule(message: records_pb2.SnapshotSchedule) -> records.SnapshotSchedule:
    return records.SnapshotSchedule(
        every=_delta(message.every),
        level=word_or_none(records.SnapshotLevel, message.level),
        next_at=time(message, "next_at"),
    )


def _machine(message: records_pb2.Machine) -> records.Machine:
    return records.Machine(
        machine_type=message.machine_type,
        accelerator=message.accelerator,
        cpu_model=message.cpu_model,
        qemu_version=message.qemu_version,
        firmware_sha256=message.firmware_sha256,
        volumes=message.volumes,
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
        machine=_machine(message.machine) if message.HasField("machine") else None,
        generation=message.generation,
        space=space(message.space),
        compressed_bytes=message.compressed_bytes,
        volumes=tuple(mount(each) for each in message.volumes),
        readiness_probe=probe_of(message),
        network=network_of(message),
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
        space=space(message.space),
        cloud_init=message.cloud_init,
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
        out_of_memory=message.out_of_memory,
        disk_full=message.disk_full,
    )


def failure(message: records_pb2.Failure) -> errors.StrataboxError:
    """Turn an error inside a reply into the exception that it would have been."""
    return errors.from_reason(message.reason, message.message, dict(message.metadata))


def snapshot_import(message: transfers_pb2.ImportSnapshotResponse) -> archives.ImportResult:
    """Turn the message into the record."""
    return archives.ImportResult(
        snapshot=snapshot(message.snapshot),
        left_out=failure(message.left_out) if message.HasField("left_out") else None,
    )


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


def host(message: host_pb2.Host) -> host_records.Host:
    """Turn the message into the record."""
    return host_records.Host(
        version=message.version,
        state_dir=message.state_dir,
        launcher=message.launcher,
        accelerator=message.accelerator,
        accelerator_reason=message.accelerator_reason,
        qemu_version=message.qemu_version,
        settings=tuple(
            host_records.Setting(key=one.key, value=one.value, source=one.source)
            for one in message.settings
        ),
        pid=message.pid,
        warm_spares=message.warm_spares,
        memory_in_use=message.memory_in_use,
        account=_account(message.account),
        limits_by=message.limits_by,
        limits=tuple(message.limits),
        limits_reason=message.limits_reason,
    )


def _account(message: host_pb2.HostAccount) -> host_records.HostAccount:
    names = (each.name for each in fields(host_records.HostAccount))
    return host_records.HostAccount(**{name: getattr(message, name) for name in names})


def disk_usage(message: host_pb2.DiskUsage) -> host_records.DiskUsage:
    """Turn the message into the record."""
    return host_records.DiskUsage(
        parts=tuple(
            host_records.DiskUsagePart(name=one.name, bytes=one.bytes, files=one.files)
            for one in message.parts
        ),
        total_bytes=message.total_bytes,
        budget_used_bytes=message.budget_used_bytes,
        budget_bytes=message.budget_bytes,
        filesystem_bytes=message.filesystem_bytes,
        filesystem_free_bytes=message.filesystem_free_bytes,
        high_water_percent=message.high_water_percent,
    )


def checked(message: host_pb2.CheckStoreResponse) -> records.Checked:
    """Convert what a check has found."""
    return records.Checked(
        findings=tuple(
            records.Finding(
                reason=one.reason,
                kind=one.kind,
                subject=one.subject,
                message=one.message,
                cure=one.cure,
                repaired=one.repaired,
            )
            for one in message.findings
        ),
        files=message.files,
        bytes=message.bytes,
        quarantined_files=message.quarantined_files,
        quarantined_bytes=message.quarantined_bytes,
    )
