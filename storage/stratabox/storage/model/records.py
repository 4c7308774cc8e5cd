"""The words: one frozen dataclass for each noun that the catalog keeps.

**image**: an immutable base disk, plus kernel, initrd and command line where it does not boot by
itself. **sandbox**: one guest and its record. **domain**: the running thing (QEMU) behind a
sandbox. **layer**: one qcow2 file of a backing chain, *active* (an overlay that one domain writes)
or *sealed* (immutable). **chain**: layers from an overlay down to the image. **snapshot**: a
sealed layer for each disk, and the sandbox's configuration, at one instant. **blob**: a file kept
by its SHA-256 (kernel, initrd, firmware).

Times are aware datetimes in UTC. Sizes are bytes, but for `memory` (MiB) and `storage` (GiB),
which are kept in the unit that callers give them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, Sha256, SnapshotId
from stratabox.storage.model.states import (
    Boot,
    ImageState,
    LayerState,
    Level,
    SandboxState,
    SnapshotState,
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
class Sandbox:
    """One guest and its record."""

    id: SandboxId
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
    started_at: datetime | None = None
    ready_at: datetime | None = None
    terminated_at: datetime | None = None
    generation: int = 0


@dataclass(frozen=True, kw_only=True)
class SavedRam:
    """The memory of a snapshot: what its files hold, and what the machine must offer to go on."""

    parent: str | None
    """Id of the RAM file that this one only adds to; None: it stands alone."""
    own_bytes: int
    """Bytes of pages in its own file."""
    state_sha256: Sha256
    tracking: str
    """How written pages were told: "written", "soft_dirty" or "none"."""
    pause: timedelta
    """How long the guest stood still."""
    cpu_features: tuple[str, ...]
    """QEMU's names of all that the guest's CPU had."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a sandbox was at one instant."""

    id: SnapshotId
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
    generation: int = 0

    @property
    def size(self) -> int:
        """Virtual size of all its disks, bytes."""
        return sum(disk.size for disk in self.disks)
