"""What the SDK returns: one frozen dataclass for each noun.

Times are aware datetimes in UTC. `memory` is in MiB and `storage` in GiB, as callers give them;
every other size is in bytes. A value that is not there is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Generic, TypeVar

from stratabox.client.errors import CommandFailedError, StrataboxError
from stratabox.client.network_records import Network
from stratabox.client.probe_records import ReadinessProbe

T = TypeVar("T")
#: The face's own class of sandbox: `Sandbox` or `AsyncSandbox`.
S = TypeVar("S", bound="SandboxRecord")


class SandboxState(StrEnum):
    """What a sandbox does at the moment."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    FAILED = "failed"
    #: A state that this version of the client does not know.
    UNKNOWN = "unknown"


class TimeoutAction(StrEnum):
    """What is done to a sandbox whose time is up."""

    TERMINATE = "terminate"
    #: To disk.
    PAUSE = "pause"
    #: A snapshot is taken, and then it is terminated.
    SNAPSHOT = "snapshot"
    UNKNOWN = "unknown"


class AttachmentState(StrEnum):
    """Where an attachment of a volume is in its life."""

    ATTACHING = "attaching"
    #: Mounted in the guest, or claimed by a sandbox that does not run.
    ATTACHED = "attached"
    DETACHING = "detaching"
    UNKNOWN = "unknown"


class SnapshotState(StrEnum):
    """Where a snapshot is in its life."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"
    UNKNOWN = "unknown"


class PageTracking(StrEnum):
    """How the pages that a guest has written since its last memory snapshot are told."""

    NONE = "none"
    SOFT_DIRTY = "soft_dirty"
    WRITTEN = "written"
    UNKNOWN = "unknown"


class SnapshotLevel(StrEnum):
    """How consistent a snapshot is."""

    #: As after a power cut; all disks at one instant.
    CRASH = "crash"
    #: File systems frozen through the guest's agent, or the guest cleanly shut down.
    APPLICATION = "application"
    #: RAM, devices and every disk at one instant.
    MEMORY = "memory"
    UNKNOWN = "unknown"


class Identity(StrEnum):
    """Who a guest that is a copy, or that goes on from saved memory, is."""

    #: Who it was: host name, machine-id, SSH host keys and MAC address stay.
    KEEP = "keep"
    #: Somebody new.
    RENEW = "renew"
    UNKNOWN = "unknown"


class ImageState(StrEnum):
    """Where an image is in its life."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"
    UNKNOWN = "unknown"


class BootMethod(StrEnum):
    """How an image boots."""

    #: QEMU loads kernel and initrd.
    KERNEL = "kernel"
    #: The firmware boots from the disk.
    DISK = "disk"
    UNKNOWN = "unknown"


class DiskFormat(StrEnum):
    """How the bytes of a disk image file are laid out."""

    QCOW2 = "qcow2"
    RAW = "raw"


class EventType(StrEnum):
    """What happened to a record."""

    #: It was there when the watch began.
    PRESENT = "present"
    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One disk of a sandbox. The guest sees it as /dev/disk/by-id/virtio-SERIAL."""

    index: int
    size_bytes: int
    serial: str
    chain_depth: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The virtual hardware of a sandbox, fixed at its creation."""

    machine_type: str
    accelerator: str
    cpu_model: str
    qemu_version: str
    firmware_sha256: str
    #: It has a bus for volumes.
    volumes: bool


@dataclass(frozen=True, kw_only=True)
class Space:
    """Bytes on the host's disk."""

    #: What it would take if it stood alone.
    logical_bytes: int
    #: What comes free when it alone is deleted.
    own_bytes: int
    #: What it stands on together with others, and what stays for others.
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class SnapshotSchedule:
    """Snapshots of a sandbox that are taken by the clock."""

    every: timedelta
    #: None: as for a snapshot by hand.
    level: SnapshotLevel | None = None
    #: When the next one is due; set by the daemon.
    next_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """A volume in a sandbox."""

    #: Its id; in requests also its name.
    volume: str
    #: Where the guest has it mounted.
    path: str
    read_only: bool = False
    #: Set by the daemon, like `state`.
    volume_name: str | None = None
    #: None where it is not said to be there now.
    state: AttachmentState | None = None


@dataclass(frozen=True, kw_only=True)
class SandboxRecord:
    """One guest, as it was when the daemon answered."""

    id: str
    name: str
    state: SandboxState
    state_reason: str | None
    ready: bool
    image_id: str | None
    image_name: str | None
    source_snapshot_id: str | None
    cpus: int
    memory: int
    storage: int
    env: Mapping[str, str] = field(hash=False)
    metadata: Mapping[str, str] = field(hash=False)
    tags: tuple[str, ...]
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    ready_at: datetime | None
    terminated_at: datetime | None
    disks: tuple[Disk, ...]
    machine: Machine | None
    generation: int
    #: State paused: its memory is on the host's disk, and no process runs.
    paused_to_disk: bool
    #: State paused to disk: bytes of RAM on the host's disk.
    memory_bytes: int
    #: When `on_timeout` is done to it.
    expires_at: datetime | None
    on_timeout: TimeoutAction
    #: As it is now: it changes without the record, and so is no part of what makes two equal.
    space: Space = field(compare=False)
    #: How many of its snapshots are kept; 0: all.
    keep_last: int
    snapshot_schedule: SnapshotSchedule | None
    volumes: tuple[VolumeMount, ...]
    #: Volumes that its source had at that instant and that it did not get.
    left_behind: tuple[VolumeMount, ...]
    #: What must pass before it is ready; None: its agent's answer is enough.
    readiness_probe: ReadinessProbe | None = None
    #: What it may reach.
    network: Network


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a sandbox was at one instant."""

    id: str
    name: str
    state: SnapshotState
    consistency: SnapshotLevel | None
    requested_level: SnapshotLevel | None
    source_sandbox_id: str | None
    source_sandbox_name: str | None
    image_id: str | None
    parent_snapshot_id: str | None
    size_bytes: int
    layer_bytes: int
    cpus: int
    memory: int
    storage: int
    env: Mapping[str, str] = field(hash=False)
    metadata: Mapping[str, str] = field(hash=False)
    created_at: datetime
    ready_at: datetime | None
    expires_at: datetime | None
    failure_reason: str | None
    frozen_filesystems: int
    stall: timedelta | None
    #: Level memory: bytes of RAM that it added on the host's disk.
    memory_bytes: int
    #: Level memory: how long the guest stood still, milliseconds.
    pause_ms: float | None
    #: Level memory: how the pages that the guest had written were told.
    page_tracking: PageTracking | None
    #: What it was taken on, which a restore of its memory needs.
    machine: Machine | None
    generation: int
    #: As it is now: it changes without the record, and so is no part of what makes two equal.
    space: Space = field(compare=False)
    #: Bytes on the host's disk of those of its own layers that are stored compressed.
    compressed_bytes: int
    #: What its sandbox had at that instant; no part of it.
    volumes: tuple[VolumeMount, ...]
    #: What its sandbox might reach; None: not known.
    network: Network | None
    #: Its sandbox's.
    readiness_probe: ReadinessProbe | None = None


@dataclass(frozen=True, kw_only=True)
class Image:
    """An immutable base disk that sandboxes start from."""

    id: str
    name: str
    state: ImageState
    boot: BootMethod
    origin: str
    size_bytes: int
    layer_bytes: int
    kernel_sha256: str | None
    initrd_sha256: str | None
    kernel_command_line: str | None
    created_at: datetime
    generation: int
    #: As it is now: it changes without the record, and so is no part of what makes two equal.
    space: Space = field(compare=False)
    #: Its guests run cloud-init, and each sandbox gets a seed.
    cloud_init: bool = False


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """A part of a list. `next_page_token` is None on the last page."""

    items: tuple[T, ...]
    next_page_token: str | None


@dataclass(frozen=True, kw_only=True)
class ExecuteResult:
    """How a command ended, and what it printed.

    Exactly one of `exit_code` and `signal` is set, unless it was killed by its time-out.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    timed_out: bool
    duration: timedelta
    #: It was killed, and meanwhile the guest had no memory left, and its kernel killed something.
    out_of_memory: bool = False
    #: It failed to write, and a disk of the guest is full.
    disk_full: bool = False

    @property
    def ok(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out

    @property
    def stdout_text(self) -> str:
        """Standard output as UTF-8, with replacement characters for what is not."""
        return self.stdout.decode(errors="replace")

    @property
    def stderr_text(self) -> str:
        """Standard error as UTF-8, with replacement characters for what is not."""
        return self.stderr.decode(errors="replace")

    def check(self) -> ExecuteResult:
        """Return this result when it is `ok`.

        :raise CommandFailedError: when it is not; the error carries this result.
        """
        if self.ok:
            return self
        if self.timed_out:
            ended = "was killed when its time was up"
        elif self.signal is not None:
            ended = f"was ended by signal {self.signal}"
        else:
            ended = f"ended with exit code {self.exit_code}"
        if self.out_of_memory:
            ended += ", as the guest had no memory left"
        elif self.disk_full:
            ended += ", and a disk of the guest is full"
        last = self.stderr_text.strip().splitlines()[-1:]
        raise CommandFailedError(": ".join([f"the command {ended}", *last]), self)


@dataclass(frozen=True, kw_only=True)
class CloneResult(Generic[S]):
    """What a clone gave: for each copy asked for, the sandbox or why it is missing."""

    snapshot: Snapshot
    results: tuple[S | StrataboxError, ...]

    @property
    def sandbox(self) -> S:
        """The first copy.

        :raise StrataboxError: the first copy's error, when there is no copy at all.
        """
        for result in self.results:
            if not isinstance(result, StrataboxError):
                return result
        raise self.errors[0] if self.errors else StrataboxError("no copy was asked for")

    @property
    def sandboxes(self) -> tuple[S, ...]:
        """The copies that were made."""
        return tuple(one for one in self.results if not isinstance(one, StrataboxError))

    @property
    def errors(self) -> tuple[StrataboxError, ...]:
        """Why the others are missing."""
        return tuple(one for one in self.results if isinstance(one, StrataboxError))


@dataclass(frozen=True, kw_only=True)
class RevertResult(Generic[S]):
    """The sandbox as it is again, and the snapshot of what it was (expires in 24 hours)."""

    sandbox: S
    safety_snapshot: Snapshot


@dataclass(frozen=True, kw_only=True)
class SnapshotDeletion:
    """What deleting a snapshot does to the host's disk."""

    id: str
    freed_bytes: int
    #: What it has of its own and stays for others.
    kept_bytes: int
    #: Ids of those, the nearest first; 100 at most.
    kept_for: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImageDeletion:
    """What deleting an image did to the host's disk."""

    id: str
    freed_bytes: int


@dataclass(frozen=True, kw_only=True)
class SandboxEvent:
    """One change of a sandbox. With `deleted`, the record is the one before it."""

    type: EventType
    sandbox: SandboxRecord
    time: datetime


@dataclass(frozen=True, kw_only=True)
class SnapshotEvent:
    """One change of a snapshot. With `deleted`, `freed_bytes` is what really came free."""

    type: EventType
    snapshot: Snapshot
    time: datetime
    freed_bytes: int


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """A step of an image build. `fraction` is 0 to 1, or None where that cannot be told."""

    step: str
    fraction: float | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found not to be as it must be."""

    #: Stable, as an error's: RAM_CORRUPT, STATE_CORRUPT, LAYER_MISSING, LAYER_CORRUPT,
    #: BLOB_MISSING, BLOB_CORRUPT, NOT_SEALED, STRAY_FILE, HOST_DISK_FAILED; and of guests:
    #: GUEST_STOPPED, GUEST_RUNS, GUEST_FROZEN, PAUSED_WITHOUT_REASON, PROCESS_LOST,
    #: ORPHANED_DOMAIN, GRAPH_MISMATCH, DISK_FAILED, MONITOR_UNAVAILABLE.
    reason: str
    #: "snapshot", "sandbox", "layer", "image", "file" or "process".
    kind: str
    #: Its id, the file's name, or the process's number.
    subject: str
    #: What is wrong.
    message: str
    #: What to do.
    cure: str
    #: What was done about it; empty: nothing.
    repaired: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check of all that is kept has found; no findings: all is well."""

    findings: tuple[Finding, ...]
    #: Files that were looked at.
    files: int
    #: Bytes that were read of them.
    bytes: int
    #: What is in the folder "quarantine": nothing needs it, and nobody but you removes it.
    quarantined_files: int
    quarantined_bytes: int

    @property
    def left(self) -> tuple[Finding, ...]:
        """What was found and not repaired."""
        return tuple(finding for finding in self.findings if not finding.repaired)
