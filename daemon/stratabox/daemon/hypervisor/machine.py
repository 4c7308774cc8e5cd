"""What the daemon needs of any launcher, and the words that both sides share.

A launcher starts, stops, lists and finds again; nothing more. Everything after the start goes
over our own QMP socket, the same for every launcher (see ``domain``).

Files reach QEMU as file descriptors and never as names that it must be able to open: as root, QEMU
runs under a uid of its own that may not even enter the state folder.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stratabox.storage.model.ids import LayerId, SandboxId
from stratabox.storage.model.records import Machine

STAND_IN = "stand-in-"
"""How names of nodes begin that stand in for volumes."""


_LAYER_NODE = re.compile(r"L[0-9a-f]{28}")


@dataclass(frozen=True, kw_only=True)
class ChainLayer:
    """One qcow2 file of a backing chain, as QEMU is told of it."""

    id: LayerId
    path: Path

    @property
    def node(self) -> str:
        """Name of its format node in QEMU's block graph (QEMU's limit is 31 characters)."""
        return "L" + self.id.replace("-", "")[:28]

    @staticmethod
    def is_node(name: str) -> bool:
        """Tell whether a node of a block graph is a layer's format node."""
        return _LAYER_NODE.fullmatch(name) is not None

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
class DomainVolume:
    """A volume on the domain's bus of volumes; or, without a chain, the stand-in for one.

    A stand-in holds nothing and forgets what is written to it. A guest that goes on from saved
    memory needs something at each address where it had a volume.
    """

    slot: int
    serial: str
    chain: Sequence[ChainLayer]
    read_only: bool

    @property
    def device(self) -> str:
        """Id of its device."""
        return f"vol{self.slot}"

    @property
    def node(self) -> str:
        """Name of the node that its device begins with."""
        return self.chain[0].node if self.chain else f"{STAND_IN}{self.slot}"


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
    volumes: Sequence[DomainVolume] = ()
    seed: Path | None = None
    """Where the machine has one."""
    title: str = ""
    """The sandbox's name at the start, for whoever looks at the host's domains. Any text."""


@dataclass(frozen=True, kw_only=True)
class DomainHandle:
    """A domain that runs, or ran a moment ago."""

    sandbox: SandboxId
    pid: int
    started: int
    """Start time of the process in clock ticks since boot: with the pid, unique until reboot."""
    folder: Path
    console: socket.socket | None = field(default=None, compare=False, repr=False)
    """Our end of its serial console, where this daemon has started it. Whoever attaches takes it,
    and `Launcher.stop` closes it where nobody did. QEMU has it before it loads saved memory: a
    guest that waited for its console to take a byte would else wait for ever."""
    incoming: str | None = field(default=None, compare=False, repr=False)
    """What it is to load, see `memory.load`; of a domain started now, and from saved memory."""


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
