"""Taking a snapshot: from overlays made beforehand to a durable record.

```
 overlays made ─ added to QEMU ─ [ freeze ] ─ one transaction ─ [ thaw ] ─ seal ─ catalog
      │                             │               │             │          │       │
      └ a failure here is undone ───┘               └ from here on the chain has grown:
        and the sandbox is as before                  it is only the record that can fail
```

The operation's row says how far it has come, so that a daemon that was killed can finish or undo
it: `disks` before any file is made, `freezing` before the freeze, `frozen` once it has counted.
Whether the transaction happened is never written down but asked of QEMU's block graph, which knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.freezing import Freeze
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.running import parking
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.saving import is_readable, save_memory
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import attachments, layers, operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.durable import host_error
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import FailedError, StrataboxError
from stratabox.storage.model.ids import LayerId, mint
from stratabox.storage.model.records import Disk, Layer, Sandbox, SavedRam, Snapshot
from stratabox.storage.model.states import LayerState, Level, SandboxState, SnapshotState

log = logging.getLogger(__name__)

END_SECONDS = 5.0
"""How long to wait for word of why a QEMU that is gone has ended."""

OWN_ERROR = "an error of the daemon's own; its log says more"


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One disk's step: from the layer that is sealed to the overlay that comes on top of it."""

    index: int
    old: LayerId
    new: LayerId
    size: int
    serial: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was achieved."""

    consistency: Level
    frozen: int
    stall: timedelta | None
    ram: SavedRam | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a snapshot does to the disks: decided when its turn has come, and written down first."""

    sandbox: Sandbox
    level: Level
    steps: Sequence[Switch]
    running: bool
    """It has a process, whose disks are switched."""

    def payload(self) -> dict[str, Any]:
        """As the operation keeps it."""
        return {
            "disks": [vars(step) for step in self.steps],
            "level": self.level,
            "running": self.running,
        }


class UnsettledError(FailedError):
    """The disks were switched but the catalog could not be told; it will be, before anything else.

    SNAPSHOT_UNSETTLED.
    """

    default_reason = "SNAPSHOT_UNSETTLED"


def switches_of(payload: Any) -> list[Switch]:
    """The disks' steps, as the operation's payload keeps them."""
    return [Switch(**entry) for entry in payload.get("disks", ())]


def plan_of(sandbox: Sandbox, level: Level, *, running: bool) -> Plan:
    """The steps of a snapshot of this sandbox."""
    steps = [
        Switch(
            index=disk.index,
            old=disk.layer,
            new=LayerId(mint()),
            size=disk.size,
            serial=disk.serial,
        )
        for disk in sandbox.disks
    ]
    return Plan(sandbox=sandbox, level=level, steps=steps, running=running)


async def capture(
    world: World, guest: Guest, snapshot: Snapshot, operation: Operation, planned: Plan | None
) -> Snapshot:
    """Take the snapshot whose CREATING record and operation exist; the caller holds the lock.

    :param planned: what the operation's payload says, written under the same lock. None: the level
        is chosen now, by the sandbox's present state.
    :return: the READY record.
    :raise StrataboxError: why it failed; the record is FAILED and the operation over by then.
    """
    try:
        hit("snapshot.row-written")
        plan = planned or await _plan(world, guest, snapshot, operation)
        record = await _take(world, guest, snapshot, operation, plan)
        if origin := Origin.of(record):
            world.memories.warm(origin)
        return record
    except UnsettledError:
        raise  # the record is written when the debt is paid
    except OSError as error:
        named = host_error(error)
        await _fail_surely(world, snapshot, operation, named.message)
        raise named from error
    except StrataboxError as error:
        await _fail_surely(world, snapshot, operation, error.message)
        raise
    except BaseException:
        await _fail_surely(world, snapshot, operation, OWN_ERROR)
        raise


async def _plan(world: World, guest: Guest, snapshot: Snapshot, operation: Operation) -> Plan:
    await guest.settle()
    sandbox = await guest.record()
    level = policy.choose_level(
        snapshot.requested_level,
        await _ceiling(world, guest, sandbox, snapshot),
        sandbox,
        # Asked only where it matters: a paused guest would be waited for in vain.
        agent_answers=snapshot.requested_level is None
        and sandbox.state is SandboxState.RUNNING
        and await guest.agent_answers(),
    )
    made = plan_of(sandbox, level, running=guest.domain is not None)
    await world.write(lambda tx: operations.amend(tx, operation.id, made.payload()))
    return made


async def _ceiling(world: World, guest: Guest, sandbox: Sandbox, snapshot: Snapshot) -> Level:
    """The strongest level that a snapshot without a level of its own gets."""
    ceiling = world.config.default_level
    if ceiling is Level.MEMORY and snapshot.requested_level is None and sandbox.has_process:
        return ceiling if await is_readable(guest) else Level.APPLICATION
    return ceiling


async def fail(world: World, snapshot: Snapshot, operation: Operation, reason: str) -> None:
    """Write FAILED and end the operation, unless that is written already."""

    def write(tx: Transaction) -> Snapshot | None:
        operations.end(tx, operation.id)
        if snapshots.get(tx, snapshot.id).state is not SnapshotState.CREATING:
            return None
        return snapshots.change(tx, snapshot.id, state=SnapshotState.FAILED, failure_reason=reason)

    record = await world.write(write)
    if record is not None:
        log.warning("snapshot %s failed: %s", snapshot.id, reason)
        world.bus.publish(Happening.UPDATED, record)


async def _fail_surely(world: World, snapshot: Snapshot, operation: Operation, reason: str) -> None:
    what = f"the end of snapshot {snapshot.id}"
    await world.surely(lambda: fail(world, snapshot, operation, reason), what)


async def _take(
    world: World, guest: Guest, snapshot: Snapshot, operation: Operation, plan: Plan
) -> Snapshot:
    steps = plan.steps
    overlays = [NewOverlay(step.new, step.old, step.size) for step in steps]
    await in_thread(world.store.make_overlays, overlays)
    async with undone_by(
        lambda: in_thread(world.store.remove_overlays, [step.new for step in steps])
    ):
        hit("snapshot.overlays-made")
    domain = guest.domain
    outcome: Outcome | StrataboxError
    if domain is None:
        async with undone_by(
            lambda: in_thread(world.store.remove_overlays, [step.new for step in steps])
        ):
            outcome = await _take_still(world, plan.sandbox, snapshot, plan.level)
    else:
        outcome = await _switch_running(world, guest, snapshot, operation, plan)
        if isinstance(outcome, StrataboxError) and not world.launcher.is_alive(domain.handle):
            outcome = await _name_the_end(domain, outcome)
    record, outcome = await finish(world, guest, snapshot, operation, steps, outcome)
    if isinstance(outcome, StrataboxError):
        raise outcome
    return record


async def _take_still(world: World, sandbox: Sandbox, snapshot: Snapshot, level: Level) -> Outcome:
    """Of a sandbox without a process: its disks, and the memory of one that is paused to disk."""
    ram = None
    if level is Level.MEMORY:
        ram = await parking.as_snapshot(world, sandbox, snapshot.id)
        hit("snapshot.memory-saved")
    return Outcome(consistency=level, frozen=0, stall=None, ram=ram)


async def _switch_running(
    world: World,
    guest: Guest,
    snapshot: Snapshot,
    operation: Operation,
    plan: Plan,
) -> Outcome | StrataboxError:
    """Switch a running domain's disks. An error that is *returned* came after the switch."""
    level = plan.level
    domain, layout = guest.require_domain(), world.store.layout
    pairs = [
        (
            ChainLayer(id=step.old, path=layout.layer(step.old)),
            ChainLayer(id=step.new, path=layout.layer(step.new)),
        )
        for step in plan.steps
    ]
    freeze = Freeze(world, guest.require_agent(), operation, plan.payload())
    try:
        if level is Level.CRASH:
            seconds = await domain.disks.prepare_and_switch(pairs)
            hit("snapshot.switched")
            stall = timedelta(seconds=seconds)
            return Outcome(consistency=level, frozen=0, stall=stall)
        await domain.disks.prepare([new for _, new in pairs])
        if level is Level.MEMORY:
            ram = await save_memory(world, guest, snapshot, pairs)
            return Outcome(consistency=level, frozen=0, stall=ram.pause, ram=ram)
        await freeze.begin()
        try:
            hit("snapshot.frozen")
            await freeze.write_count()
            hit("snapshot.freeze-counted")
            await domain.disks.switch(pairs)
            hit("snapshot.switched")
        finally:
            thawed = await settle(freeze.end())
        hit("snapshot.thawed")
    except BaseException as error:
        if not await settle(_may_be_switched(domain, pairs)):
            await settle(_undo(world, domain, pairs))
            raise
        if isinstance(error, OSError):
            return host_error(error)
        if isinstance(error, StrataboxError):
            return error
        log.exception("snapshot of %s", guest.id)
        return FailedError(OWN_ERROR)
    verdict = freeze.verdict(thawed)
    if verdict:
        return FailedError(verdict, reason="FREEZE_FAILED")
    return Outcome(consistency=level, frozen=freeze.frozen, stall=freeze.stall)


async def _may_be_switched(domain: Domain, pairs: Sequence[tuple[ChainLayer, ChainLayer]]) -> bool:
    """Whether the transaction has happened, which an error on the way does not tell.

    Where nobody can be asked, yes: on top of the old layers the new ones are right in either case,
    and without them what was written since the switch would be lost.
    """
    try:
        active = set((await domain.disks.active_layers()).values())
    except StrataboxError:
        return True
    return any(new.node in active for _, new in pairs)


async def _name_the_end(domain: Domain, error: StrataboxError) -> StrataboxError:
    """The guest's end as the reason, where an error came of that."""
    await asyncio.wait({domain.exited}, timeout=END_SECONDS)
    if not domain.exited.done() or domain.exited.cancelled():
        return error
    return FailedError(
        f"the guest ended while it was taken: {domain.exited.result().reason}", reason="GUEST_ENDED"
    )


async def _undo(
    world: World, domain: Domain, pairs: Sequence[tuple[ChainLayer, ChainLayer]]
) -> None:
    try:
        await domain.disks.drop([new for _, new in pairs])
    except StrataboxError as error:
        # QEMU is gone or deaf; with it go its nodes. The files are still ours to remove.
        log.warning("overlays of a failed snapshot stay in QEMU: %s", error)
    await in_thread(world.store.remove_overlays, [new.id for _, new in pairs])


async def finish(
    world: World,
    guest: Guest,
    snapshot: Snapshot,
    operation: Operation,
    steps: Sequence[Switch],
    outcome: Outcome | StrataboxError,
) -> tuple[Snapshot, Outcome | StrataboxError]:
    """Seal what was switched away from and write it all down in one transaction.

    The chain has grown whatever the outcome; a failed one leaves no snapshot on it.

    :return: the record, and the outcome: sealing can have failed too.
    :raise UnsettledError: when the catalog cannot be written now; the guest owes it.
    """
    old_layers = [step.old for step in steps]
    sizes = dict.fromkeys(old_layers, 0)
    try:
        sizes = await in_thread(world.store.seal, old_layers)
        hit("snapshot.sealed")
    except OSError as error:
        outcome = host_error(error)
    except StrataboxError as error:
        outcome = error

    def write(tx: Transaction) -> Snapshot:
        live = sandboxes.get(tx, guest.id)
        parent = _parent(tx, steps[0].old, snapshot.workspace) if steps else None
        for step in steps:
            layers.insert(
                tx,
                Layer(
                    id=step.new,
                    parent=step.old,
                    state=LayerState.ACTIVE,
                    size=step.size,
                    created_at=tx.now,
                ),
            )
        layers.seal(tx, sizes)
        new_layer = {step.index: step.new for step in steps}
        sandboxes.change(
            tx,
            guest.id,
            disks=tuple(replace(disk, layer=new_layer[disk.index]) for disk in live.disks),
        )
        operations.end(tx, operation.id)
        if isinstance(outcome, Outcome) and outcome.ram is not None:
            rams.insert(tx, snapshot.id, outcome.ram)
            if live.has_process:
                sandboxes.change(tx, guest.id, ram_since=snapshot.id)
        if isinstance(outcome, StrataboxError):
            return snapshots.change(
                tx,
                snapshot.id,
                state=SnapshotState.FAILED,
                failure_reason=outcome.message,
            )
        return snapshots.change(
            tx,
            snapshot.id,
            state=SnapshotState.READY,
            consistency=outcome.consistency,
            frozen=outcome.frozen,
            stall=outcome.stall,
            disks=tuple(
                Disk(index=step.index, layer=step.old, size=step.size, serial=step.serial)
                for step in steps
            ),
            layer_bytes=sum(sizes.values()),
            ready_at=tx.now,
            parent=parent,
            volumes=tuple(attachments.mount_of(each) for each in live.volumes),
        )

    records: list[Snapshot] = []

    async def pay() -> None:
        record = await world.write(write)
        world.bus.publish(Happening.UPDATED, record)
        records.append(record)

    # Owed until it is paid, whatever comes in between: the disks *were* switched.
    guest.owe(pay)
    try:
        await guest.settle()
    except StrataboxError as error:
        raise UnsettledError(
            f"the snapshot was taken but could not be written down: {error.message}; it will be"
            " before anything else happens to the sandbox",
            snapshot_id=snapshot.id,
        ) from error
    world.chains_changed.set()
    hit("snapshot.ready-written")
    return records[0], outcome


def _parent(tx: Transaction, layer: LayerId, workspace: str) -> Any:
    """The nearest snapshot below a layer that is about to be sealed."""
    for below in layers.chain(tx, layer)[1:]:
        found = snapshots.holding(tx, below.id, workspace)
        if found:
            return found
    return None
