"""Making and ending sandboxes.

Create and restore are one path: a sandbox whose disks are new overlays, on an image's layer or on
a snapshot's. Until it runs, an operation row stands for it; whoever is killed or cancelled before
that leaves nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stratabox.daemon.config.keys import UID_COUNT
from stratabox.daemon.hypervisor.qemu_host import new_machine, random_mac
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.events import Happening
from stratabox.daemon.lifecycle.guests import Guests
from stratabox.daemon.lifecycle.naming import make_up
from stratabox.daemon.lifecycle.once import Flights, Key
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.threads import in_thread, settle
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import idempotency, images, layers, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import (
    DeniedError,
    InvalidArgumentError,
    NoSpaceError,
)
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId, mint
from stratabox.storage.model.records import GIB, Disk, Layer, Sandbox, Snapshot
from stratabox.storage.model.states import ImageState, LayerState, SandboxState, SnapshotState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NewSandbox:
    """What to make. Exactly one of `image` and `snapshot`; neither: the default image."""

    image: str = ""
    snapshot: str = ""
    name: str = ""
    resources: Resources = field(default_factory=Resources)
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    cold: bool = False
    """Boot from a memory snapshot's disks instead of going on from its memory."""
    data_disks: Sequence[int] = ()
    """GiB each."""
    ready_timeout: float | None = None
    """Seconds to wait until the agent answers; None: do not wait."""


class Sandboxes:
    """The use cases that make and end sandboxes."""

    def __init__(self, world: World, guests: Guests, flights: Flights) -> None:
        self._world = world
        self._guests = guests
        self._flights = flights

    async def create(self, wanted: NewSandbox, key: Key | None = None) -> Sandbox:
        """Make a sandbox and start it; undone when it fails or its last caller goes.

        :raise NotFoundError: IMAGE_NOT_FOUND or SNAPSHOT_NOT_FOUND.
        :raise InvalidArgumentError: INVALID_RESOURCES, INVALID_ARGUMENT, IDEMPOTENCY_MISMATCH.
        :raise FailedError: QEMU_FAILED, GUEST_ENDED.
        :raise UnavailableError: AGENT_UNAVAILABLE, when waiting for the agent took too long.
        """
        _check(wanted)
        return await self._flights.join(
            key, lambda: self._create(wanted, key), name="create", outlives_callers=False
        )

    async def terminate(self, reference: str) -> Sandbox:
        """End the guest and free its disks; the record stays. Idempotent.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        """
        guest, _ = await self._guests.find(reference)
        return await settle(self._world.tasks.spawn(self.end(guest.id), "terminate"))

    async def delete(self, reference: str) -> SandboxId:
        """Terminate where needed, then remove the record.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        """
        guest, _ = await self._guests.find(reference)
        await settle(self._world.tasks.spawn(self._delete(guest.id), "delete sandbox"))
        return guest.id

    async def update(
        self,
        reference: str,
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] | None = None,
    ) -> Sandbox:
        """Change what the caller may change; None leaves a field alone.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise InvalidArgumentError: INVALID_ARGUMENT.
        """
        changes: dict[str, object] = {}
        if name is not None:
            changes["name"] = policy.check_name(name)
        if env is not None:
            policy.check_env(env)
            changes["env"] = dict(env)
        if metadata is not None:
            policy.check_metadata(metadata)
            changes["metadata"] = dict(metadata)
        if tags is not None:
            changes["tags"] = policy.check_tags(tags)
        guest, record = await self._guests.find(reference)
        return await self._world.change_sandbox(guest.id, **changes) if changes else record

    async def end(self, sandbox: SandboxId) -> Sandbox:
        """Bring one sandbox to TERMINATED, from wherever it is."""
        world, guest = self._world, self._guests.of(sandbox)
        guest.hurry.set()
        async with guest.lock:
            guest.hurry.clear()
            record = await guest.record()
            if record.state is SandboxState.TERMINATED:
                return record
            await guest.settle()
            record = await world.change_sandbox(
                sandbox, state=SandboxState.TERMINATING, ready=False
            )
            hit("terminate.row-written")
            await guest.end()
            hit("terminate.stopped")
            await guest.forget_folder()
            record = await world.write(
                lambda tx: sandboxes.change(
                    tx, sandbox, state=SandboxState.TERMINATED, state_reason="",
                    terminated_at=tx.now, disks=(), uid=None,
                )
            )  # fmt: skip
            hit("terminate.disks-released")
            world.bus.publish(Happening.UPDATED, record)
        await world.sweep()
        return record

    async def erase(self, sandbox: SandboxId) -> None:
        """Undo a creation: nothing is left of the sandbox, not even its record."""
        guest = self._guests.of(sandbox)
        async with guest.lock:
            await guest.end()
            await guest.forget_folder()
            record = await self._world.write(lambda tx: _erase_rows(tx, sandbox))
            self._guests.forget(sandbox)
        if record is not None:
            self._world.bus.publish(Happening.DELETED, record)
        await self._world.sweep()

    async def _delete(self, sandbox: SandboxId) -> None:
        record = await self.end(sandbox)

        def write(tx: Transaction) -> None:
            sandboxes.get(tx, sandbox)  # of two deletes at once, one must be told that it is gone
            sandboxes.delete(tx, sandbox)

        await self._world.write(write)
        hit("delete-sandbox.row-removed")
        self._guests.forget(sandbox)
        self._world.bus.publish(Happening.DELETED, record)

    async def _create(self, wanted: NewSandbox, key: Key | None) -> Sandbox:
        world = self._world
        before = await world.read(lambda tx: key.recall(tx) if key else None)
        if before is not None:
            return await self._again(SandboxId(before["sandbox"]), wanted.ready_timeout)
        operation = Operation(kind=Kind.CREATE, sandbox=SandboxId(mint()))
        assert operation.sandbox is not None
        guest = self._guests.of(operation.sandbox)
        try:
            async with guest.lock:
                record, overlays = await world.write(
                    lambda tx: self._write_down(tx, wanted, operation, key)
                )
                hit("create.row-written")
                world.bus.publish(Happening.CREATED, record)
                await in_thread(world.store.make_overlays, overlays)
                hit("create.overlays-made")
                memory = await self._memory_of(record)
                record = await guest.boot(
                    record, lambda tx: operations.end(tx, operation.id), memory
                )
            if wanted.ready_timeout is None:
                return record
            return await guest.wait_ready(wanted.ready_timeout)
        except BaseException:
            await settle(self.erase(operation.sandbox))
            raise

    async def _again(self, sandbox: SandboxId, ready_timeout: float | None) -> Sandbox:
        """The answer to a key that was used before."""
        record = await self._world.read(lambda tx: sandboxes.get(tx, sandbox))
        guest = self._guests.of(sandbox)
        if ready_timeout is None or guest.domain is None:
            return record
        return await guest.wait_ready(ready_timeout)

    async def _memory_of(self, record: Sandbox) -> Snapshot | None:
        """The snapshot whose memory a new sandbox goes on from."""
        origin = record.ram_origin
        if origin is None:
            return None
        return await self._world.read(lambda tx: snapshots.get(tx, SnapshotId(origin)))

    def _write_down(
        self, tx: Transaction, wanted: NewSandbox, operation: Operation, key: Key | None
    ) -> tuple[Sandbox, list[NewOverlay]]:
        """Everything that a new sandbox is, in the catalog, before any file is made."""
        assert operation.sandbox is not None
        if wanted.snapshot:
            draft, bases = self._from_snapshot(tx, wanted, operation.sandbox)
        else:
            draft, bases = self._from_image(tx, wanted, operation.sandbox)
        uid = None
        if self._world.qemu_uids:
            uid = sandboxes.free_uid(tx, self._world.config.uid_base, UID_COUNT)
            if uid is None:
                raise NoSpaceError(
                    f"all {UID_COUNT} host uids for guests are taken: terminate some sandboxes",
                    reason="UIDS_EXHAUSTED",
                )
        overlays = []
        for disk, base in zip(draft.disks, bases, strict=True):
            overlays.append(NewOverlay(disk.layer, base, disk.size))
            layers.insert(
                tx,
                Layer(
                    id=disk.layer,
                    parent=base,
                    state=LayerState.ACTIVE,
                    size=disk.size,
                    created_at=tx.now,
                ),
            )
        operations.begin(tx, operation)
        if key:
            key.remember(tx, sandbox=operation.sandbox)
        return sandboxes.insert(tx, replace(draft, uid=uid)), overlays

    def _from_image(
        self, tx: Transaction, wanted: NewSandbox, sandbox: SandboxId
    ) -> tuple[Sandbox, list[LayerId | None]]:
        config = self._world.config
        reference = wanted.image or config.default_image
        if not reference:
            raise InvalidArgumentError(
                "no image is named and the configuration has no default_image: name one"
                " ('stratabox image list' shows them)",
                field="image",
            )
        image = images.get(tx, images.resolve(tx, reference))
        if image.state is not ImageState.READY or image.layer is None:
            raise DeniedError(
                f"image {image.name!r} is {image.state}", reason="IMAGE_NOT_READY", image=image.id
            )
        storage = wanted.resources.storage
        if storage is None:
            storage = policy.default_storage(image, config.default_storage)
        policy.check_storage_holds(storage, image.size, f"image {image.name!r}")
        disks = [_disk(0, storage * GIB)]
        disks += [_disk(number, size * GIB) for number, size in enumerate(wanted.data_disks, 1)]
        bases: list[LayerId | None] = [image.layer, *(None for _ in wanted.data_disks)]
        machine = new_machine(
            self._world.qemu,
            self._world.accelerator,
            firmware=self._world.firmware,
            kernel_boot=image.kernel_boot,
            mac=random_mac(),
        )
        return Sandbox(
            id=sandbox,
            name=wanted.name or make_up(),
            state=SandboxState.CREATING,
            image=image.id,
            image_name=image.name,
            cpus=wanted.resources.cpus or config.default_cpus,
            memory=wanted.resources.memory or config.default_memory,
            storage=storage,
            machine=machine,
            disks=tuple(disks),
            env=dict(wanted.env),
            metadata=dict(wanted.metadata),
            tags=tuple(dict.fromkeys(wanted.tags)),
            vmgenid=mint(),
            created_at=tx.now,
            updated_at=tx.now,
        ), bases

    def _from_snapshot(
        self, tx: Transaction, wanted: NewSandbox, sandbox: SandboxId
    ) -> tuple[Sandbox, list[LayerId | None]]:
        snapshot = snapshots.get(tx, snapshots.resolve(tx, wanted.snapshot))
        require_ready(snapshot)
        if wanted.data_disks:
            raise InvalidArgumentError(
                "a snapshot brings its own data disks; none can be added", field="data_disks"
            )
        root = snapshot.disks[0].size
        storage = wanted.resources.storage
        if storage is None:
            storage = policy.gib(root)
        policy.check_storage_holds(storage, root, f"snapshot {snapshot.name!r}")
        disks = tuple(
            Disk(
                index=disk.index,
                layer=LayerId(mint()),
                size=storage * GIB if disk.index == 0 else disk.size,
                serial=disk.serial,
            )
            for disk in snapshot.disks
        )
        machine = snapshot.machine
        if snapshot.ram is None or wanted.cold:
            machine = replace(
                machine,
                mac=random_mac(),
                accelerator=self._world.accelerator.name,
                cpu_model=self._world.accelerator.cpu_model,
            )
        else:
            _require_same_size(wanted.resources, snapshot)
        return Sandbox(
            id=sandbox,
            name=wanted.name or make_up(),
            state=SandboxState.CREATING,
            image=snapshot.image,
            image_name=snapshot.image_name,
            source_snapshot=snapshot.id,
            cpus=wanted.resources.cpus or snapshot.cpus,
            memory=wanted.resources.memory or snapshot.memory,
            storage=storage,
            machine=machine,
            disks=disks,
            env={**snapshot.env, **wanted.env},
            metadata=dict(wanted.metadata),
            tags=tuple(dict.fromkeys(wanted.tags)),
            vmgenid=mint(),
            ram_origin=snapshot.id if snapshot.ram and not wanted.cold else None,
            created_at=tx.now,
            updated_at=tx.now,
        ), [disk.layer for disk in snapshot.disks]


def require_ready(snapshot: Snapshot) -> None:
    """:raise DeniedError: SNAPSHOT_NOT_READY, when it cannot be restored."""
    if snapshot.state is not SnapshotState.READY:
        because = f": {snapshot.failure_reason}" if snapshot.failure_reason else ""
        raise DeniedError(
            f"snapshot {snapshot.name!r} is {snapshot.state}{because}",
            reason="SNAPSHOT_NOT_READY",
            snapshot=snapshot.id,
            state=snapshot.state,
        )


def _require_same_size(wanted: Resources, snapshot: Snapshot) -> None:
    """:raise InvalidArgumentError: RESOURCES_FIXED, for a size that the saved memory rules out."""
    root = policy.gib(snapshot.disks[0].size)
    for name, value, fixed in (
        ("cpus", wanted.cpus, snapshot.cpus),
        ("memory", wanted.memory, snapshot.memory),
        ("storage", wanted.storage, root),
    ):
        if value is not None and value != fixed:
            raise InvalidArgumentError(
                f"{name} cannot be {value}: a memory snapshot goes on with the {fixed} that it was"
                " taken with. Restore it cold (--cold) to boot its disks with another size",
                reason="RESOURCES_FIXED",
                field=name,
                fixed=fixed,
            )


def _disk(index: int, size: int) -> Disk:
    return Disk(index=index, layer=LayerId(mint()), size=size, serial=f"disk{index}")


def _check(wanted: NewSandbox) -> None:
    if wanted.image and wanted.snapshot:
        raise InvalidArgumentError("name an image or a snapshot, not both", field="snapshot")
    if wanted.name:
        policy.check_name(wanted.name)
    policy.check_resources(wanted.resources)
    policy.check_env(wanted.env)
    policy.check_metadata(wanted.metadata)
    policy.check_tags(wanted.tags)
    policy.check_data_disks(wanted.data_disks)


def _erase_rows(tx: Transaction, sandbox: SandboxId) -> Sandbox | None:
    for operation in operations.unfinished(tx):
        if operation.kind is Kind.CREATE and operation.sandbox == sandbox:
            operations.end(tx, operation.id)
    idempotency.forget_outcome(tx, "sandbox", sandbox)
    if tx.row("SELECT id FROM sandboxes WHERE id = ?", (sandbox,)) is None:
        return None
    record = sandboxes.get(tx, sandbox)
    sandboxes.delete(tx, sandbox)
    return record
