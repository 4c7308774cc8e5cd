"""Saved memory in use: what is ready to be mapped, and whether it fits this host.

Whoever starts from saved memory assembles it, once for all who want it; and what was saved or used
last is assembled in the background beforehand (`keep_warm`), in a quiet moment and as far as the
host's memory goes, so that the first restore is as quick as the next ones.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from stratabox.daemon.hypervisor import qemu_host
from stratabox.daemon.hypervisor.accelerator import Accelerator
from stratabox.daemon.hypervisor.machine import SavedMemory
from stratabox.daemon.hypervisor.memory import headroom
from stratabox.daemon.hypervisor.memory.fits import Offer, differences
from stratabox.daemon.hypervisor.memory.hot import HotMemory
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.daemon.lifecycle.memory.rush import Rush
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.chain import OpenChain, resolve
from stratabox.storage.files.memory.format import PAGE
from stratabox.storage.files.memory.sealed import assemble, read_state
from stratabox.storage.model.errors import DeniedError, NoSpaceError, StrataboxError
from stratabox.storage.model.records import MIB, Machine, Mount, SavedRam, Snapshot

log = logging.getLogger(__name__)

_MIB_A_SECOND = 2048
"""How fast a guest's RAM is assembled, roughly."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Saved memory that a guest can go on from."""

    id: str
    """Of its RAM file."""
    what: str
    """Whose memory it is, for messages: "snapshot 'x'"."""
    ram: SavedRam
    memory: int
    """RAM of the guest, MiB."""
    machine: Machine
    way_out: str = "Its disks can: restore it cold"
    """What helps where this memory cannot go on."""
    volumes: tuple[Mount, ...] | None = None
    """Volumes that it knows, and that whoever goes on from it does not have; None: it goes on with
    its own."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Origin | None:
        """A snapshot's memory, if it has some."""
        if snapshot.ram is None:
            return None
        return cls(
            id=snapshot.id,
            what=f"snapshot {snapshot.name!r}",
            ram=snapshot.ram,
            memory=snapshot.memory,
            machine=snapshot.machine,
            volumes=snapshot.volumes,
        )


class Memories:
    """Hands out saved memory, each assembled once however many start from it.

    :param limit: bytes that are kept ready for snapshots that nobody starts from just now.
    """

    def __init__(
        self, layout: Layout, qemu: QemuHost, accelerator: Accelerator, limit: int
    ) -> None:
        self._layout = layout
        self._qemu = qemu
        self._accelerator = accelerator
        self._limit = limit
        self._hot = HotMemory(limit)
        self._features: frozenset[str] | None = None
        self._wanted: list[Origin] = []
        """To be made ready in the background, the most urgent last."""
        self._wake = asyncio.Event()

    async def features(self) -> frozenset[str]:
        """QEMU's names of all that a guest's CPU has here. :raise FailedError: QEMU_FAILED."""
        if self._features is None:
            self._features = await qemu_host.cpu_features(
                self._qemu, self._accelerator.name, self._accelerator.cpu_model
            )
        return self._features

    async def check_fits(self, origin: Origin) -> None:
        """Refuse what would crash the guest sooner or later.

        :raise DeniedError: MACHINE_MISMATCH, naming each difference and the way out.
        """
        found = differences(
            origin.machine,
            origin.ram.cpu_features,
            Offer(
                qemu_version=self._qemu.version_text,
                machine_types=self._qemu.machine_types,
                accelerator=self._accelerator.name,
                cpu_features=await self.features(),
            ),
        )
        if found:
            raise DeniedError(
                f"the memory of {origin.what} cannot go on here: {'; '.join(found)}."
                f" {origin.way_out}",
                reason="MACHINE_MISMATCH",
                ram=origin.id,
            )

    def use(self, origin: Origin) -> AbstractAsyncContextManager[SavedMemory]:
        """The saved memory for as long as a start needs it.

        Its state is checked against its hash, its RAM's files by their headers and tables.

        :raise CorruptError: STATE_CORRUPT or RAM_CORRUPT.
        """

        return self._hot.use(origin.id, lambda: self._make(origin))

    def use_verified(self, origin: Origin) -> AbstractAsyncContextManager[SavedMemory]:
        """As `use`, assembled anew with all of its chain's files compared with their sums.

        Also where it is ready already: that may be of files that were damaged then, or were not
        damaged yet. Who uses it at the same time gets what was verified.

        :raise CorruptError: STATE_CORRUPT or RAM_CORRUPT.
        """
        self._hot.forget(origin.id)
        return self._hot.use(origin.id, lambda: self._make(origin, verify=True))

    def warm(self, origin: Origin) -> None:
        """Have it made ready by `keep_warm`, before all that were wanted earlier."""
        self._wanted = [each for each in self._wanted if each.id != origin.id] + [origin]
        self._wake.set()

    async def keep_warm(self, rush: Rush) -> None:
        """Make ready what `warm` was told of; goes on until it is cancelled.

        Only what fits within the bound for all that is kept ready, and leaves the host an eighth of
        its memory.
        """
        while True:
            if not self._wanted:
                self._wake.clear()
                await self._wake.wait()
            origin = self._wanted[-1]
            # As long as making it may take: of snapshots in a row only the last is worth it.
            await rush.calm(origin.memory / _MIB_A_SECOND)
            if origin not in self._wanted[-1:]:
                continue
            self._wanted.pop()
            if not self._hot.holds(origin.id):
                await self._make_ready(origin)

    def forget(self, ram: str) -> None:
        """Nobody will go on from it any more: keep it ready no longer."""
        self._wanted = [each for each in self._wanted if each.id != ram]
        self._hot.forget(ram)

    def close(self) -> None:
        """Let go of all; guests that run have their own hold on what they need."""
        self._hot.close()

    async def _make_ready(self, origin: Origin) -> None:
        room = min(self._limit, headroom.spare_bytes())
        try:
            async with self._hot.use(origin.id, lambda: self._make(origin, room)):
                log.debug("the memory of %s is ready", origin.what)
        except (StrataboxError, OSError) as error:
            # Too large, or deleted meanwhile; or damaged, which its restore will tell.
            log.info("the memory of %s is not made ready: %s", origin.what, error)

    def _make(
        self, origin: Origin, room: int | None = None, *, verify: bool = False
    ) -> SavedMemory:
        """Check and assemble it; blocks.

        :param room: bytes that it may take; None: as many as it needs.
        """
        with OpenChain(origin.id, self._layout.ram_file, origin.memory * MIB) as chain:
            if room is not None:
                pieces = resolve(chain.files)
                size = PAGE * sum(piece.count for piece in pieces if piece.file >= 0)
                if size > room:
                    raise NoSpaceError(f"it has {size} bytes and there is room for {room}")
            state = read_state(self._layout.state_file(origin.id), origin.ram.state_sha256)
            return SavedMemory(ram=assemble(chain, verify=verify), state=state)
