"""Saved memory in use: what is ready to be mapped, and whether it fits this host."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from stratabox.daemon.hypervisor import qemu_host
from stratabox.daemon.hypervisor.accelerator import Accelerator
from stratabox.daemon.hypervisor.machine import SavedMemory
from stratabox.daemon.hypervisor.memory.fits import Offer, differences
from stratabox.daemon.hypervisor.memory.hot import HotMemory
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.chain import read_chain
from stratabox.storage.files.memory.sealed import assemble, read_state
from stratabox.storage.model.errors import CorruptError, DeniedError
from stratabox.storage.model.records import MIB, Snapshot


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
        self._hot = HotMemory(limit)
        self._features: frozenset[str] | None = None

    async def features(self) -> frozenset[str]:
        """QEMU's names of all that a guest's CPU has here. :raise FailedError: QEMU_FAILED."""
        if self._features is None:
            self._features = await qemu_host.cpu_features(
                self._qemu, self._accelerator.name, self._accelerator.cpu_model
            )
        return self._features

    async def check_fits(self, snapshot: Snapshot) -> None:
        """Refuse what would crash the guest sooner or later.

        :raise DeniedError: MACHINE_MISMATCH, naming each difference and the way out.
        """
        assert snapshot.ram is not None
        found = differences(
            snapshot.machine,
            snapshot.ram.cpu_features,
            Offer(
                qemu_version=self._qemu.version_text,
                machine_types=self._qemu.machine_types,
                accelerator=self._accelerator.name,
                cpu_features=await self.features(),
            ),
        )
        if found:
            raise DeniedError(
                f"the memory of snapshot {snapshot.name!r} cannot go on here: {'; '.join(found)}."
                " Its disks can: restore it cold",
                reason="MACHINE_MISMATCH",
                snapshot=snapshot.id,
            )

    def use(self, snapshot: Snapshot) -> AbstractAsyncContextManager[SavedMemory]:
        """The snapshot's memory for as long as a start needs it.

        Its state is checked against its hash, its RAM's files by their headers and tables.

        :raise CorruptError: STATE_CORRUPT or RAM_CORRUPT.
        """
        ram = snapshot.ram
        if ram is None:
            raise CorruptError(f"snapshot {snapshot.id} has no saved memory", reason="RAM_CORRUPT")

        def make() -> SavedMemory:
            chain = read_chain(snapshot.id, self._layout.ram_file, snapshot.memory * MIB)
            state = read_state(self._layout.state_file(snapshot.id), ram.state_sha256)
            return SavedMemory(ram=assemble(chain), state=state)

        return self._hot.use(snapshot.id, make)

    def forget(self, snapshot: str) -> None:
        """Its snapshot is deleted: keep it ready no longer."""
        self._hot.forget(snapshot)

    def close(self) -> None:
        """Let go of all; guests that run have their own hold on what they need."""
        self._hot.close()
