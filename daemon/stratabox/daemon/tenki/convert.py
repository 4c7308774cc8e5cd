"""Records to Tenki's messages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf import duration_pb2, timestamp_pb2

from stratabox.storage.catalog.tenki_sessions import Session
from stratabox.storage.model.network import Network, NetworkMode
from stratabox.storage.model.records import Attachment, Sandbox, Snapshot, Volume
from stratabox.storage.model.states import AttachmentState, SandboxState, SnapshotState, VolumeState
from stratabox.tenki.v1 import records_pb2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_STATES = {
    SandboxState.CREATING: records_pb2.SESSION_STATE_CREATING,
    SandboxState.RUNNING: records_pb2.SESSION_STATE_RUNNING,
    SandboxState.PAUSED: records_pb2.SESSION_STATE_PAUSED,
    SandboxState.STOPPED: records_pb2.SESSION_STATE_USER_SHUTDOWN,
    SandboxState.TERMINATING: records_pb2.SESSION_STATE_TERMINATING,
    SandboxState.TERMINATED: records_pb2.SESSION_STATE_TERMINATED,
    # Tenki has no word for it. It says why in `terminal_error`, and can be terminated.
    SandboxState.FAILED: records_pb2.SESSION_STATE_TERMINATED,
}

_SNAPSHOTS = {
    SnapshotState.CREATING: records_pb2.SNAPSHOT_STATE_CREATING,
    SnapshotState.READY: records_pb2.SNAPSHOT_STATE_READY,
    SnapshotState.FAILED: records_pb2.SNAPSHOT_STATE_FAILED,
    SnapshotState.DELETING: records_pb2.SNAPSHOT_STATE_DELETING,
}

_VOLUMES = {
    VolumeState.CREATING: records_pb2.VOLUME_STATE_UNSPECIFIED,
    VolumeState.READY: records_pb2.VOLUME_STATE_AVAILABLE,
    VolumeState.DELETING: records_pb2.VOLUME_STATE_DELETING,
}

_ATTACHMENTS = {
    AttachmentState.ATTACHING: "ATTACHING",
    AttachmentState.ATTACHED: "ATTACHED",
    AttachmentState.DETACHING: "DETACHING",
}


def state(
    record: Sandbox, known: Session, *, pausing: bool = False
) -> records_pb2.SessionState.ValueType:
    """The state of a session.

    :param pausing: somebody has asked for its pause, and has not got it yet.
    """
    if record.state is SandboxState.RUNNING:
        if pausing:
            return records_pb2.SESSION_STATE_PAUSING
        if not record.answers and record.ready_at is None:
            if known.paused_at is not None:
                return records_pb2.SESSION_STATE_RESUMING
            return records_pb2.SESSION_STATE_CREATING
    return _STATES[record.state]


def state_name(record: Sandbox) -> str:
    """Tenki's name of a sandbox's state, as "PAUSED"."""
    return records_pb2.SessionState.Name(_STATES[record.state]).removeprefix("SESSION_STATE_")


def session(
    record: Sandbox,
    known: Session,
    *,
    pausing: bool,
    snapshots: int,
    snapshot_bytes: int,
) -> records_pb2.SandboxSession:
    """A session.

    :param pausing: as of `state`.
    :param snapshots: how many there are of it, and what they take on the disk.
    """
    failed = record.state is SandboxState.FAILED
    message = records_pb2.SandboxSession(
        id=record.id,
        state=state(record, known, pausing=pausing),
        owner_type="SERVICE",
        owner_id=known.owner,
        created_at=timestamp(record.created_at),
        ready_at=timestamp(record.ready_at),
        terminated_at=timestamp(record.terminated_at),
        timeout_at=timestamp(timeout_at(record, known)),
        inbound_enabled=known.inbound,
        outbound_enabled=record.network.mode is NetworkMode.EGRESS,
        cpu_cores=record.cpus,
        memory_mb=record.memory,
        disk_size_gb=record.storage,
        metadata=record.metadata,
        workspace_id=record.workspace,
        name=record.name,
        volume_attachments=[attachment(each) for each in record.volumes],
        tags=record.tags,
        sticky=known.sticky,
        last_resume_error=known.last_resume_error,
        terminal_error=record.state_reason if failed else "",
        egress=egress(record.network),
        snapshot_count=snapshots,
        snapshot_storage_bytes=snapshot_bytes,
    )
    if record.source_snapshot is not None:
        message.snapshot_id = message.source_snapshot_id = record.source_snapshot
    if known.pause_retention is not None:
        message.pause_retention.FromTimedelta(known.pause_retention)
    if record.state is SandboxState.PAUSED:
        message.paused_at.CopyFrom(moment(known.paused_at or record.updated_at))
        if is_kept(record, known) and record.expires_at is not None:
            message.pause_expires_at.CopyFrom(moment(record.expires_at))
    return message


def timeout_at(record: Sandbox, known: Session) -> datetime | None:
    """When a session that runs is over; None: never."""
    return known.timeout_at if is_kept(record, known) else record.expires_at


def is_kept(record: Sandbox, known: Session) -> bool:
    """It is paused by Tenki's call: what its record says of time is how long it is kept so."""
    return record.state is SandboxState.PAUSED and known.paused_at is not None


def snapshot(record: Snapshot, *, tags: Sequence[str], compressed: int) -> records_pb2.Snapshot:
    """A snapshot. What is ready is on the disk for good: durable.

    :param compressed: bytes of its layers that were compressed.
    """
    ready = record.state is SnapshotState.READY
    memory = record.ram.bytes or record.ram.own_bytes if record.ram else 0
    message = records_pb2.Snapshot(
        id=record.id,
        session_id=record.source_sandbox,
        workspace_id=record.workspace,
        name=record.name,
        state=_SNAPSHOTS[record.state],
        size_bytes=record.layer_bytes + memory,
        compressed_bytes=compressed,
        base_image_id=record.image,
        created_at=timestamp(record.created_at),
        expires_at=timestamp(record.expires_at),
        memory_bytes=memory,
        tags=tags,
        type=records_pb2.SNAPSHOT_TYPE_USER,
        cpu_cores=record.cpus,
        memory_mb=record.memory,
        disk_size_gb=record.storage,
        failure_reason=record.failure_reason,
        cpu_profile=record.machine.cpu_model,
        local_ready_at=timestamp(record.ready_at),
    )
    if ready:
        message.durability_state = records_pb2.SNAPSHOT_DURABILITY_STATE_DURABLE
        message.restore_mode = "MEMORY" if record.ram else "COLD_BOOT"
    return message


def volume(record: Volume, tags: Sequence[str]) -> records_pb2.Volume:
    """A volume."""
    state = _VOLUMES[record.state]
    if record.state is VolumeState.READY and record.attachments:
        state = records_pb2.VOLUME_STATE_IN_USE
    return records_pb2.Volume(
        id=record.id,
        workspace_id=record.workspace,
        name=record.name,
        size_bytes=record.size,
        state=state,
        created_at=_iso(record.created_at),
        updated_at=_iso(record.updated_at),
        tags=tags,
    )


def attachment(record: Attachment) -> records_pb2.VolumeAttachment:
    """A volume's place in a session."""
    return records_pb2.VolumeAttachment(
        id=f"{record.sandbox}:{record.slot}",
        volume_id=record.volume,
        session_id=record.sandbox,
        mount_path=record.path,
        readonly=record.read_only,
        state=_ATTACHMENTS[record.state],
    )


def egress(network: Network) -> records_pb2.SessionEgressPolicy:
    """What a session may reach; nothing named: every public address, or nothing."""
    rules = [rule for rule in network.rules if not rule.public]
    return records_pb2.SessionEgressPolicy(
        allow_domains=[str(rule) for rule in rules if rule.domain],
        allow_cidrs=[str(rule) for rule in rules if rule.cidr is not None],
    )


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(time: datetime) -> timestamp_pb2.Timestamp:
    """A time."""
    since = time - _EPOCH
    return timestamp_pb2.Timestamp(
        seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000
    )


def timestamp(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A time; None leaves the field unset."""
    return None if time is None else moment(time)


def duration(span: timedelta) -> duration_pb2.Duration:
    """A span of time."""
    message = duration_pb2.Duration()
    message.FromTimedelta(span)
    return message
