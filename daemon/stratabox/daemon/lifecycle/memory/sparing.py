"""Keeps warm spares waiting: makes those that are missing, in quiet moments, and ends the others.

None is made, and those there are end, when the host's memory gets short.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from contextlib import AsyncExitStack
from dataclasses import replace

from stratabox.daemon.config.keys import UID_COUNT
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.memory import headroom
from stratabox.daemon.hypervisor.qemu_host import random_mac
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.threads import in_thread, settle
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.memory.spares import Relay, Spare, Want
from stratabox.daemon.lifecycle.running.loading import load
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import DeniedError, NoSpaceError, StrataboxError
from stratabox.storage.model.ids import LayerId, SandboxId, mint
from stratabox.storage.model.records import MIB, Disk, Sandbox
from stratabox.storage.model.states import Identity, SandboxState, SnapshotState

log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two looks at the host's memory."""

QUIET = 0.5
"""Seconds without a restore or a save before one is made: a guest's first command goes first."""

COST = 64 * MIB
"""What one takes, generously."""


async def keep(world: World) -> None:
    """Keep as many as are wanted until cancelled; none is left then."""
    spares = world.spares
    if not spares.most:
        return
    try:
        while True:
            spares.changed.clear()
            await _look(world)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD):
                    await spares.changed.wait()
    finally:
        await settle(spares.end_all())


async def _look(world: World) -> None:
    spares = world.spares
    if headroom.spare_bytes() < 0:
        if len(spares):
            log.warning("the host is short of memory: %d spares end", len(spares))
        await spares.end_all()
        return
    await spares.end_surplus()
    while (want := spares.missing()) is not None:
        await world.rush.calm(QUIET)
        if headroom.spare_bytes() < COST:
            return
        if want == spares.missing():
            await _add(world, want)


async def _add(world: World, want: Want) -> None:
    spares = world.spares
    task = asyncio.create_task(_make(world, want), name=f"spare of {want.snapshot}")
    spares.making = (want, task)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        task.cancel()
        await settle(asyncio.wait((task,)))
        raise
    finally:
        spares.making = None
    error = None if task.cancelled() else task.exception()
    if isinstance(error, StrataboxError | OSError):
        log.warning("snapshot %s gets no spare: %s", want.snapshot, error)
        spares.give_up(want.snapshot)
    elif error is not None:
        raise error


async def _make(world: World, want: Want) -> None:
    """Make one and put it with the others; nothing is left of it when this raises."""
    store = world.store
    sandbox = SandboxId(mint())
    folder = store.layout.sandbox(sandbox)
    async with AsyncExitStack() as undo:
        undo.callback(world.spares.uids.pop, sandbox, None)
        undo.callback(world.spares.drafts.discard, sandbox)
        world.spares.drafts.add(sandbox)
        draft, origin, overlays, below = await world.read(
            lambda tx: _draft(world, tx, want, sandbox)
        )
        undo.push_async_callback(in_thread, shutil.rmtree, folder, ignore_errors=True)
        await in_thread(folder.mkdir, mode=0o700)
        await in_thread(store.make_overlays, overlays, folder)
        hit("spare.overlays-made")
        hold = await undo.enter_async_context(AsyncExitStack())
        await hold.enter_async_context(world.memories.use(origin))
        relay = Relay(world.spares.hear)
        domain = await load(world, draft, origin, relay, overlays)
        undo.push_async_callback(_end, world, domain)
        hit("spare.loaded")
        log.info("a spare of snapshot %s waits, pid %d", want.snapshot, domain.handle.pid)
        world.spares.put(
            Spare(
                want=want,
                draft=draft,
                folder=folder,
                layers=below,
                domain=domain,
                relay=relay,
                hold=hold,
                undo=undo.pop_all(),
            )
        )


async def _end(world: World, domain: Domain) -> None:
    await domain.detach()
    await world.launcher.stop(domain.handle)


def _draft(
    world: World, tx: Transaction, want: Want, sandbox: SandboxId
) -> tuple[Sandbox, Origin, list[NewOverlay], frozenset[LayerId]]:
    """What the sandbox would be, whose memory it goes on from, what its disks are, and all that
    they stand on.
    """
    snapshot = snapshots.get(tx, want.snapshot)
    origin = Origin.of(snapshot)
    if snapshot.state is not SnapshotState.READY or origin is None:
        raise DeniedError(f"snapshot {snapshot.name!r} has no memory to go on from")
    uid = None
    if world.qemu_uids:
        uid = sandboxes.free_uid(tx, world.config.uid_base, UID_COUNT, world.spares.reserved_uids())
        if uid is None:
            raise NoSpaceError("all host uids for guests are taken", reason="UIDS_EXHAUSTED")
        world.spares.uids[sandbox] = uid
    overlays = [NewOverlay(LayerId(mint()), disk.layer, disk.size) for disk in snapshot.disks]
    disks = tuple(
        Disk(index=disk.index, layer=overlay.id, size=disk.size, serial=disk.serial)
        for disk, overlay in zip(snapshot.disks, overlays, strict=True)
    )
    draft = Sandbox(
        id=sandbox,
        workspace=snapshot.workspace,
        name=f"spare of {snapshot.name}",
        state=SandboxState.CREATING,
        image=snapshot.image,
        image_name=snapshot.image_name,
        source_snapshot=snapshot.id,
        cpus=snapshot.cpus,
        memory=snapshot.memory,
        storage=policy.gib(snapshot.disks[0].size),
        machine=snapshot.machine
        if want.identity is Identity.KEEP
        else replace(snapshot.machine, mac=random_mac()),
        disks=disks,
        uid=uid,
        vmgenid=mint(),
        created_at=tx.now,
        updated_at=tx.now,
    )
    below = frozenset(layer.id for disk in snapshot.disks for layer in layers.chain(tx, disk.layer))
    return draft, origin, overlays, below
