"""Revert: a sandbox goes back onto one of its own snapshots and keeps its id."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.creation import require_ready
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.running import wiring
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.snapshots import NewSnapshot, Snapshots
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import DeniedError, StrataboxError
from stratabox.storage.model.ids import LayerId, SnapshotId, mint
from stratabox.storage.model.records import Disk, Layer, Mount, Sandbox, Snapshot
from stratabox.storage.model.states import Identity, LayerState, Level, SandboxState

SAFETY_LIFE = timedelta(hours=24)


@dataclass(frozen=True, kw_only=True)
class Reverted:
    """The sandbox as it is now, and what it was before."""

    sandbox: Sandbox
    safety_snapshot: Snapshot


class Reverts:
    """Puts sandboxes back."""

    def __init__(self, world: World, guests: Guests, snapshots_: Snapshots) -> None:
        self._world = world
        self._guests = guests
        self._snapshots = snapshots_

    async def revert(
        self,
        reference: str,
        snapshot: str,
        ready_timeout: float | None,
        identity: Identity | None = None,
    ) -> Reverted:
        """Put a sandbox back onto one of its snapshots, after a safety snapshot.

        From a memory snapshot it goes on at that instant. Otherwise a stopped sandbox stays
        stopped, and any other boots from the snapshot's disks.

        :param ready_timeout: seconds to wait until the agent answers; None: do not wait.
        :param identity: who it is from now on; None: who the snapshot says.
        :raise NotFoundError: SANDBOX_NOT_FOUND or SNAPSHOT_NOT_FOUND.
        :raise DeniedError: SNAPSHOT_NOT_READY, NOT_ITS_SNAPSHOT, INVALID_STATE.
        :raise NoSpaceError: ADMISSION_REFUSED, before anything is done.
        :raise FailedError: SNAPSHOT_FAILED, when the safety snapshot failed; nothing is changed.
        """
        guest, _ = await self._guests.find(reference)
        done = await settle(
            self._world.tasks.spawn(self._revert(guest, snapshot, identity), f"revert {guest.id}")
        )
        if ready_timeout is None or done.sandbox.state is not SandboxState.RUNNING:
            return done
        return replace(done, sandbox=await guest.wait_ready(ready_timeout))

    async def _revert(self, guest: Guest, reference: str, identity: Identity | None) -> Reverted:
        world = self._world
        async with guest.lock, AsyncExitStack() as stack:
            sandbox = await guest.record()
            policy.require_state(
                sandbox, SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.STOPPED,
                SandboxState.FAILED, action="revert",
            )  # fmt: skip
            target = await self._find(guest, reference)
            boots = sandbox.state is not SandboxState.STOPPED or target.ram is not None
            if target.ram is not None:
                # The policy stays: going back opens no wall, and closes none.
                wiring.require(target.machine, sandbox.network)
            if boots:
                await stack.enter_async_context(
                    world.admission.room(world.read, guest.id, target.memory, target.cpus)
                )
            safety = await self._take_safety_snapshot(guest, sandbox)
            # Once more: it may have been deleted while the safety snapshot was taken.
            target = await self._find(guest, reference)
            if origin := Origin.of(target):
                await world.memories.check_fits(origin)
            operation, overlays = await world.write(
                lambda tx: _write_down(tx, sandbox, target, identity, boots=boots)
            )
            async with undone_by(lambda: self._back(guest, operation, overlays)):
                hit("revert.row-written")
                await guest.end()
                hit("revert.stopped")
                await in_thread(world.store.make_overlays, overlays)
                hit("revert.overlays-made")
                record = await self.switch_disks(guest, operation)
            hit("revert.disks-switched")
            if boots:
                record = await self.go_on(guest, record, operation)
        await world.sweep()
        return Reverted(sandbox=record, safety_snapshot=safety)

    async def go_on(self, guest: Guest, record: Sandbox, operation: Operation) -> Sandbox:
        """Start what the disks were switched to, from its memory where the snapshot has some."""
        target = await self._world.read(
            lambda tx: snapshots.get(tx, SnapshotId(operation.payload["snapshot"]))
        )
        return await self.boot(guest, record, operation, Origin.of(target))

    async def boot(
        self,
        guest: Guest,
        record: Sandbox,
        operation: Operation,
        memory: Origin | None = None,
    ) -> Sandbox:
        """Start it; when that fails, it stays stopped and the revert is over."""
        try:
            return await guest.boot(
                record, lambda tx: operations.end(tx, operation.id), memory,
                identity=_identity_of(operation),
            )  # fmt: skip
        except (StrataboxError, OSError) as error:
            await self._world.write(lambda tx: operations.end(tx, operation.id))
            await self._world.change_sandbox(
                guest.id, state_reason=f"{record.state_reason}, but not started: {error}"
            )
            raise

    async def switch_disks(self, guest: Guest, operation: Operation) -> Sandbox:
        """Write that the sandbox stands on the snapshot now. Also finishes a killed revert."""
        world = self._world
        payload = operation.payload
        target_id = SnapshotId(payload["snapshot"])

        def write(tx: Transaction) -> Sandbox:
            target = snapshots.get(tx, target_id)
            for disk, entry in zip(target.disks, payload["disks"], strict=True):
                layers.insert(
                    tx,
                    Layer(
                        id=LayerId(entry["new"]),
                        # What the snapshot has now: it may have been replaced since.
                        parent=disk.layer,
                        backing=LayerId(entry["old"]),
                        state=LayerState.ACTIVE,
                        size=entry["size"],
                        created_at=tx.now,
                    ),
                )
            if not payload["boots"]:
                operations.end(tx, operation.id)
            else:
                operations.amend(tx, operation.id, {**payload, "switched": True})
            old = sandboxes.get(tx, guest.id)
            return sandboxes.change(
                tx,
                guest.id,
                # No process runs now; if booting fails, this is the truth that remains.
                state=SandboxState.STOPPED,
                state_reason=f"reverted to snapshot {target.name!r}",
                ready=False,
                clean_shutdown=target.consistency is Level.APPLICATION,
                source_snapshot=target.id,
                cpus=target.cpus,
                memory=target.memory,
                storage=policy.gib(target.disks[0].size),
                env=target.env,
                probe=target.probe,
                machine=target.machine
                if target.ram
                else replace(
                    target.machine.up_to_date(),
                    mac=old.machine.mac,
                    accelerator=world.accelerator.name,
                    cpu_model=world.accelerator.cpu_model,
                ),
                left_behind=_left_behind(old, target),
                vmgenid=mint(),
                identity_due=_identity_of(operation) or old.identity_due,
                disks=tuple(
                    Disk(
                        index=disk.index,
                        layer=LayerId(entry["new"]),
                        size=disk.size,
                        serial=disk.serial,
                    )
                    for disk, entry in zip(target.disks, payload["disks"], strict=True)
                ),
            )

        record = await world.write(write)
        world.bus.publish(Happening.UPDATED, record)
        return record

    async def _find(self, guest: Guest, reference: str) -> Snapshot:
        target = await self._world.read(
            lambda tx: snapshots.get(tx, snapshots.resolve(tx, reference))
        )
        require_ready(target)
        if target.source_sandbox != guest.id:
            raise DeniedError(
                f"snapshot {target.name!r} was taken from sandbox"
                f" {target.source_sandbox_name!r}, not from this one: restore it instead",
                reason="NOT_ITS_SNAPSHOT",
                snapshot=target.id,
                sandbox=guest.id,
            )
        return target

    async def _take_safety_snapshot(self, guest: Guest, sandbox: Sandbox) -> Snapshot:
        # Crash-consistent while it runs: it must not need an agent that may be why we go back.
        clean = sandbox.state is SandboxState.STOPPED and sandbox.clean_shutdown
        now = await self._world.read(lambda tx: tx.now)
        return await self._snapshots.take_locked(
            guest,
            NewSnapshot(
                name=f"before revert of {sandbox.name}"[: policy.NAME_BYTES // 4],
                level=Level.APPLICATION if clean else Level.CRASH,
                expires_at=now + SAFETY_LIFE,
                metadata={"stratabox.safety": "true"},
            ),
        )

    async def _back(
        self, guest: Guest, operation: Operation, overlays: Sequence[NewOverlay]
    ) -> None:
        """The disks are as they were: boot from them again if it ran and does not any more."""
        await in_thread(self._world.store.remove_overlays, [overlay.id for overlay in overlays])
        parked = (await guest.record()).ram_parked is not None
        if operation.payload["boots"] and guest.domain is None and not parked:
            record = await self._world.change_sandbox(
                guest.id,
                state=SandboxState.STOPPED,
                state_reason="a revert failed; its disks are as they were",
                ready=False,
            )
            await self.boot(guest, record, operation)
        else:
            await self._world.write(lambda tx: operations.end(tx, operation.id))


def _left_behind(sandbox: Sandbox, target: Snapshot) -> tuple[Mount, ...]:
    """Volumes of that instant that it does not have now. Those that it has it keeps."""
    held = {each.volume for each in sandbox.volumes}
    return tuple(each for each in target.volumes if each.volume not in held)


def _identity_of(operation: Operation) -> Identity | None:
    named = operation.payload.get("identity")
    return Identity(named) if named else None


def _write_down(
    tx: Transaction,
    sandbox: Sandbox,
    target: Snapshot,
    identity: Identity | None,
    *,
    boots: bool,
) -> tuple[Operation, Sequence[NewOverlay]]:
    overlays = [NewOverlay(LayerId(mint()), disk.layer, disk.size) for disk in target.disks]
    payload: dict[str, Any] = {
        "snapshot": target.id,
        "boots": boots,
        "identity": identity,
        "disks": [
            {"old": overlay.parent, "new": overlay.id, "size": overlay.size} for overlay in overlays
        ],
    }
    operation = Operation(kind=Kind.REVERT, sandbox=sandbox.id, snapshot=target.id, payload=payload)
    return operations.begin(tx, operation), overlays
