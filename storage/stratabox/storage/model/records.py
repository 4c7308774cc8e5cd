"""The words: one frozen dataclass for each noun that the catalog keeps.

**image**: an immutable base disk, plus kernel, initrd and command line where it does not boot by
itself. **sandbox**: one guest and its record. **domain**: the running thing (QEMU) behind a
sandbox. **layer**: one qcow2 file of a backing chain, *active* (an overlay that one domain writes)
or *sealed* (immutable). **chain**: layers from an overlay down to the image. **snapshot**: a
sealed layer for each disk, and the sandbox's configuration, at one instant. **blob**: a file kept
by its SHA-256 (kernel, initrd, firmware). **workspace**: a tenant; `workspace` names whose a thing
is (``model.workspaces``).

Times are aware datetimes in UTC. Sizes are bytes, but for `memory` (MiB) and `storage` (GiB),
which are kept in the unit that callers give them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from stratabox.storage.model.ids import (
    ImageId,
    JobId,
    LayerId,
    SandboxId,
    Sha256,
    SnapshotId,
    VolumeId,
    VolumeSnapshotId,
)
from stratabox.storage.model.network import NO_NETWORK, Network
from stratabox.storage.model.probes import Probe
from stratabox.storage.model.states import (
    AttachmentState,
    Boot,
    Identity,
    ImageState,
    JobKind,
    JobState,
    LayerState,
    Level,
    SandboxState,
    SnapshotState,
    TimeoutAction,
    VolumeState,
)

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One qcow2 file. `parent` is the next layer towards the image; an image's layer has none."""

    id: LayerId
    parent: LayerId | None
    state: LayerState
    size: int
    """Virtual size, bytes."""
    created_at: datetime
    sealed_at: datetime | None = None
    backing: LayerId | None = None
    """What its header names: its first parent. A hint; `parent` rules and can become another."""
    bytes: int = 0
    """On the host's disk; 0 while it is active."""
    compressed: bool = False
    sha256: Sha256 | None = None
    """Of a sealed layer's file, once somebody has asked for it."""
    content: Sha256 | None = None
    """Of the clusters that a sealed layer holds, once it was exported or imported."""
    reads_as: Sha256 | None = None
    """Of all that is read through it, likewise. Equal: the same disk; different: who knows."""


@dataclass(frozen=True, kw_only=True)
class KernelBoot:
    """What QEMU loads for a guest that does not boot by itself."""

    kernel: Sha256
    initrd: Sha256
    command_line: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An immutable base disk. `layer` is None until its bytes are in the store."""

    id: ImageId
    name: str
    state: ImageState
    origin: str
    """What it was made from, as "debian bookworm", "tiny" or "import"."""
    created_at: datetime
    layer: LayerId | None = None
    size: int = 0
    """Virtual size, bytes."""
    kernel_boot: KernelBoot | None = None
    cloud_init: bool = False
    """Its guests run cloud-init, and set themselves up by a seed at their first boot."""
    generation: int = 0

    @property
    def boot(self) -> Boot:
        """How guests of this image boot."""
        return Boot.KERNEL if self.kernel_boot else Boot.DISK


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The virtual hardware of a sandbox, fixed when it is created.

    All that the guest can see is in here or derived from it, so that a later start, on a newer
    host too, gives the guest the same machine.
    """

    machine_type: str
    """Versioned, as "pc-q35-7.2"; never an alias."""
    accelerator: str
    """"kvm" or "tcg"."""
    cpu_model: str
    qemu_version: str
    """QEMU that last started it."""
    firmware: Mapping[str, Sha256]
    """File name as QEMU asks for it ("bios-256k.bin") → blob."""
    mac: str
    kernel_boot: KernelBoot | None = None
    volumes: bool = False
    """It has a bus for volumes; machines of before there were any have none."""
    channel: bool = False
    """It has ports for the channel to its sshd; machines of before there were any have none."""
    channel_port: int = 0
    """Which of the two its channel goes by first, 0 or 1; nothing that a guest can see.

    What goes on from saved memory takes the other: there nobody has begun to speak yet.
    """
    exec_port: bool = False
    """It has the port that commands go by while there is no channel; older ones have none."""
    uplink: bool = False
    """Its card can be connected; machines of before there was egress have QEMU's closed network."""
    seed: Sha256 | None = None
    """The disk by which cloud-init sets its guest up; where there is one, it stays."""

    def up_to_date(self) -> Machine:
        """The same with all that a guest that boots can be given; one that goes on from saved
        memory has what it had."""
        return replace(self, volumes=True, channel=True, exec_port=True, uplink=True)

    @property
    def firmware_sha256(self) -> Sha256:
        """The BIOS itself."""
        return self.firmware["bios-256k.bin"]


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One disk: the active layer that a sandbox's guest writes, or a snapshot's sealed one."""

    index: int
    layer: LayerId
    size: int
    """Virtual size, bytes."""
    serial: str
    """What the guest sees as the disk's serial number; at most 20 bytes (virtio-blk's limit)."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A volume and where a guest has it, without saying that it is there now."""

    volume: VolumeId
    volume_name: str
    path: str
    """Absolute, in the guest."""
    read_only: bool
    slot: int
    """Its number on the sandbox's bus of volumes."""


@dataclass(frozen=True, kw_only=True)
class Attachment(Mount):
    """A volume's place in a sandbox: its claim, whether the sandbox runs or not."""

    sandbox: SandboxId
    state: AttachmentState


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A disk with a life of its own. `layer` is None until its bytes are in the store."""

    id: VolumeId
    workspace: str
    name: str
    state: VolumeState
    size: int
    """Virtual size, bytes."""
    created_at: datetime
    updated_at: datetime
    layer: LayerId | None = None
    filesystem: int = 0
    """What its file system was last grown to, bytes: less than `size` until the next mount."""
    clean: bool = True
    """Its file system needs no recovery: nobody writes it, and the last one let go in order."""
    source: str | None = None
    """Id of the volume or volume snapshot that it was made from."""
    reason: str = ""
    """What is wrong with it, where something is."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    attachments: tuple[Attachment, ...] = ()
    generation: int = 0


@dataclass(frozen=True, kw_only=True)
class VolumeSnapshot:
    """What a volume was at one instant."""

    id: VolumeSnapshotId
    workspace: str
    name: str
    volume: VolumeId
    volume_name: str
    layer: LayerId
    size: int
    """Virtual size, bytes."""
    filesystem: int = 0
    """As a volume's."""
    consistency: Level
    created_at: datetime
    generation: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A layer that is written anew in the background: what `layer` and those below it, down to
    and without `base`, hold together becomes `target`, which takes the place of `layer`.
    """

    id: JobId
    kind: JobKind
    state: JobState
    layer: LayerId
    base: LayerId | None
    """None: it stands on nothing."""
    target: LayerId
    created_at: datetime
    done_bytes: int = 0
    total_bytes: int = 0
    """0: not known yet."""
    reason: str = ""
    """Why it failed, was cancelled, or is where it is; for people."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    ended_generation: int = 0
    """The store's when it ended: what has changed since has a higher one, or the same."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When snapshots of a sandbox are taken by themselves."""

    every: timedelta
    level: Level | None
    """None: as for a snapshot by hand."""
    next_at: datetime


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """One guest and its record."""

    id: SandboxId
    workspace: str
    name: str
    state: SandboxState
    image: ImageId
    image_name: str
    cpus: int
    memory: int
    """MiB."""
    storage: int
    """Root disk, GiB."""
    machine: Machine
    created_at: datetime
    updated_at: datetime
    state_reason: str = ""
    ready: bool = False
    clean_shutdown: bool = False
    """Stopped by its own orderly shutdown, which Stratabox asked for: file systems are clean."""
    source_snapshot: SnapshotId | None = None
    disks: tuple[Disk, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    uid: int | None = None
    """Host uid that its QEMU runs under; None: the daemon's own."""
    vmgenid: str = ""
    """Generation id that the guest sees; renewed with every restore and revert."""
    ram_origin: str | None = None
    """RAM file that the running process was started from; None: it booted."""
    ram_since: str | None = None
    """RAM file of its last save, while it is known that no written page was missed since."""
    ram_parked: str | None = None
    """RAM file that holds its memory while it is paused to disk."""
    identity_due: Identity | None = None
    """It goes on from saved memory, and its guest was not told yet who it is and what time."""
    expires_at: datetime | None = None
    """When `on_timeout` is done to it; None: never."""
    on_timeout: TimeoutAction = TimeoutAction.TERMINATE
    keep_last: int = 0
    """How many of its snapshots are kept; 0: all."""
    schedule: Schedule | None = None
    volumes: tuple[Attachment, ...] = ()
    """By their slots. They have rows of their own: `change` leaves them alone."""
    left_behind: tuple[Mount, ...] = ()
    """Volumes that its source had and that it did not get."""
    probe: Probe | None = None
    """What must pass before it is ready; None: its agent's answer is enough."""
    network: Network = NO_NETWORK
    """What it may reach."""
    started_at: datetime | None = None
    ready_at: datetime | None = None
    terminated_at: datetime | None = None
    generation: int = 0

    @property
    def has_process(self) -> bool:
        """A QEMU belongs to it."""
        return self.state.has_process and self.ram_parked is None

    @property
    def answers(self) -> bool:
        """Its agent has answered since its start; its probe may not have passed yet."""
        tried = self.probe is not None and self.has_process and self.ready_at is not None
        return self.ready or tried


@dataclass(frozen=True, kw_only=True)
class SavedRam:
    """The memory of a snapshot: what its files hold, and what the machine must offer to go on."""

    parent: str | None
    """Id of the RAM file that this one only adds to; None: it stands alone."""
    own_bytes: int
    """Bytes that the pages of its own file take on the host's disk."""
    state_sha256: Sha256
    tracking: str
    """How written pages were told: "written", "soft_dirty" or "none"."""
    pause: timedelta
    """How long the guest stood still."""
    cpu_features: tuple[str, ...]
    """QEMU's names of all that the guest's CPU had."""
    bytes: int = 0
    """What both of its files take on the host's disk; 0: not looked at yet."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a sandbox was at one instant."""

    id: SnapshotId
    workspace: str
    name: str
    state: SnapshotState
    requested_level: Level | None
    source_sandbox: SandboxId
    source_sandbox_name: str
    image: ImageId
    image_name: str
    cpus: int
    memory: int
    """MiB."""
    storage: int
    """Root disk, GiB."""
    machine: Machine
    created_at: datetime
    consistency: Level | None = None
    """What was achieved; None until it is ready."""
    disks: tuple[Disk, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    ready_at: datetime | None = None
    expires_at: datetime | None = None
    failure_reason: str = ""
    frozen: int = 0
    """File systems that the guest's agent froze for it."""
    stall: timedelta | None = None
    """How long guest writes stalled."""
    layer_bytes: int = 0
    """Bytes on the host's disk in the layers that it sealed."""
    parent: SnapshotId | None = None
    ram: SavedRam | None = None
    """For the level memory."""
    volumes: tuple[Mount, ...] = ()
    """What its sandbox had at that instant; no part of it."""
    probe: Probe | None = None
    """Its sandbox's."""
    network: Network | None = None
    """Its sandbox's; None: nobody knows."""
    generation: int = 0

    @property
    def size(self) -> int:
        """Virtual size of all its disks, bytes."""
        return sum(disk.size for disk in self.disks)
