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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from stratabox.daemon.hypervisor.agent import REPLY_SECONDS, GuestAgent
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.events import Happening
from stratabox.daemon.lifecycle.guest import Guest
from stratabox.daemon.lifecycle.saving import save_memory
from stratabox.daemon.lifecycle.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, operations, rams, sandboxes, snapshots
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

THAW_SECONDS = 60.0
"""How long a guest is asked to thaw before it is given up."""

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


class UnsettledError(FailedError):
    """The disks were switched but the catalog could not be told; it will be, before anything else.

    SNAPSHOT_UNSETTLED.
    """

    default_reason = "SNAPSHOT_UNSETTLED"


def switches_of(payload: Any) -> list[Switch]:
    """The disks' steps, as the operation's payload keeps them."""
    return [Switch(**entry) for entry in payload.get("disks", ())]


async def capture(world: World, guest: Guest, snapshot: Snapshot, operation: Operation) -> Snapshot:
    """Take the snapshot whose CREATING record and operation exist; the caller holds the lock.

    The level is chosen now, by the sandbox's present state.

    :return: the READY record.
    :raise StrataboxError: why it failed; the record is FAILED and the operation over by then.
    """
    try:
        hit("snapshot.row-written")
        await guest.settle()
        sandbox = await guest.record()
        level = policy.choose_level(
            snapshot.requested_level,
            world.config.default_level,
            sandbox,
            # Asked only where it matters: a paused guest would be waited for in vain.
            agent_answers=snapshot.requested_level is None
            and sandbox.state is SandboxState.RUNNING
            and await guest.agent_answers(),
        )
        return await _take(world, guest, sandbox, snapshot, operation, level)
    except UnsettledError:
        raise  # the record is written when the debt is paid
    except OSError as error:
        named = host_error(error)
        await fail(world, snapshot, operation, named.message)
        raise named from error
    except StrataboxError as error:
        await fail(world, snapshot, operation, error.message)
        raise
    except BaseException:
        await fail(world, snapshot, operation, OWN_ERROR)
        raise


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


async def _take(
    world: World,
    guest: Guest,
    sandbox: Sandbox,
    snapshot: Snapshot,
    operation: Operation,
    level: Level,
) -> Snapshot:
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
    payload: dict[str, Any] = {
        "disks": [vars(step) for step in steps],
        "level": level,
        "running": guest.domain is not None,
    }
    await world.write(lambda tx: operations.amend(tx, operation.id, payload))
    overlays = [NewOverlay(step.new, step.old, step.size) for step in steps]
    await in_thread(world.store.make_overlays, overlays)
    async with undone_by(
        lambda: in_thread(world.store.remove_overlays, [step.new for step in steps])
    ):
        hit("snapshot.overlays-made")
    domain = guest.domain
    outcome: Outcome | StrataboxError
    if domain is None:
        outcome = Outcome(consistency=level, frozen=0, stall=None)
    else:
        outcome = await _switch_running(world, guest, snapshot, operation, payload, steps, level)
        if isinstance(outcome, StrataboxError) and not world.launcher.is_alive(domain.handle):
            outcome = await _name_the_end(domain, outcome)
    record, outcome = await finish(world, guest, snapshot, operation, steps, outcome)
    if isinstance(outcome, StrataboxError):
        raise outcome
    return record


async def _switch_running(
    world: World,
    guest: Guest,
    snapshot: Snapshot,
    operation: Operation,
    payload: dict[str, Any],
    steps: Sequence[Switch],
    level: Level,
) -> Outcome | StrataboxError:
    """Switch a running domain's disks. An error that is *returned* came after the switch."""
    domain, layout = guest.require_domain(), world.store.layout
    pairs = [
        (
            ChainLayer(id=step.old, path=layout.layer(step.old)),
            ChainLayer(id=step.new, path=layout.layer(step.new)),
        )
        for step in steps
    ]
    freeze = Freeze(world, guest.require_agent(), operation, payload)
    try:
        await domain.disks.prepare([new for _, new in pairs])
        if level is Level.MEMORY:
            ram = await save_memory(world, guest, snapshot, pairs)
            return Outcome(consistency=level, frozen=0, stall=ram.pause, ram=ram)
        if level is Level.CRASH:
            begun = time.monotonic()
            await domain.disks.switch(pairs)
            hit("snapshot.switched")
            stall = timedelta(seconds=time.monotonic() - begun)
            return Outcome(consistency=level, frozen=0, stall=stall)
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
    layer_bytes = 0
    try:
        layer_bytes = await in_thread(world.store.seal, old_layers)
        hit("snapshot.sealed")
    except OSError as error:
        outcome = host_error(error)
    except StrataboxError as error:
        outcome = error

    def write(tx: Transaction) -> Snapshot:
        live = sandboxes.get(tx, guest.id)
        parent = _parent(tx, steps[0].old) if steps else None
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
        layers.seal(tx, old_layers)
        new_layer = {step.index: step.new for step in steps}
        sandboxes.change(
            tx,
            guest.id,
            disks=tuple(replace(disk, layer=new_layer[disk.index]) for disk in live.disks),
        )
        operations.end(tx, operation.id)
        if isinstance(outcome, Outcome) and outcome.ram is not None:
            rams.insert(tx, snapshot.id, outcome.ram)
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
            layer_bytes=layer_bytes,
            ready_at=tx.now,
            parent=parent,
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
    hit("snapshot.ready-written")
    return records[0], outcome


def _parent(tx: Transaction, layer: LayerId) -> Any:
    """The nearest snapshot below a layer that is about to be sealed."""
    for below in layers.chain(tx, layer)[1:]:
        found = snapshots.holding(tx, below.id)
        if found:
            return found
    return None


async def thaw(agent: GuestAgent) -> int | None:
    """Thaw all file systems, whatever it takes; how many were, where the agent said so.

    The guest may hang without it, so this goes on, with new connections, for as long as the agent
    may need to come back. A guest that does not answer even then is logged, and stays as it is.
    """
    count: int | None
    try:
        count = await agent.fsfreeze_thaw()
    except StrataboxError:
        count = None
    try:
        await agent.ensure_thawed(THAW_SECONDS)
    except StrataboxError as error:
        log.error("%s", error)
        return None
    return count


class Freeze:
    """File systems held still: begun, counted, and ended whatever happens in between."""

    def __init__(
        self, world: World, agent: GuestAgent, operation: Operation, payload: dict[str, Any]
    ) -> None:
        self.frozen = 0
        self.stall: timedelta | None = None
        self._world = world
        self._agent = agent
        self._operation = operation
        self._payload = payload
        self._begun = 0.0

    async def begin(self) -> None:
        """Freeze all file systems; thawed again when this raises.

        :raise FailedError: FREEZE_FAILED.
        :raise UnavailableError: AGENT_UNAVAILABLE.
        """
        await self._note(freezing=True)
        hit("snapshot.freeze-intended")
        seconds = self._world.config.freeze_timeout
        # Before the freeze is asked for nothing needs to be undone: an agent that is deaf
        # already is not waited for a second time.
        status = await self._agent.fsfreeze_status(min(seconds, REPLY_SECONDS))
        self._begun = time.monotonic()
        try:
            if status != "thawed":
                raise FailedError(
                    f"the guest's file systems were {status} already, by somebody else;"
                    " they have been thawed",
                    reason="FREEZE_FAILED",
                )
            self.frozen = await self._agent.fsfreeze_freeze(seconds)
            if self.frozen == 0:
                raise FailedError("the guest's agent froze no file system", reason="FREEZE_FAILED")
        except BaseException:
            await settle(self.end())
            raise

    async def write_count(self) -> None:
        """Persist how many were frozen, so that a killed daemon can still judge the thaw."""
        await self._note(frozen=self.frozen)

    async def end(self) -> int | None:
        """Thaw, whatever it takes; returns how many file systems were, where the agent said so."""
        thawed = await thaw(self._agent)
        self.stall = timedelta(seconds=time.monotonic() - self._begun)
        return thawed

    def verdict(self, thawed: int | None) -> str | None:
        """What is wrong with the counts; None when they prove that nothing thawed in between."""
        if thawed == self.frozen:
            return None
        if thawed is None:
            return "the guest's agent did not say how many file systems it thawed"
        if thawed > self.frozen:
            return (
                f"{thawed - self.frozen} of the guest's {thawed} file systems were frozen already,"
                " by somebody else; they have been thawed"
            )
        return (
            f"{self.frozen} file systems were frozen but {thawed} were thawed: something in the"
            " guest ended the freeze early"
        )

    async def _note(self, **entries: Any) -> None:
        self._payload.update(entries)
        payload = dict(self._payload)
        await self._world.write(lambda tx: operations.amend(tx, self._operation.id, payload))
