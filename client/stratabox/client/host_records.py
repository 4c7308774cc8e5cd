"""What the SDK returns of a daemon and its host; the conventions are those of `records`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of the daemon's configuration: its value as TOML, and where that came from."""

    key: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class HostAccount:
    """What admission goes by; memory and disks in MiB. A limit of 0: there is none."""

    memory_total: int
    memory_available: int
    """What guests could be given of it now."""
    memory_granted: int
    """RAM of all guests that have a process."""
    memory_limit: int
    memory_own: int
    """What their processes have written, which nobody shares with them."""
    memory_growth: int
    """What they can still grow by, were all of their RAM to become their own."""
    memory_growth_limit: int
    cpus_total: int
    cpus_granted: int
    cpus_limit: int
    sandboxes: int
    """How many have a process."""
    sandboxes_limit: int
    disk_free: int
    disk_growth: int
    """What all disks and volumes can still grow by, were they written full."""
    disk_growth_limit: int


@dataclass(frozen=True, kw_only=True)
class Host:
    """The daemon and what it uses."""

    version: str
    state_dir: str
    launcher: str
    accelerator: str
    accelerator_reason: str
    qemu_version: str
    settings: tuple[Setting, ...]
    pid: int
    warm_spares: int
    """QEMUs that wait, each for a memory snapshot that was restored lately."""
    memory_in_use: int
    """RAM of all guests that run or stand still in memory, MiB; `admission.memory` bounds it."""
    account: HostAccount
    """What guests have of the host, and what is left."""
    limits_by: str
    """Whose control groups guests are in: "systemd", or a folder; empty: none."""
    limits: tuple[str, ...]
    """What they limit of each guest: "cpu", "io", "memory", "pids"."""
    limits_reason: str
    """Why not more; empty: all that the configuration asks for."""


@dataclass(frozen=True, kw_only=True)
class DiskUsagePart:
    """One kind of what a daemon keeps."""

    #: "images", "snapshots", "sandboxes", "volumes", "volume_snapshots", "memory", "boot_files",
    #: "garbage", "work", "backups", "quarantine", "catalog", "reserve", "folders" or "other".
    name: str
    bytes: int
    files: int


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """What the daemon's state folder takes on the disk, each file counted once."""

    parts: tuple[DiskUsagePart, ...]
    #: The sum of all parts: what `du` says of the folder.
    total_bytes: int
    #: What of it counts against the budget now.
    budget_used_bytes: int
    #: The configuration's store.budget; 0: none.
    budget_bytes: int
    #: Of the file system that it lies on.
    filesystem_bytes: int
    filesystem_free_bytes: int
    #: The configuration's store.high_water, per cent of the file system.
    high_water_percent: int
