"""What all use cases share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from stratabox.daemon.config import Config
from stratabox.daemon.hypervisor.accelerator import Accelerator
from stratabox.daemon.hypervisor.console import Limits as ConsoleLimits
from stratabox.daemon.hypervisor.housing import NOWHERE, Housing
from stratabox.daemon.hypervisor.machine import (
    ChainLayer,
    DomainDisk,
    DomainSpec,
    DomainVolume,
    Launcher,
)
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.daemon.lifecycle.admission import Admission
from stratabox.daemon.lifecycle.chains.opening import Opening
from stratabox.daemon.lifecycle.common.events import Bus, Happening
from stratabox.daemon.lifecycle.common.locks import Locks
from stratabox.daemon.lifecycle.common.threads import (
    Tasks,
    carried_through,
    in_executor,
    in_thread,
    settle,
)
from stratabox.daemon.lifecycle.memory.memories import Memories
from stratabox.daemon.lifecycle.memory.rush import Rush
from stratabox.daemon.lifecycle.memory.spares import Spares
from stratabox.daemon.lifecycle.volumes import places
from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.catalog.known_chains import KnownChains
from stratabox.storage.files import reserve
from stratabox.storage.files.store import NewOverlay, Store
from stratabox.storage.model.errors import (
    CorruptError,
    NoSpaceError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, Sha256, SnapshotId
from stratabox.storage.model.records import Image, Job, Mount, Sandbox, Snapshot, Volume
from stratabox.storage.model.workspaces import acting

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
    admission: Admission
    spares: Spares
    rush: Rush = field(default_factory=Rush)
    bus: Bus = field(default_factory=Bus)
    tasks: Tasks = field(default_factory=Tasks)
    volume_locks: Locks = field(default_factory=Locks)
    """Of volumes; whoever holds a guest's lock too has taken that first."""
    known_chains: KnownChains = field(default_factory=KnownChains)
    swept: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after every sweep, for who merges what stays."""
    chains_changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when layers have come or gone, for who keeps chains short."""
    opening: Opening = field(default_factory=Opening)
    """Held by whoever reads a chain in the catalog and then opens its files."""
    owed: list[tuple[Callable[[], Awaitable[object]], str]] = field(default_factory=list)
    """What could not be undone, ended or written down yet, see `surely`."""
    when_over: list[Callable[[SandboxId], Awaitable[None]]] = field(default_factory=list)
    """Called with each sandbox that is over, before whoever ended it is answered."""
    housing: Housing = NOWHERE
    """In what control groups the processes of guests are."""
    backing_up: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who makes a backup of the catalog."""
    worker: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="catalog")
    )

    async def write(self, change: Callable[[Transaction], T]) -> T:
        """Run one catalog transaction in its thread; durable when this returns.

        It is for the workspace that this task works in. Cancelled or not, the transaction has ended
        when this does; one that was committed returns, and the cancellation comes at the next step.
        """
        return await self._transact(change, carried_through)

    async def read(self, look: Callable[[Transaction], T]) -> T:
        """The same, for transactions that change nothing; cancelled, it hears of that."""
        return await self._transact(look, settle)

    async def _transact(
        self,
        change: Callable[[Transaction], T],
        wait: Callable[[Awaitable[T]], Coroutine[Any, Any, T]],
    ) -> T:
        run = self._transaction(change)
        while True:
            try:
                return await wait(self._in_worker(run))
            except NoSpaceError as error:
                # Whoever wants to free something must be able to write that down.
                if error.reason != NoSpaceError.default_reason or not await in_thread(
                    reserve.release, self.store.layout.reserve
                ):
                    raise
                log.warning("the disk is full: some of its reserve is given up")

    def _in_worker(self, run: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self.worker, run)

    def _transaction(self, change: Callable[[Transaction], T]) -> Callable[[], T]:
        workspace = acting.get()
        loop, caller = asyncio.get_running_loop(), copy_context()

        def run() -> T:
            with self.catalog.transaction(workspace) as tx:
                result = change(tx)
            if tx.noted:
                # From here: whoever waits may be cancelled, and it has happened all the same.
                loop.call_soon_threadsafe(self._tell, tx.noted, context=caller)
            return result

        return run

    def _tell(self, noted: Sequence[tuple[str, str, object]]) -> None:
        for what, owner, record in noted:
            assert isinstance(record, Volume | Job)
            self.bus.publish(Happening(what), record, workspace=owner)

    async def surely(
        self,
        step: Callable[[], Awaitable[object]],
        what: str,
        *,
        later: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        """Do what undoes or ends something, or writes down what has happened by itself; where the
        catalog cannot be written, later, by itself.

        :param step: can be done again when it failed half-way.
        :param what: for the log.
        :param later: what is done then, where the step needs a lock that its caller holds.
        """
        try:
            await step()
        except (NoSpaceError, UnavailableError) as error:
            log.error("%s waits until the catalog can be written: %s", what, error.message)
            self.owed.append((later or step, what))

    async def pay(self) -> None:
        """Try again what `surely` could not do."""
        for _ in range(len(self.owed)):
            await self.surely(*self.owed.pop(0))

    async def leave(self, sandbox: SandboxId) -> None:
        """Tell all who keep something for a sandbox that it is over, and wait until they have
        let go of it.
        """
        for each in self.when_over:
            await each(sandbox)

    @property
    def console_limits(self) -> ConsoleLimits:
        """How much guests may write to their consoles, and how much of it is kept."""
        return ConsoleLimits(rate=self.config.console_rate, log=self.config.console_log)

    def taken(self, layer: LayerId) -> int:
        """Bytes that a layer's file takes on the disk now."""
        return self.store.bytes_of([layer])

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

    async def sweep(self, *, whole: bool = False) -> int:
        """Remove the layers that nothing needs; returns the bytes that came free.

        :param whole: look at every layer, not only at those that have lost something.

        In the catalog's thread, so that two sweeps never meet. It never fails its caller, who has
        done what was asked: what could not be removed is removed the next time.
        """
        try:
            return await in_executor(
                self.worker, lambda: self.store.sweep(self.catalog, whole=whole)
            )
        except (OSError, StrataboxError) as error:
            log.error("garbage stays until the next sweep: %s", error)
            return 0
        finally:
            self.swept.set()
            self.chains_changed.set()

    async def sweep_blobs(self, busy: Collection[object]) -> None:
        """Remove the blobs that nothing needs, unless something is busy that may store some whose
        record is not written yet.

        Snapshots are looked at in portions. One that is taken meanwhile needs what its sandbox
        needed before it, or its image.

        :param busy: what is, as it changes. Looked at in the catalog's thread, in which everything
            that is busy reads or writes before it stores a blob: so that comes before or after.
        """
        wanted: set[str] = set()
        after: int | None = 0
        while after is not None:
            some, after = await self.read(partial(snapshots.some_blobs, after=after))
            wanted |= some
        keep = self.firmware.values()

        def sweep() -> None:
            if not busy:
                self.store.sweep_blobs(self.catalog, keep, of_snapshots=wanted)

        await in_executor(self.worker, sweep)

    async def drop_seed(self, seed: Sha256 | None) -> None:
        """Remove the seed of a machine that is gone, once nothing else needs it.

        It never fails its caller: what could not be removed is at the next start.
        """
        if seed is None:
            return
        try:
            await in_executor(self.worker, lambda: self.store.drop_seed(self.catalog, seed))
        except (OSError, StrataboxError) as error:
            log.error("seed %s stays until the next start: %s", seed, error)

    async def domain_spec(
        self,
        sandbox: Sandbox,
        staged: Sequence[NewOverlay] = (),
        strange: Sequence[Mount] | None = None,
    ) -> DomainSpec:
        """What a launcher needs to start this sandbox.

        :param staged: its overlays that lie in its own folder, and in no catalog.
        :param strange: volumes that its saved memory knows and that it does not have: it gets
            stand-ins for them, and its own ones later. None: it gets its own.
        :raise CorruptError: LAYER_MISSING or BLOB_MISSING, when a file is not there.
        """
        folder = self.store.layout.sandbox(sandbox.id)
        below = {overlay.id: overlay.parent for overlay in staged}

        def chain(tx: Transaction, layer: LayerId) -> list[ChainLayer]:
            found, parent = [], below.get(layer)
            if layer in below:
                found.append(ChainLayer(id=layer, path=self.store.layout.staged(folder, layer)))
            if parent is not None or not found:
                found += [
                    ChainLayer(id=each.id, path=self.store.layout.layer(each.id))
                    for each in layers.chain(tx, parent or layer)
                ]
            return found

        def look(tx: Transaction) -> tuple[list[list[ChainLayer]], list[DomainVolume]]:
            chains = [chain(tx, disk.layer) for disk in sandbox.disks]
            if strange is not None:
                return chains, [places.stand_in(mount) for mount in strange]
            return chains, [places.plugged(tx, self.store.layout, each) for each in sandbox.volumes]

        chains, plugged = await self.read(look)

        def gather() -> DomainSpec:
            disks = []
            for disk, chain in zip(sandbox.disks, chains, strict=True):
                for layer in chain:
                    if not layer.path.exists():
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
                        chain=chain,
                    )
                )
            boot = sandbox.machine.kernel_boot
            folder.mkdir(mode=0o700, exist_ok=True)
            return DomainSpec(
                sandbox=sandbox.id,
                machine=replace(sandbox.machine, qemu_version=self.qemu.version_text),
                cpus=sandbox.cpus,
                memory=sandbox.memory,
                vmgenid=sandbox.vmgenid,
                disks=disks,
                firmware_dir=self.store.firmware_folder(sandbox.machine.firmware),
                kernel=self.store.blob_path(boot.kernel) if boot else None,
                initrd=self.store.blob_path(boot.initrd) if boot else None,
                folder=folder,
                uid=sandbox.uid,
                volumes=plugged,
                seed=self.store.blob_path(seed) if (seed := sandbox.machine.seed) else None,
                title=sandbox.name,
            )

        return await in_thread(gather)
