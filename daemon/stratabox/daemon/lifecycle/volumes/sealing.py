"""Capturing a volume: its layer is sealed, and it goes on writing on a new one above it.

```
 row ─ overlay made ─ [ in QEMU: prepare ─ [ freeze ] ─ switch ─ [ thaw ] ] ─ seal ─ catalog
        │                                                  │
        └ a failure here is undone                         └ from here on the chain has grown
```

What is sealed stands for what the volume was: a snapshot of it, or what a copy of it stands on.
Both are written with the last step, so of a daemon that dies before it no snapshot and no copy
stays; what a guest has written since the switch does (`undo`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle.common.threads import in_thread, settle
from stratabox.daemon.lifecycle.freezing import Freeze
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.running.thawing import thaw
from stratabox.daemon.lifecycle.volumes import claims
from stratabox.daemon.lifecycle.volumes.holding import Held, held
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, operations, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.failpoints import hit
from stratabox.storage.files import volumes as files
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import (
    DeniedError,
    FailedError,
    InvalidArgumentError,
    NotFoundError,
    StrataboxError,
)
from stratabox.storage.model.ids import LayerId, VolumeId, mint
from stratabox.storage.model.records import Layer, Volume
from stratabox.storage.model.states import AttachmentState, LayerState, Level, SandboxState

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A volume that will stand on what is sealed; its file is made with the other's."""

    volume: VolumeId
    layer: LayerId
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """What a volume was."""

    volume: Volume
    layer: LayerId
    size: int
    filesystem: int
    level: Level


async def seal(
    world: World,
    guests: Guests,
    volume: VolumeId,
    level: Level | None,
    also: Callable[[Transaction, Sealed], T],
    *,
    copy: Copy | None = None,
) -> T:
    """Capture a volume as it is now, for `also` to make something of, in the last transaction.

    :param level: that one or nothing; None: the strongest that can be had.
    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: VOLUME_NOT_READY, INVALID_STATE.
    :raise InvalidArgumentError: INVALID_ARGUMENT, for the level memory.
    :raise FailedError: FREEZE_FAILED, QEMU_FAILED, HOST_DISK_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE, MONITOR_UNAVAILABLE.
    :raise NoSpaceError: NO_SPACE.
    """
    if level is Level.MEMORY:
        raise InvalidArgumentError(
            "a volume has no memory: name crash or application", field="level"
        )
    async with held(world, guests, volume) as have:
        claims.require_ready(have.volume)
        chosen = await _choose_level(have, level)
        return await settle(_seal(world, have, chosen, also, copy))


async def _seal(
    world: World,
    have: Held,
    level: Level,
    also: Callable[[Transaction, Sealed], T],
    copy: Copy | None,
) -> T:
    record, layout = have.volume, world.store.layout
    old = record.layer
    assert old is not None
    size = max(record.size, await in_thread(files.real_size, layout, old))
    new = NewOverlay(LayerId(mint()), old, size)
    overlays = [new]
    if copy is not None:
        overlays.append(NewOverlay(copy.layer, old, copy.size))
    payload: dict[str, Any] = {
        "volume": record.id,
        "disks": [{"new": each.id, "old": old, "size": each.size} for each in overlays],
    }
    operation = Operation(
        kind=Kind.VOLUME, sandbox=have.writer.id if have.writer else None, payload=payload
    )
    await world.write(lambda tx: operations.begin(tx, operation))
    switched = False
    try:
        hit("volume-snapshot.row-written")
        await in_thread(world.store.make_overlays, overlays)
        hit("volume-snapshot.overlays-made")
        if have.is_open:
            assert have.writer is not None
            switched = True
            await _switch(world, have.writer, operation, payload, (old, new.id), level)
        sizes = await in_thread(world.store.seal, [old])
        hit("volume-snapshot.sealed")
    except BaseException:
        await _undo(world, have.writer, operation, asks=switched)
        raise

    def write(tx: Transaction) -> T:
        _grow_chain(tx, record.id, old, new, sizes[old])
        operations.end(tx, operation.id)
        sealed = Sealed(
            volume=record, layer=old, size=record.size, filesystem=record.filesystem, level=level
        )
        return also(tx, sealed)

    try:
        done = await world.write(write)
    except BaseException:
        await _undo(world, have.writer, operation, asks=switched)
        raise
    world.chains_changed.set()
    hit("volume-snapshot.written")
    return done


async def _choose_level(have: Held, wanted: Level | None) -> Level:
    """The level to try.

    :raise DeniedError: INVALID_STATE, when the one that was named cannot be had.
    """
    why_not = ""
    if not have.is_open:
        if not have.volume.clean:
            why_not = "its file system needs recovery; attach it to write once"
    else:
        assert have.writer is not None
        assert have.sandbox is not None
        assert have.attachment is not None
        if have.sandbox.state is not SandboxState.RUNNING:
            why_not = f"sandbox {have.sandbox.name!r}, which writes it, is {have.sandbox.state}"
        elif have.attachment.state is not AttachmentState.ATTACHED:
            why_not = f"sandbox {have.sandbox.name!r} has not mounted it"
        elif wanted is None and not await have.writer.agent_answers():
            why_not = "the guest's agent does not answer"
    if wanted is Level.APPLICATION and why_not:
        raise DeniedError(
            f"no application snapshot of volume {have.volume.name!r} is possible: {why_not}",
            volume=have.volume.id,
        )
    return wanted or (Level.CRASH if why_not else Level.APPLICATION)


async def _switch(
    world: World,
    guest: Guest,
    operation: Operation,
    payload: dict[str, Any],
    layers_: tuple[LayerId, LayerId],
    level: Level,
) -> None:
    """Put the new layer on top in a QEMU that has the old one open."""
    domain = guest.require_domain()
    old, new = (ChainLayer(id=each, path=world.store.layout.layer(each)) for each in layers_)
    await domain.disks.prepare([new])
    if level is Level.CRASH:
        await domain.disks.switch([(old, new)])
        hit("volume-snapshot.switched")
        return
    freeze = Freeze(world, guest.require_agent(), operation, payload)
    await freeze.begin()
    try:
        hit("volume-snapshot.frozen")
        await domain.disks.switch([(old, new)])
        hit("volume-snapshot.switched")
    finally:
        thawed = await settle(freeze.end())
    if verdict := freeze.verdict(thawed):
        raise FailedError(verdict, reason="FREEZE_FAILED")


async def undo(world: World, guests: Guests, operation: Operation) -> None:
    """Settle what a killed daemon left: no snapshot is made of it, and nothing written is lost."""
    guest = guests.of(operation.sandbox) if operation.sandbox else None
    if guest is None:
        await _undo(world, None, operation, asks=False)
        return
    async with guest.lock:
        if operation.payload.get("freezing") and guest.domain is not None:
            await thaw(guest.require_agent())
        await _undo(world, guest, operation, asks=True)


async def _undo(world: World, guest: Guest | None, operation: Operation, *, asks: bool) -> None:
    """Take the new layer away, or, where it may be written already, let the volume go on on it.

    :param asks: a QEMU may have switched to it. Where that cannot be asked any more, the new layer
        on top of the old one is right in either case.
    """
    layout, payload = world.store.layout, operation.payload
    first = payload["disks"][0]
    old, new = LayerId(first["old"]), NewOverlay(LayerId(first["new"]), first["old"], first["size"])
    made = layout.layer(new.id).exists()
    domain = guest.domain if guest else None
    if (
        asks
        and made
        and await _may_be_switched(domain, ChainLayer(id=new.id, path=layout.layer(new.id)))
    ):
        others = [LayerId(each["new"]) for each in payload["disks"][1:]]
        await in_thread(world.store.remove_overlays, others)
        sizes = await in_thread(world.store.seal, [old])

        def write(tx: Transaction) -> None:
            try:
                _grow_chain(tx, VolumeId(payload["volume"]), old, new, sizes[old])
            except NotFoundError:
                log.warning("volume %s is gone", payload["volume"])
            operations.end(tx, operation.id)

        if guest is None:
            await world.write(write)
            return

        async def pay() -> None:
            await world.write(write)

        # Owed until it is written, whatever comes in between: the disk *was* switched.
        guest.owe(pay)
        await guest.settle()
        return
    if domain is not None and asks:
        try:
            await domain.disks.drop([ChainLayer(id=new.id, path=layout.layer(new.id))])
        except StrataboxError as error:
            log.warning("the overlay of a failed snapshot stays in QEMU: %s", error)
    await in_thread(
        world.store.remove_overlays, [LayerId(each["new"]) for each in payload["disks"]]
    )
    await in_thread(layout.layer(old).chmod, 0o600)  # it may have been sealed; it goes on
    await world.write(lambda tx: operations.end(tx, operation.id))


async def _may_be_switched(domain: Domain | None, new: ChainLayer) -> bool:
    if domain is None:
        return True
    try:
        return new.node in (await domain.volumes.present()).values()
    except StrataboxError:
        return True


def _grow_chain(
    tx: Transaction, volume: VolumeId, old: LayerId, new: NewOverlay, taken: int
) -> None:
    volumes.get(tx, volume)  # or nothing is written
    layers.insert(
        tx,
        Layer(
            id=new.id,
            parent=old,
            state=LayerState.ACTIVE,
            size=new.size,
            created_at=tx.now,
        ),
    )
    layers.seal(tx, {old: taken})
    volumes.change(tx, volume, layer=new.id)
