"""Brings the volumes of a running guest to where its rows say they are.

```
 claimed ──▶ plugged in ──▶ mounted ──▶ ATTACHED        (bring)
 DETACHING ──▶ unmounted ──▶ taken out ──▶ released     (take)
 a stand-in, or what no row names ──▶ given up by the guest ──▶ taken out
```

The same steps serve a call to attach or detach, every boot, a guest that goes on from saved memory,
and what a daemon left that was killed on the way: each asks QEMU and the guest what is there.
Whoever calls holds the guest's lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.guest import volumes as in_guest
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.machine import STAND_IN, DomainVolume
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.guest_lock import GuestLock
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.volumes import places
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import attachments, sandboxes, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.model.errors import (
    ConflictError,
    CorruptError,
    DeniedError,
    FailedError,
    StrataboxError,
)
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Attachment, Sandbox, Volume
from stratabox.storage.model.states import AttachmentState

T = TypeVar("T")

log = logging.getLogger(__name__)

FAILED = (
    "the host's disk gave an error under it, and what was written to it may be lost. Look at the"
    " host's disk, then detach it where it is attached, and attach it to write"
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A guest that runs, and can be spoken to."""

    world: World
    id: SandboxId
    domain: Domain
    agent: GuestAgent
    hurry: asyncio.Event
    """Set by whoever wants the guest gone now: it is not waited for, then."""
    failed_nodes: set[str]
    """What QEMU has told an I/O error of."""

    async def ask(self, errand: Coroutine[Any, Any, T]) -> T:
        """Have something done in the guest.

        :raise ConflictError: INTERRUPTED, as soon as somebody wants the guest gone. What was begun
            ends with it.
        """
        task = self.world.tasks.spawn(errand, f"volumes of {self.id}")
        hurry = asyncio.create_task(self.hurry.wait())
        try:
            either: set[asyncio.Future[Any]] = {task, hurry}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConflictError(
                    "the sandbox is being ended", reason="INTERRUPTED", sandbox=self.id
                )
            return task.result()
        finally:
            hurry.cancel()


class Guestlike(Protocol):
    """What is needed of a sandbox's running side."""

    id: SandboxId
    lock: GuestLock
    has_volumes: bool
    failed_nodes: set[str]

    @property
    def domain(self) -> Domain | None:
        """The running domain, if there is one."""

    def require_domain(self) -> Domain:
        """The running domain. :raise DeniedError: INVALID_STATE, when there is none."""

    def require_agent(self) -> GuestAgent:
        """The agent's channel. :raise DeniedError: INVALID_STATE, when nothing runs."""


def running(world: World, guest: Guestlike) -> Running:
    """A guest that runs. :raise DeniedError: INVALID_STATE, when it does not."""
    return Running(
        world=world,
        id=guest.id,
        domain=guest.require_domain(),
        agent=guest.require_agent(),
        hurry=guest.lock.hurry,
        failed_nodes=guest.failed_nodes,
    )


async def see_to(world: World, guest: Guestlike) -> StrataboxError | None:
    """As `settle`, with the guest's lock, where there may be something to do."""
    if not guest.has_volumes:
        return None
    async with guest.lock:
        if guest.domain is None:
            return None
        return await settle(running(world, guest))


async def settle(guest: Running) -> StrataboxError | None:
    """See to all of a guest's volumes, once its agent has answered.

    :return: the first thing that could not be done; the record says where each volume is.
    :raise UnavailableError: AGENT_UNAVAILABLE, MONITOR_UNAVAILABLE.
    :raise ConflictError: INTERRUPTED.
    """
    record = await guest.world.read(lambda tx: sandboxes.get(tx, guest.id))
    if not record.machine.volumes:
        return None
    problem = await _give_up_strange(guest, record)
    for attachment in sorted(record.volumes, key=lambda each: each.path):
        try:
            if attachment.state is AttachmentState.DETACHING:
                await _finish_detach(guest, attachment)
            else:
                await bring(guest, attachment)
        except (FailedError, CorruptError) as error:
            log.warning("sandbox %s: volume %s: %s", guest.id, attachment.volume, error)
            what = f"volume {attachment.volume_name!r}: {error.message}"
            problem = problem or type(error)(what, reason=error.reason, **error.metadata)
            mounted = error.reason == "VOLUME_GROW_FAILED"
            state = AttachmentState.ATTACHED if mounted else AttachmentState.ATTACHING
            await note(guest, attachment, state)
    return problem


async def bring(guest: Running, attachment: Attachment) -> Sandbox:
    """Plug a volume in, where it is not yet, and have it mounted and grown to its size.

    :return: the sandbox's record.
    :raise FailedError: QEMU_FAILED, VOLUME_MOUNT_FAILED, VOLUME_GROW_FAILED.
    :raise CorruptError: LAYER_MISSING.
    :raise UnavailableError: AGENT_UNAVAILABLE, MONITOR_UNAVAILABLE.
    :raise ConflictError: INTERRUPTED.
    """
    world = guest.world

    def look(tx: Transaction) -> tuple[Volume, DomainVolume]:
        volume = volumes.get(tx, attachment.volume)
        return volume, places.plugged(tx, world.store.layout, attachment)

    with world.opening.hold():
        volume, place = await world.read(look)
        if attachment.slot not in await guest.domain.volumes.present():
            await guest.domain.volumes.plug(place)
    hit("volume.plugged")
    grows = not attachment.read_only and volume.filesystem < volume.size
    wanted = in_guest.Place(
        slot=attachment.slot,
        serial=place.serial,
        path=attachment.path,
        read_only=attachment.read_only,
        size=volume.size,
    )
    await guest.ask(in_guest.mount(guest.agent, wanted, grow=grows))
    hit("volume.mounted")

    def write(tx: Transaction) -> Sandbox:
        if grows:
            volumes.change(tx, volume.id, filesystem=volume.size)
        attachments.change(tx, guest.id, volume.id, AttachmentState.ATTACHED)
        return sandboxes.change(tx, guest.id)

    record = await world.write(write)
    hit("volume.attached-written")
    world.bus.publish(Happening.UPDATED, record)
    return record


async def take(
    guest: Running, attachment: Attachment, *, force: bool = False, clean: bool = True
) -> Sandbox:
    """Have the guest let go of a volume, take it out, and release it.

    :param force: do not ask the guest.
    :param clean: its file system is clean once the guest has let go of it.
    :return: the sandbox's record.
    :raise FailedError: VOLUME_BUSY, when the guest does not let go; QEMU_FAILED.
    :raise UnavailableError: AGENT_UNAVAILABLE, MONITOR_UNAVAILABLE.
    :raise ConflictError: INTERRUPTED.
    """
    if not force:
        serial = places.serial_of(attachment.volume)
        await guest.ask(in_guest.unmount(guest.agent, attachment.slot, serial))
        hit("volume.unmounted")
    failed = await unplug(guest, attachment)
    hit("volume.unplugged")
    return await release(guest.world, attachment, clean=clean and not force, failed=failed)


async def unplug(guest: Running, attachment: Attachment) -> bool:
    """Take a volume out, and put what QEMU wrote of it on the host's disk.

    :return: that disk has failed. No guest says so when it unmounts, and word of it may still wait
        for the guest's lock; but QEMU has told of it before it answers here.
    :raise FailedError: QEMU_FAILED.
    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    layout = guest.world.store.layout

    def look(tx: Transaction) -> tuple[DomainVolume, set[str]]:
        keep = places.shared_nodes(tx, layout, guest.id, attachment.volume)
        return places.plugged(tx, layout, attachment), keep

    place, keep = await guest.world.read(look)
    await guest.domain.volumes.unplug(attachment.slot, place.chain, keep)
    if not attachment.read_only:
        await in_thread(durable.sync_file, place.chain[0].path)
    failed = guest.failed_nodes & {layer.node for layer in place.chain}
    guest.failed_nodes.difference_update(failed - keep)
    return bool(failed)


async def release(
    world: World, attachment: Attachment, *, clean: bool, failed: bool = False
) -> Sandbox:
    """Give a volume back, in the catalog, once nothing can touch it any more.

    :param clean: its file system was unmounted.
    :param failed: its disk gave an I/O error meanwhile: it is marked, and not clean.
    """

    def write(tx: Transaction) -> Sandbox:
        attachments.delete(tx, attachment.sandbox, attachment.volume)
        if failed:
            volumes.note_failed(tx, attachment.volume, FAILED)
        volume = volumes.get(tx, attachment.volume)
        now_clean = clean and not attachment.read_only and not volume.reason
        volumes.change(tx, volume.id, clean=volume.clean or now_clean)
        return sandboxes.change(tx, attachment.sandbox)

    record = await world.write(write)
    hit("volume.released")
    world.bus.publish(Happening.UPDATED, record)
    return record


async def note(guest: Running, attachment: Attachment, state: AttachmentState) -> Sandbox:
    """Write where an attachment is in its life."""

    def write(tx: Transaction) -> Sandbox:
        attachments.change(tx, guest.id, attachment.volume, state)
        return sandboxes.change(tx, guest.id)

    record = await guest.world.write(write)
    guest.world.bus.publish(Happening.UPDATED, record)
    return record


async def check_settled(domain: Domain, sandbox: Sandbox) -> None:
    """Make sure that what the guest has on its bus is what its rows say, before it is saved.

    :raise DeniedError: VOLUMES_UNSETTLED.
    """
    if not (sandbox.volumes or sandbox.left_behind):
        return  # then nothing can be there
    present = await domain.volumes.present()
    strange = any(node.startswith(STAND_IN) for node in present.values())
    if strange or set(present) != {each.slot for each in sandbox.volumes}:
        raise DeniedError(
            f"the volumes of sandbox {sandbox.name!r} are not all where they are to be:"
            " wait until it is ready, or detach what cannot be mounted",
            reason="VOLUMES_UNSETTLED",
            sandbox=sandbox.id,
        )


async def behind(domain: Domain, sandbox: Sandbox, node: str) -> list[Attachment]:
    """The volume whose device begins with a node; none, when it is none's.

    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    present = await domain.volumes.present() if sandbox.volumes else {}
    return [each for each in sandbox.volumes if present.get(each.slot) == node]


async def _finish_detach(guest: Running, attachment: Attachment) -> None:
    """A killed daemon had begun it. A guest that does not let go keeps the volume."""
    try:
        await take(guest, attachment)
    except FailedError as error:
        if error.reason != "VOLUME_BUSY":
            raise
        log.info("sandbox %s keeps volume %s: %s", guest.id, attachment.volume, error)
        await note(guest, attachment, AttachmentState.ATTACHED)


async def _give_up_strange(guest: Running, record: Sandbox) -> StrataboxError | None:
    """Have the guest forget, and take out, what is none of its volumes."""
    own = {each.slot for each in record.volumes}
    present = await guest.domain.volumes.present()
    strange = [
        slot for slot, node in present.items() if node.startswith(STAND_IN) or slot not in own
    ]
    if not strange:
        return None
    problem = None
    try:
        await guest.ask(in_guest.leave(guest.agent, strange))
    except FailedError as error:
        problem = error  # out they go all the same: nothing of them is real
    hit("volume.left")
    for slot in strange:
        await guest.domain.volumes.unplug(slot, ())
    return problem
