"""What all use cases share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stratabox.daemon.config import Config
from stratabox.daemon.hypervisor.accelerator import Accelerator
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainDisk, DomainSpec, Launcher
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.daemon.lifecycle.events import Bus, Happening
from stratabox.daemon.lifecycle.memories import Memories
from stratabox.daemon.lifecycle.threads import Tasks, in_executor, in_thread
from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import CorruptError, StrataboxError
from stratabox.storage.model.ids import ImageId, SandboxId, Sha256, SnapshotId
from stratabox.storage.model.records import Image, Sandbox, Snapshot

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class World:
    """The daemon's parts, put together once by ``app``."""

    config: Config
    catalog: Catalog
    store: Store
    launcher: Launcher
    qemu: QemuHost
    accelerator: Accelerator
    firmware: Mapping[str, Sha256]
    """This host's firmware, already in the store."""
    qemu_uids: bool
    """Give each QEMU a host uid of its own (the daemon is root)."""
    memories: Memories
    bus: Bus = field(default_factory=Bus)
    tasks: Tasks = field(default_factory=Tasks)
    worker: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="catalog")
    )

    async def write(self, change: Callable[[Transaction], T]) -> T:
        """Run one catalog transaction in its thread; durable when this returns.

        Cancelled or not, the transaction has ended when this does.
        """

        def run() -> T:
            with self.catalog.transaction() as tx:
                return change(tx)

        return await in_executor(self.worker, run)

    read = write
    """The same, for transactions that change nothing."""

    async def change_sandbox(self, sandbox: SandboxId, **changes: Any) -> Sandbox:
        """Change one sandbox's record, and tell the watchers."""
        record = await self.write(lambda tx: sandboxes.change(tx, sandbox, **changes))
        self.bus.publish(Happening.UPDATED, record)
        return record

    async def change_snapshot(self, snapshot: SnapshotId, **changes: Any) -> Snapshot:
        """Change one snapshot's record, and tell the watchers."""
        record = await self.write(lambda tx: snapshots.change(tx, snapshot, **changes))
        self.bus.publish(Happening.UPDATED, record)
        return record

    async def change_image(self, image: ImageId, **changes: Any) -> Image:
        """Change one image's record, and tell the watchers."""
        record = await self.write(lambda tx: images.change(tx, image, **changes))
        self.bus.publish(Happening.UPDATED, record)
        return record

    async def sweep(self) -> int:
        """Remove the layers that nothing needs; returns the bytes that came free.

        In the catalog's thread, so that two sweeps never meet. It never fails its caller, who has
        done what was asked: what could not be removed is removed the next time.
        """
        try:
            return await in_executor(self.worker, lambda: self.store.sweep(self.catalog))
        except (OSError, StrataboxError) as error:
            log.error("garbage stays until the next sweep: %s", error)
            return 0

    async def sweep_blobs(self) -> None:
        """Remove the blobs that nothing needs. Only while no image is being made."""
        await in_executor(
            self.worker,
            lambda: self.store.sweep_blobs(self.catalog, self.firmware.values()),
        )

    async def domain_spec(self, sandbox: Sandbox) -> DomainSpec:
        """What a launcher needs to start this sandbox.

        :raise CorruptError: LAYER_MISSING or BLOB_MISSING, when a file is not there.
        """
        chains = await self.read(
            lambda tx: [layers.chain(tx, disk.layer) for disk in sandbox.disks]
        )

        def gather() -> DomainSpec:
            disks = []
            for disk, chain in zip(sandbox.disks, chains, strict=True):
                for layer in chain:
                    if not self.store.layout.layer(layer.id).exists():
                        raise CorruptError(
                            f"disk {disk.index} of sandbox {sandbox.name!r} needs layer"
                            f" {layer.id}, whose file is gone",
                            reason="LAYER_MISSING",
                            layer=layer.id,
                        )
                disks.append(
                    DomainDisk(
                        index=disk.index,
                        serial=disk.serial,
                        chain=[
                            ChainLayer(id=layer.id, path=self.store.layout.layer(layer.id))
                            for layer in chain
                        ],
                    )
                )
            boot = sandbox.machine.kernel_boot
            folder = self.store.layout.sandbox(sandbox.id)
            folder.mkdir(mode=0o700, exist_ok=True)
            return DomainSpec(
                sandbox=sandbox.id,
                machine=sandbox.machine,
                cpus=sandbox.cpus,
                memory=sandbox.memory,
                vmgenid=sandbox.vmgenid,
                disks=disks,
                firmware_dir=self.store.firmware_folder(sandbox.machine.firmware),
                kernel=self.store.blob_path(boot.kernel) if boot else None,
                initrd=self.store.blob_path(boot.initrd) if boot else None,
                folder=folder,
                uid=sandbox.uid,
            )

        return await in_thread(gather)
