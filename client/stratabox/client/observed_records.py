"""Records of what can be seen of sandboxes from outside: consoles, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from stratabox.client.records import SandboxState


@dataclass(frozen=True, kw_only=True)
class ConsoleOutput:
    """The next bytes of a serial console, as the guest wrote them: escape them for people."""

    data: bytes
    #: Bytes before these that the caller was too slow for.
    lost_bytes: int


@dataclass(frozen=True, kw_only=True)
class ProcessMetrics:
    """The process behind a sandbox. It is a new one after a boot, a restore, a resume from disk."""

    uptime: timedelta
    cpu_time: timedelta
    #: Share of one CPU since the sample before: 1.5 is one and a half.
    cpu_share: float | None
    #: Memory that it has mapped and touched, what it shares with others included.
    rss_bytes: int
    #: The same, with what is shared divided among those who share it; None: not to be seen.
    pss_bytes: int | None
    #: Memory that is its alone.
    private_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class DiskMetrics:
    """What the guest has done with one disk since its process started."""

    #: "disk0" is the root disk, "vol0" the volume in slot 0.
    device: str
    read_bytes: int
    written_bytes: int
    read_operations: int
    write_operations: int
    flush_operations: int


@dataclass(frozen=True, kw_only=True)
class NetworkMetrics:
    """What went over a sandbox's network since its process started, seen by the guest."""

    received_bytes: int
    sent_bytes: int
    received_packets: int
    sent_packets: int
    #: What its network policy refused.
    refused: int


@dataclass(frozen=True, kw_only=True)
class SandboxMetrics:
    """What one sandbox uses of the host."""

    sandbox_id: str
    name: str
    state: SandboxState
    cpus: int
    #: RAM that the guest has, MiB.
    memory: int
    #: None: it has no process.
    process: ProcessMetrics | None
    disks: tuple[DiskMetrics, ...]
    #: Bytes on the host's disk that come free when it alone is deleted.
    own_bytes: int
    network: NetworkMetrics


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of some sandboxes at one time."""

    time: datetime
    sandboxes: tuple[SandboxMetrics, ...]
