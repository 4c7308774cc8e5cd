"""At start: make the catalog, the files and the running domains agree.

This is also the crash recovery. The catalog says what was promised and, in its operations, what
was under way; the launcher says what runs; a running QEMU's block graph says what it writes to.

1. A domain for each RUNNING or PAUSED record is taken over; where there is none, the record says
   why. Domains that no such record has are ended.
2. Operations are finished or undone: a snapshot whose transaction happened is finished, one whose
   did not is FAILED; creations are undone; reverts go on; clones are undone; a pause to disk that
   was not written down yet is undone, and its guest, which stood still meanwhile, goes on by 1.
3. What was being ended is ended. Files without a row go where an operation of 2 explains them, and
   to the quarantine otherwise. Rows without a file are written down as losses.
"""

from __future__ import annotations

import logging
from pathlib import Path

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainHandle
from stratabox.daemon.lifecycle.capture import Outcome, Switch, fail, finish, switches_of
from stratabox.daemon.lifecycle.clones import Clones
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_executor, in_thread
from stratabox.daemon.lifecycle.images import Images
from stratabox.daemon.lifecycle.reverts import Reverts
from stratabox.daemon.lifecycle.running import parking, reasons
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.running.thawing import thaw
from stratabox.daemon.lifecycle.sandboxes import Sandboxes
from stratabox.daemon.lifecycle.upkeep import salvage
from stratabox.daemon.lifecycle.volumes import sealing
from stratabox.daemon.lifecycle.volumes.volumes import discard_unfinished
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import images, losses, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.files.stock import under_way
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import (
    CorruptError,
    FailedError,
    NotFoundError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import LayerId
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import ImageState, Level, SandboxState

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Reconcile:
    """Runs once, before the API opens."""

    def __init__(
        self,
        world: World,
        guests: Guests,
        sandboxes_: Sandboxes,
        images_: Images,
        clones: Clones,
        reverts: Reverts,
    ) -> None:
        self._world = world
        self._guests = guests
        self._sandboxes = sandboxes_
        self._images = images_
        self._clones = clones
        self._reverts = reverts
        self._restored = False
        """A backup of the catalog was put back."""

    async def run(self) -> None:
        """Make all agree."""
        world = self._world
        self._restored = await in_executor(world.worker, lambda: world.catalog.was_restored)
        rebooted = await self._note_boot()
        unfinished = await world.read(operations.unfinished)
        explained = await world.read(under_way)  # before it is settled, and its rows are gone
        handles = {handle.sandbox: handle for handle in await world.launcher.list()}
        for record in await world.read(sandboxes.everything):
            await self._sandbox(record, handles.pop(record.id, None), rebooted=rebooted)
        for handle in handles.values():
            log.warning("ending domain %s, which no sandbox has", handle.sandbox)
            await world.launcher.stop(handle)
        # Clones last: what they undo is settled then, their snapshot above all.
        for operation in sorted(unfinished, key=lambda each: each.kind is Kind.CLONE):
            await self._operation(operation)
        for record in await world.read(sandboxes.everything):
            if record.state is SandboxState.TERMINATING:
                await self._sandboxes.end(record.id)
        for image in await world.read(images.everything):
            if image.state is not ImageState.READY:
                await self._images.discard(image.id)
        await discard_unfinished(world)
        await world.sweep(whole=True)
        found = await in_executor(
            world.worker,
            lambda: world.store.sweep_strays(
                world.catalog, explained=explained, keep=world.firmware.values()
            ),
        )
        for changed in await world.write(
            lambda tx: losses.note(tx, found.missing_layers, found.missing_rams)
        ):
            world.bus.publish(Happening.UPDATED, changed)
        if self._restored:
            await in_executor(world.worker, world.catalog.note_settled)

    async def _note_boot(self) -> bool:
        """Tell whether the host was booted since a daemon last ran here."""
        now = (await in_thread(BOOT_ID.read_text)).strip()

        def write(tx: Transaction) -> str:
            row = tx.row("SELECT boot_id FROM store")
            assert row is not None
            if row["boot_id"] != now:  # a full disk takes no writes but those that must be
                tx.execute("UPDATE store SET boot_id = ?", (now,))
            return str(row["boot_id"])

        before = await self._world.write(write)
        return before not in ("", now)

    async def _sandbox(
        self, record: Sandbox, handle: DomainHandle | None, *, rebooted: bool
    ) -> None:
        world = self._world
        if self._restored:
            record = await salvage.prepare(world, record, runs=handle is not None)
        if handle is None:
            if record.has_process:
                reason = (
                    "the host was restarted" if rebooted
                    else "its QEMU ended while the daemon was away"
                )  # fmt: skip
                await world.change_sandbox(
                    record.id, state=SandboxState.STOPPED, state_reason=reason, ready=False
                )
            return
        if not record.has_process:
            # Started but never promised, or promised to be ended, as by a pause to disk: the
            # record rules.
            await world.launcher.stop(handle)
            return
        guest = self._guests.of(record.id)
        try:
            domain = await guest.adopt(handle, ready=record.answers)
            status = await self._status(record, domain)
            if self._restored:
                await salvage.agree_on_disks(world, record, domain)
        except (UnavailableError, FailedError, CorruptError) as error:
            log.error("sandbox %s: its QEMU cannot be controlled: %s", record.id, error)
            await guest.end()
            await world.launcher.stop(handle)
            await world.change_sandbox(
                record.id,
                state=SandboxState.FAILED,
                state_reason=f"its QEMU could not be taken over and was ended: {error.message}",
                ready=False,
            )
            return
        await self._agree_on_pause(record, status)

    async def _status(self, record: Sandbox, domain: Domain) -> str:
        """What the domain does, once a pause that was never promised has ended.

        :raise FailedError: when QEMU has stopped its guest for good.
        """
        status = await domain.status()
        if status in ("guest-panicked", "internal-error"):
            raise FailedError(f"its guest was stopped for good ({status})")
        if status in ("paused", "prelaunch") and record.state is SandboxState.RUNNING:
            await domain.cont()
        return status

    async def _agree_on_pause(self, record: Sandbox, status: str) -> None:
        """Killed between the act and the record; or nobody heard that QEMU stopped by itself."""
        change = self._world.change_sandbox
        if status == "io-error" and record.state is SandboxState.RUNNING:
            await change(record.id, state=SandboxState.PAUSED, state_reason=reasons.PAUSED_FULL)
        elif status == "running" and record.state is SandboxState.PAUSED:
            await change(record.id, state=SandboxState.RUNNING, state_reason="")
        elif record.state is SandboxState.PAUSED and not record.state_reason:
            await change(record.id, state_reason=reasons.PAUSED_BY_USER)

    async def _operation(self, operation: Operation) -> None:
        log.info("finishing or undoing %s %s", operation.kind, operation.id)
        try:
            match operation.kind:
                case Kind.CREATE:
                    assert operation.sandbox is not None
                    await self._sandboxes.erase(operation.sandbox)
                case Kind.SNAPSHOT:
                    await self._snapshot(operation)
                case Kind.REVERT:
                    await self._revert(operation)
                case Kind.CLONE:
                    await self._clones.undo(operation)
                case Kind.IMPORT:  # its files are strays, which that row has explained
                    await self._world.write(lambda tx: operations.end(tx, operation.id))
                case Kind.PARK:
                    await parking.undo(self._world, operation)
                case Kind.VOLUME:
                    await sealing.undo(self._world, self._guests, operation)
        except (StrataboxError, OSError) as error:
            # The row stays, and the next start tries again; the rest must not wait for it.
            log.error("%s %s could not be settled: %s", operation.kind, operation.id, error)

    # Snapshots

    async def _snapshot(self, operation: Operation) -> None:
        assert operation.sandbox is not None
        assert operation.snapshot is not None
        snapshot_id, sandbox_id = operation.snapshot, operation.sandbox

        def look(tx: Transaction) -> Snapshot | None:
            try:
                return snapshots.get(tx, snapshot_id)
            except NotFoundError:
                operations.end(tx, operation.id)
                return None

        snapshot = await self._world.read(look)
        if snapshot is None:
            return
        guest = self._guests.of(sandbox_id)
        async with guest.lock:
            try:
                await self._settle_snapshot(guest, snapshot, operation)
            except (StrataboxError, OSError):
                # Until it is settled nothing may trust the record's disks.
                guest.owe(lambda: self._settle_snapshot(guest, snapshot, operation))
                raise

    async def _settle_snapshot(
        self, guest: Guest, snapshot: Snapshot, operation: Operation
    ) -> None:
        thawed = await self._thaw(guest, operation)
        steps = switches_of(operation.payload)
        if not await self._was_switched(guest, steps):
            await self._drop(guest, steps)
            await in_thread(self._world.store.remove_ram, snapshot.id)
            reason = "the daemon was stopped before it was taken"
            await fail(self._world, snapshot, operation, reason)
            return
        outcome = _judge(guest, operation, thawed)
        if isinstance(outcome, StrataboxError):
            await in_thread(self._world.store.remove_ram, snapshot.id)
        await finish(self._world, guest, snapshot, operation, steps, outcome)

    async def _thaw(self, guest: Guest, operation: Operation) -> int | None:
        """Undo a freeze that a killed daemon left; how many file systems it thawed."""
        if not operation.payload.get("freezing") or guest.domain is None:
            return None
        return await thaw(guest.require_agent())

    async def _was_switched(self, guest: Guest, steps: list[Switch]) -> bool:
        if not steps or _is_unmade(self._world, steps):
            return False
        if guest.domain is None:
            # Nobody can be asked any more. If the transaction happened, the new overlays hold what
            # was written since; if it did not, they are empty. On top of the old layers they are
            # right either way.
            return True
        active = await guest.domain.disks.active_layers()
        return all(
            active.get(step.index) == _chain_layer(self._world, step.new).node for step in steps
        )

    async def _drop(self, guest: Guest, steps: list[Switch]) -> None:
        if guest.domain is not None and steps:
            await guest.domain.disks.drop([_chain_layer(self._world, step.new) for step in steps])
        await in_thread(self._world.store.remove_overlays, [step.new for step in steps])

    # Reverts

    async def _revert(self, operation: Operation) -> None:
        assert operation.sandbox is not None
        world, payload = self._world, operation.payload
        guest = self._guests.of(operation.sandbox)
        async with guest.lock:
            record = await guest.record()
            if guest.domain is not None:
                # It was killed before the old domain was ended, or after the new one ran.
                await world.write(lambda tx: operations.end(tx, operation.id))
                return
            if not payload.get("switched"):
                overlays = [
                    NewOverlay(entry["new"], entry["old"], entry["size"])
                    for entry in payload["disks"]
                ]
                await in_thread(world.store.remove_overlays, [o.id for o in overlays])
                await in_thread(world.store.make_overlays, overlays)
                record = await self._reverts.switch_disks(guest, operation)
            if payload["boots"]:
                await self._reverts.go_on(guest, record, operation)


def _is_unmade(world: World, steps: list[Switch]) -> bool:
    """Some overlay's file was never made: then nothing can have been switched to it."""
    return not all(world.store.layout.layer(step.new).exists() for step in steps)


def _judge(guest: Guest, operation: Operation, thawed: int | None) -> Outcome | StrataboxError:
    """What a snapshot achieved whose transaction happened but whose record was never finished."""
    if operation.payload.get("running") and guest.domain is None:
        return FailedError(
            "its QEMU ended while the daemon was away: at which instant cannot be told any more"
        )
    level = Level(operation.payload["level"])
    frozen = operation.payload.get("frozen", 0)
    if level is Level.MEMORY:
        return FailedError("the daemon was stopped before its memory was saved")
    if level is Level.CRASH or not operation.payload.get("running"):
        return Outcome(consistency=level, frozen=0, stall=None)
    if frozen and thawed == frozen:
        # Frozen before the transaction and still frozen now: it was frozen all the time between.
        return Outcome(consistency=level, frozen=frozen, stall=None)
    return FailedError(
        "the daemon was stopped while it was taken, and it cannot be shown any more that the"
        " file systems were frozen"
    )


def _chain_layer(world: World, layer: LayerId) -> ChainLayer:
    return ChainLayer(id=layer, path=world.store.layout.layer(layer))
