"""Growing a volume: first its disk, then, in a guest that writes it, its file system.

The disk is grown before the catalog says so. One that was grown by a daemon that died before that
is larger than its row; it is never made smaller again, since its guest may have seen it.
"""

from __future__ import annotations

from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.volumes import claims, settling
from stratabox.daemon.lifecycle.volumes.holding import Held, held
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.files import volumes as files
from stratabox.storage.model.errors import (
    DeniedError,
    InvalidArgumentError,
    UnavailableError,
)
from stratabox.storage.model.records import Volume
from stratabox.storage.model.states import SandboxState


async def grow(world: World, guests: Guests, reference: str, size: int) -> Volume:
    """Grow a volume to `size` bytes. As large already: its file system is, too, on return.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    :raise DeniedError: VOLUME_NOT_READY, VOLUME_IN_USE, INVALID_STATE.
    :raise InvalidArgumentError: INVALID_RESOURCES, when it is larger already.
    :raise FailedError: VOLUME_GROW_FAILED, QEMU_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    :raise NoSpaceError: NO_SPACE.
    """
    volume = await world.read(lambda tx: volumes.resolve(tx, reference))
    async with held(world, guests, volume) as have:
        layer = have.volume.layer
        claims.require_ready(have.volume)
        assert layer is not None
        if have.writer is None and have.volume.attachments:
            raise await world.read(lambda tx: claims.in_use(tx, have.volume))
        real = await in_thread(files.real_size, world.store.layout, layer)
        least = max(have.volume.size, real)
        if size < least:
            raise InvalidArgumentError(
                f"volume {have.volume.name!r} has {least} bytes and cannot be made smaller",
                reason="INVALID_RESOURCES",
                field="size_bytes",
                minimum=least,
            )
        if have.sandbox is not None and have.sandbox.state is SandboxState.PAUSED:
            raise DeniedError(
                f"volume {have.volume.name!r} is sandbox {have.sandbox.name!r}'s, which is paused:"
                " resume it first",
                sandbox=have.sandbox.id,
                volume=volume,
            )
        if have.is_open:
            await _grow_open(world, have, size)
        else:
            await in_thread(files.grow, world.store.layout, layer, size)
            hit("volume.grown")
            await _write(world, have.volume, size)
        return await world.read(lambda tx: volumes.get(tx, volume))


async def _grow_open(world: World, have: Held, size: int) -> None:
    guest, attachment, volume = have.writer, have.attachment, have.volume
    assert guest is not None
    assert attachment is not None
    assert volume.layer is not None
    if not guest.is_ready:
        raise UnavailableError(
            f"the agent of the sandbox that has volume {volume.name!r} has not answered since its"
            " start: wait until it is ready",
            reason="AGENT_UNAVAILABLE",
            sandbox=guest.id,
        )
    domain = guest.require_domain()
    if size > volume.size:
        top = ChainLayer(id=volume.layer, path=world.store.layout.layer(volume.layer))
        await domain.volumes.resize(top.node, size)
        hit("volume.grown")
        await _write(world, volume, size)
        hit("volume.grown-written")
    await settling.bring(settling.running(world, guest), attachment)


async def _write(world: World, volume: Volume, size: int) -> None:
    def write(tx: Transaction) -> None:
        assert volume.layer is not None
        layers.resize(tx, volume.layer, size)
        volumes.change(tx, volume.id, size=size)

    await world.write(write)
