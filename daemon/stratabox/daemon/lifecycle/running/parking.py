"""Pausing to disk: a sandbox's memory goes into files, its process ends, and it goes on from there.

```
 flush, copy │ stop │ flush │ devices │ last pages │ files │ catalog: parked │ process ends
 ────────────┴──────────── stands still ───────────────────┴─────────────────┴──────────────
   killed or failed before the catalog was written:   │  from then on: it is parked, and any
   the guest goes on as it was, the files go          │  process of it is ended, not continued
```

Its disks are not switched: what the guest resumes from is exactly what they held when it stopped.
So there must never be two that go on from that instant, and nothing may write those disks after it
but the one that does. Going on again therefore starts a process that stands still, writes down that
the memory is in it, and only then lets it run: whoever is killed on the way leaves a parked sandbox
or one that is paused in memory.

A parked sandbox survives a reboot of the host. Its memory is a row of `rams` under an id of its
own; its next save only adds to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stratabox.daemon.hypervisor.memory.save import Base, Saved, Target, save
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.threads import in_thread, undone_by
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.saving import as_record, require_readable
from stratabox.daemon.lifecycle.volumes import places, settling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import operations, rams, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files.memory.sealed import write_state
from stratabox.storage.files.memory.writer import RamWriter
from stratabox.storage.model.errors import CorruptError, DeniedError, FailedError, StrataboxError
from stratabox.storage.model.ids import SnapshotId, mint
from stratabox.storage.model.records import MIB, Sandbox, SavedRam
from stratabox.storage.model.states import Identity, SandboxState

log = logging.getLogger(__name__)

BY_REQUEST = "paused to disk by request"


async def park(world: World, guest: Guest, *, reason: str = BY_REQUEST, **changes: Any) -> Sandbox:
    """Pause a sandbox to disk; the caller holds the lock. One that is already is left alone.

    When this raises, the guest is as it was and nothing of its memory is kept.

    :param changes: of the record, in the same transaction.
    :raise DeniedError: INVALID_STATE; GUEST_BOOTING; MEMORY_UNREADABLE.
    :raise FailedError: QEMU_FAILED, also when its disks cannot be flushed.
    :raise NoSpaceError: NO_SPACE.
    :raise UnavailableError: MEMORY_UNREADABLE, MONITOR_UNAVAILABLE.
    """
    await guest.settle()
    sandbox = await guest.record()
    if sandbox.ram_parked:
        return sandbox
    policy.check_can_park(sandbox)
    await _check_stands_or_runs(guest, sandbox)
    await require_readable(guest)
    features = tuple(sorted(await world.memories.features()))
    operation = Operation(kind=Kind.PARK, sandbox=guest.id, payload={"ram": mint()})
    ram_id: str = operation.payload["ram"]

    def begin(tx: Transaction) -> Base:
        operations.begin(tx, operation)
        rams.pin(tx, guest.id, sandbox.ram_since or sandbox.ram_origin)
        sandboxes.change(tx, guest.id, ram_since=None)
        return Base(origin=sandbox.ram_origin, since=sandbox.ram_since)

    base = await world.write(begin)
    async with undone_by(lambda: _go_on(world, guest, sandbox, operation)):
        hit("park.row-written")
        saved = await _save(world, guest, sandbox, base, ram_id)
        ram = as_record(saved, features, world.store.ram_bytes([ram_id]))
        hit("park.saved")

        def write(tx: Transaction) -> Sandbox:
            operations.end(tx, operation.id)
            rams.insert(tx, ram_id, ram)
            return sandboxes.change(
                tx, guest.id, state=SandboxState.PAUSED, state_reason=reason, ready=False,
                ram_parked=ram_id, ram_origin=None, ram_since=None, **changes,
            )  # fmt: skip

        record = await world.write(write)
    world.bus.publish(Happening.UPDATED, record)
    log.info("sandbox %s is paused to disk", guest.id)
    try:
        hit("park.written")
    finally:
        await guest.end()
    hit("park.ended")
    return record


async def unpark(world: World, guest: Guest, identity: Identity | None) -> Sandbox:
    """Let a parked sandbox go on; the caller holds the lock. It is not waited for.

    When it cannot be started it stays parked. When it was started and could not be continued, it
    is paused in memory.

    :param identity: who it is from now on; None: who it was.
    :raise DeniedError: MACHINE_MISMATCH.
    :raise CorruptError: STATE_CORRUPT, RAM_CORRUPT, LAYER_MISSING.
    :raise FailedError: QEMU_FAILED.
    :raise NoSpaceError: when the host has no memory for it.
    """
    await guest.settle()
    sandbox = await guest.record()
    origin = await _origin(world, sandbox)
    try:
        await guest.boot(
            sandbox,
            lambda tx: _release(tx, sandbox),
            memory=origin,
            identity=identity,
            paused=True,
        )
    except (CorruptError, FailedError) as error:
        raise type(error)(
            f"sandbox {sandbox.name!r} stays paused to disk: {error.message}. {origin.way_out}",
            reason=error.reason,
            **error.metadata,
        ) from error
    finally:
        # Nobody else will start from it. The process has its own hold on what it needs.
        world.memories.forget(origin.id)
    return await guest.go_on(identity)


async def undo(world: World, operation: Operation) -> None:
    """End a pause to disk that a killed daemon left: its record was never written."""
    ram_id: str = operation.payload["ram"]
    await in_thread(_remove, _files(world, ram_id))
    await world.write(lambda tx: operations.end(tx, operation.id))


async def as_snapshot(world: World, sandbox: Sandbox, snapshot: SnapshotId) -> SavedRam:
    """A parked sandbox's memory as a snapshot's: files that stand on its own and add nothing.

    Durable on return; when this raises, no file of it is left.

    :raise CorruptError: STATE_CORRUPT.
    :raise NoSpaceError: NO_SPACE.
    """
    origin = await _origin(world, sandbox)
    layout = world.store.layout

    def make() -> None:
        target = layout.ram_file(snapshot)
        ram_bytes = origin.memory * MIB
        with RamWriter(target, id=snapshot, parent=origin.id, ram_bytes=ram_bytes) as writer:
            writer.finish()
        try:
            source = layout.state_file(origin.id)
            digest = write_state(layout.state_file(snapshot), source.read_bytes())
            if digest != origin.ram.state_sha256:
                raise CorruptError(
                    f"the devices' saved state {source.name} is not what was saved: its SHA-256"
                    " differs",
                    reason="STATE_CORRUPT",
                    file=source.name,
                )
        except BaseException:
            _remove(_files(world, snapshot))
            raise

    await in_thread(make)
    ram = origin.ram
    return SavedRam(
        parent=origin.id,
        own_bytes=0,
        bytes=world.store.ram_bytes([snapshot]),
        state_sha256=ram.state_sha256,
        tracking=ram.tracking,
        pause=ram.pause,
        cpu_features=ram.cpu_features,
    )


async def _check_stands_or_runs(guest: Guest, sandbox: Sandbox) -> None:
    """:raise DeniedError: INVALID_STATE, when QEMU has stopped the guest by itself."""
    status = await guest.require_domain().status()
    if status not in ("running", "paused"):
        raise DeniedError(
            f"sandbox {sandbox.name!r} cannot be paused to disk: its guest is {status}"
            f" ({sandbox.state_reason or 'QEMU says no more'}); resume it first",
            sandbox=guest.id,
            state=sandbox.state,
        )


async def _save(world: World, guest: Guest, sandbox: Sandbox, base: Base, ram_id: str) -> Saved:
    domain, layout = guest.require_domain(), world.store.layout
    await settling.check_settled(domain, sandbox)
    overlays = [layout.layer(disk.layer) for disk in sandbox.disks]
    if sandbox.volumes:
        overlays += await world.read(lambda tx: places.written(tx, layout, guest.id))

    async def flush() -> None:
        hit("park.stopped")
        await domain.disks.flush()
        if sandbox.volumes:
            await domain.volumes.flush()
        await in_thread(_sync, overlays)

    return await save(
        domain,
        base,
        Target(id=ram_id, ram=layout.ram_file(ram_id), state=layout.state_file(ram_id)),
        overlays=overlays,
        at_pause=flush,
        leave_stopped=True,
    )


async def _go_on(world: World, guest: Guest, sandbox: Sandbox, operation: Operation) -> None:
    """Nothing was parked: the guest is again what it was."""
    try:
        what = f"the undoing of a pause to disk of sandbox {guest.id}"
        await world.surely(lambda: undo(world, operation), what)
    except (StrataboxError, OSError) as error:
        # The row is found at the next start, and nothing stands on the files.
        log.warning("a pause to disk of sandbox %s is not undone yet: %s", guest.id, error)
    domain = guest.domain
    if domain is None or sandbox.state is not SandboxState.RUNNING:
        return
    try:
        await domain.cont()
    except StrataboxError as error:
        # QEMU has ended, which its watcher tells; or it is deaf, which the next command tells.
        log.error("sandbox %s could not go on: %s", guest.id, error)


def _release(tx: Transaction, sandbox: Sandbox) -> None:
    """The memory is in a process again."""
    sandboxes.change(tx, sandbox.id, ram_parked=None)


async def _origin(world: World, sandbox: Sandbox) -> Origin:
    ram_id = sandbox.ram_parked
    assert ram_id is not None
    ram = await world.read(lambda tx: rams.find(tx, ram_id))
    if ram is None:
        raise CorruptError(
            f"the saved memory of sandbox {sandbox.name!r} is not in the catalog",
            reason="RAM_CORRUPT",
            ram=ram_id,
        )
    return Origin(
        id=ram_id,
        what=f"sandbox {sandbox.name!r}",
        ram=ram,
        memory=sandbox.memory,
        machine=sandbox.machine,
        way_out="Its disks can be booted: stop it and start it; then what was only in its memory is"
        " lost",
    )


def _files(world: World, ram_id: str) -> Sequence[Path]:
    layout = world.store.layout
    return layout.ram_file(ram_id), layout.state_file(ram_id)


def _remove(files: Sequence[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)


def _sync(files: Sequence[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
