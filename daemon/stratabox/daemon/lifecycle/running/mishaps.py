"""What happens to a running guest by itself, and what its record says of it then.

Each holds the guest's lock, as use cases do, and looks again before it acts. What the catalog
cannot be told (the disk that has stopped the guest is the catalog's, too) it is told later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratabox.daemon.hypervisor.events import BlockError, Panicked
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.running.disk_errors import note_failure
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.states import SandboxState

if TYPE_CHECKING:
    from stratabox.daemon.lifecycle.running.guest import Guest


async def stopped_by_itself(world: World, guest: Guest, event: Panicked | BlockError) -> None:
    """QEMU has stopped the guest: its kernel panicked, or a disk of the host failed."""

    async def note() -> None:
        async with guest.lock:
            domain = guest.domain
            if domain is None or (await guest.record()).state is not SandboxState.RUNNING:
                return
            if isinstance(event, Panicked):
                await _panicked(world, guest)
            elif await domain.status() != "running":  # else somebody has let it run again
                await _disk_stopped(world, guest, event)

    await world.surely(note, f"that {guest.id} was stopped")


async def disk_failed(world: World, guest: Guest, event: BlockError) -> None:
    """The host's disk gave an I/O error, which the guest was told."""

    async def note() -> None:
        async with guest.lock:
            # One that was taken out meanwhile is a volume, whose own record says it.
            if guest.domain is not None and event.node in guest.failed_nodes:
                await note_failure(world, await guest.record(), guest.domain, event)

    await world.surely(note, f"that a disk of {guest.id} failed")


async def ended(world: World, guest: Guest, state: SandboxState, reason: str) -> None:
    """Its process is gone: write that down. The guest's lock is held."""

    async def write() -> None:
        await world.change_sandbox(guest.id, state=state, state_reason=reason, ready=False)

    async def later() -> None:
        async with guest.lock:
            try:
                record = await guest.record()
            except NotFoundError:
                return
            if guest.domain is None and record.has_process:  # nobody has written it, or started it
                await write()

    await world.surely(write, f"the end of {guest.id}", later=later)


async def _panicked(world: World, guest: Guest) -> None:
    # What it panicked of comes first, the stack of calls after it can be long.
    console = guest.last_words("Kernel panic")
    await guest.end()
    reason = f"the guest's kernel panicked; its console says: {console}"
    await ended(world, guest, SandboxState.FAILED, reason)


async def _disk_stopped(world: World, guest: Guest, event: BlockError) -> None:
    reason = reasons.PAUSED_FULL if event.nospace else reasons.PAUSED_FAILED
    record = await guest.record()
    await world.change_sandbox(
        guest.id,
        state=SandboxState.PAUSED,
        state_reason=reasons.keeping(record.state_reason, reason),
    )
