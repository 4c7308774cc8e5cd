"""Having a volume to oneself, together with the guest that writes it, if there is one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import volumes
from stratabox.storage.model.ids import SandboxId, VolumeId
from stratabox.storage.model.records import Attachment, Sandbox, Volume


@dataclass(frozen=True, kw_only=True)
class Held:
    """A volume that nobody else changes meanwhile."""

    volume: Volume
    writer: Guest | None
    """Whose lock is held too."""
    sandbox: Sandbox | None
    """The writer's record."""
    attachment: Attachment | None
    """How the writer has it."""

    @property
    def is_open(self) -> bool:
        """A QEMU has it open to write."""
        return self.writer is not None and self.writer.domain is not None


@asynccontextmanager
async def held(world: World, guests: Guests, volume: VolumeId) -> AsyncIterator[Held]:
    """Hold a volume, and the guest of the sandbox that has it to write.

    Who comes to have it meanwhile is found out, and waited for.

    :raise NotFoundError: VOLUME_NOT_FOUND.
    """
    record = await world.read(lambda tx: volumes.get(tx, volume))
    while True:
        before = _writer(record)
        async with AsyncExitStack() as stack:
            guest = None
            if before is not None:
                guest = guests.of(before.sandbox)
                await stack.enter_async_context(guest.lock)
            await stack.enter_async_context(world.volume_locks.hold(volume))
            record = await world.read(lambda tx: volumes.get(tx, volume))
            now = _writer(record)
            if _sandbox(now) != _sandbox(before):
                continue
            if guest is not None:
                await guest.settle()
                record = await world.read(lambda tx: volumes.get(tx, volume))
            yield Held(
                volume=record,
                writer=guest,
                sandbox=await guest.record() if guest else None,
                attachment=_writer(record),
            )
            return


def _writer(volume: Volume) -> Attachment | None:
    return next((each for each in volume.attachments if not each.read_only), None)


def _sandbox(attachment: Attachment | None) -> SandboxId | None:
    return attachment.sandbox if attachment else None
