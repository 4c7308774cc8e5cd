"""Making and ending sandboxes.

Create and restore are one path, whatever the disks stand on (`creation`). Until a sandbox runs, an
operation row stands for it; whoever is killed or cancelled before that leaves nothing.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from dataclasses import replace

from stratabox.daemon.lifecycle import creation
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.once import Flights, Key
from stratabox.daemon.lifecycle.common.threads import in_thread, settle
from stratabox.daemon.lifecycle.creation import NewSandbox, identity_of, want_of
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.memory.spares import Spare
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.seeding import wishes
from stratabox.daemon.lifecycle.seeding.staging import seeded
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import idempotency, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.ids import SandboxId, SnapshotId, mint
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)


class Sandboxes:
    """The use cases that make and end sandboxes."""

    def __init__(self, world: World, guests: Guests, flights: Flights) -> None:
        self._world = world
        self._guests = guests
        self._flights = flights

    async def create(self, wanted: NewSandbox, key: Key | None = None) -> Sandbox:
        """Make a sandbox and start it; undone when it fails or its last caller goes.

        :raise NotFoundError: IMAGE_NOT_FOUND, SNAPSHOT_NOT_FOUND or VOLUME_NOT_FOUND.
        :raise InvalidArgumentError: INVALID_RESOURCES, INVALID_ARGUMENT, IDEMPOTENCY_MISMATCH.
        :raise DeniedError: NO_CLOUD_INIT, VOLUME_IN_USE, VOLUME_NOT_READY, VOLUME_NOT_CLEAN,
            VOLUMES_UNSUPPORTED.
        :raise NoSpaceError: ADMISSION_REFUSED, NO_SPACE.
        :raise FailedError: QEMU_FAILED, GUEST_ENDED, VOLUME_MOUNT_FAILED, VOLUME_GROW_FAILED,
            CLOUD_INIT_FAILED.
        :raise UnavailableError: AGENT_UNAVAILABLE, when waiting for the agent took too long.
        """
        creation.check(wanted)
        await in_thread(wishes.check_user_data, wanted.user_data)
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

    async def end(self, sandbox: SandboxId) -> Sandbox:
        """Bring one sandbox to TERMINATED, from wherever it is."""
        world, guest = self._world, self._guests.of(sandbox)
        async with guest.lock.in_a_hurry():
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
        await world.leave(sandbox)
        await world.sweep()
        await world.drop_seed(record.machine.seed)
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
            await self._world.drop_seed(record.machine.seed)
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
        if wanted.volumes:
            wishes = claims.check(wanted.volumes)
            wishes = await world.read(lambda tx: claims.resolved(tx, wishes))
            wanted = replace(wanted, volumes=wishes)
        with world.rush.hold():
            spare = await self._find_spare(wanted)
            return await self._make(wanted, key, spare)

    async def _make(self, wanted: NewSandbox, key: Key | None, spare: Spare | None) -> Sandbox:
        """Make it, of a spare where there is one; undone when this raises or is cancelled."""
        world = self._world
        sandbox = spare.draft.id if spare else SandboxId(mint())
        operation = Operation(kind=Kind.CREATE, sandbox=sandbox)
        guest = self._guests.of(sandbox)
        async with seeded(world, wanted, sandbox) as wanted, AsyncExitStack() as undo:
            what = f"the undoing of sandbox {sandbox}"
            undo.push_async_callback(
                lambda: settle(world.surely(lambda: self.erase(sandbox), what))
            )
            if spare:
                undo.push_async_callback(spare.end)
            async with guest.lock:
                try:
                    async with world.volume_locks.hold(*(each.volume for each in wanted.volumes)):
                        record, overlays = await world.write(
                            lambda tx: creation.write_down(world, tx, wanted, operation, key, spare)
                        )
                except StrataboxError:
                    # Refused: nothing was written, and the spare is as good as before.
                    undo.pop_all()
                    self._guests.forget(sandbox)
                    if spare:
                        world.spares.put(spare)
                    raise
                hit("create.row-written")
                world.bus.publish(Happening.CREATED, record)
                if spare:
                    ids = [overlay.id for overlay in overlays]
                    await in_thread(world.store.place_overlays, ids, spare.folder)
                else:
                    await in_thread(world.store.make_overlays, overlays)
                hit("create.overlays-made")
                memory = await self._memory_of(record)
                async with AsyncExitStack() as verified:
                    if memory is not None and wanted.verify:
                        await verified.enter_async_context(world.memories.use_verified(memory))
                    record = await guest.boot(
                        record,
                        lambda tx: operations.end(tx, operation.id),
                        memory,
                        spare,
                        identity=identity_of(wanted),
                        paused=wanted.paused,
                    )
            world.chains_changed.set()
            if memory is not None and record.source_snapshot is not None:
                world.spares.note(want_of(wanted, record.source_snapshot))
            if wanted.ready_timeout is not None and not wanted.paused:
                record = await guest.wait_ready(wanted.ready_timeout)
            undo.pop_all()
            return record

    async def _find_spare(self, wanted: NewSandbox) -> Spare | None:
        """One that waits for just this; the caller ends it or gives it back."""
        spares = self._world.spares
        as_it_is = wanted.resources == Resources() and not (
            wanted.cold or wanted.data_disks or wanted.verify
        )
        if not (len(spares) and wanted.snapshot and as_it_is):
            return None

        def look(tx: Transaction) -> SnapshotId | None:
            try:
                return snapshots.resolve(tx, wanted.snapshot)
            except StrataboxError:
                return None  # for the transaction that writes to say

        snapshot = await self._world.read(look)
        return await spares.take(want_of(wanted, snapshot)) if snapshot else None

    async def _again(self, sandbox: SandboxId, ready_timeout: float | None) -> Sandbox:
        """The answer to a key that was used before."""
        record = await self._world.read(lambda tx: sandboxes.get(tx, sandbox))
        guest = self._guests.of(sandbox)
        held = record.state is SandboxState.PAUSED
        if ready_timeout is None or guest.domain is None or held:
            return record
        return await guest.wait_ready(ready_timeout)

    async def _memory_of(self, record: Sandbox) -> Origin | None:
        """The saved memory that a new sandbox goes on from."""
        origin = record.ram_origin
        if origin is None:
            return None
        return Origin.of(await self._world.read(lambda tx: snapshots.get(tx, SnapshotId(origin))))


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
