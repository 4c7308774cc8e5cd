"""What the daemon needs of any launcher, and the words that both sides share.

A launcher starts, stops, lists and finds again; nothing more. Everything after the start goes
over our own QMP socket, the same for every launcher (see ``domain``).

Files reach QEMU as file descriptors and never as names that it must be able to open: as root, QEMU
runs under a uid of its own that may not even enter the state folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stratabox.storage.model.ids import LayerId, SandboxId
from stratabox.storage.model.records import Machine


@dataclass(frozen=True, kw_only=True)
class ChainLayer:
    """One qcow2 file of a backing chain, as QEMU is told of it."""

    id: LayerId
    path: Path

    @property
    def node(self) -> str:
        """Name of its format node in QEMU's block graph (QEMU's limit is 31 characters)."""
        return "L" + self.id.replace("-", "")[:28]

    @property
    def file_node(self) -> str:
        """Name of its protocol node."""
        return "F" + self.id.replace("-", "")[:28]


@dataclass(frozen=True, kw_only=True)
class DomainDisk:
    """One disk: its whole chain, the overlay that the guest writes first, the image last."""

    index: int
    serial: str
    chain: Sequence[ChainLayer]

    @property
    def device(self) -> str:
        """Id of its virtio-blk device."""
        return f"disk{self.index}"


@dataclass(frozen=True, kw_only=True)
class SavedMemory:
    """What a guest goes on from: descriptors of sealed memfds, which stay the caller's.

    Any number of domains may be started with the same ones.
    """

    ram: int
    """As large as the guest's RAM."""
    state: int
    """State of its devices."""


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """Everything that a launcher needs to start one guest."""

    sandbox: SandboxId
    machine: Machine
    cpus: int
    memory: int
    """MiB."""
    vmgenid: str
    disks: Sequence[DomainDisk]
    firmware_dir: Path
    """Folder with the machine's firmware under the names that QEMU asks for. The folder must be
    0555 or more and kernel and initrd 0444 or more, whatever the folders above: QEMU opens them by
    their descriptors, as its own user. Layers may be as private as you like."""
    kernel: Path | None
    initrd: Path | None
    folder: Path
    """The sandbox's own folder: sockets and QEMU's messages go here. It exists."""
    uid: int | None
    """Run QEMU as this uid (and gid of the same number); None: as the daemon itself."""
    saved: SavedMemory | None = None
    """Go on from there; None: start from the beginning."""


@dataclass(frozen=True, kw_only=True)
class DomainHandle:
    """A domain that runs, or ran a moment ago."""

    sandbox: SandboxId
    pid: int
    started: int
    """Start time of the process in clock ticks since boot: with the pid, unique until reboot."""
    folder: Path


class Launcher(Protocol):
    """Starts, stops, lists and finds again domains."""

    @property
    def name(self) -> str:
        """ "qemu" or "libvirt"."""

    async def start(self, spec: DomainSpec) -> DomainHandle:
        """Start a domain with its vCPUs stopped (``-S``); whoever controls it sends ``cont``.

        If this raises or is cancelled, no process and no socket is left.

        :raise FailedError: QEMU_FAILED, when QEMU does not come up; the message has its own words.
        :raise UnavailableError: when the launcher's service does not answer.
        """

    async def stop(self, handle: DomainHandle) -> None:
        """End a domain at once, as by pulling its plug, and wait until it is gone. Idempotent."""

    async def list(self) -> Sequence[DomainHandle]:
        """All domains of this store that run on this host."""

    async def find(self, sandbox: SandboxId, folder: Path) -> DomainHandle | None:
        """The running domain of one sandbox, also one that an earlier daemon started."""

    def is_alive(self, handle: DomainHandle) -> bool:
        """Tell whether that very process still runs."""
