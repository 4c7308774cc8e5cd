"""What happens to a running guest by itself, and what its record says of it then.

Each takes the guest's lock, as use cases do, and looks again before it acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratabox.daemon.hypervisor.events import BlockError, Panicked
from stratabox.daemon.lifecycle.running import reasons
from stratabox.daemon.lifecycle.running.disk_errors import note_failure
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.states import SandboxState

if TYPE_CHECKING:
    from stratabox.daemon.lifecycle.running.guest import Guest


async def stopped_by_itself(world: World, guest: Guest, event: Panicked | BlockError) -> None:
    """QEMU has stopped the guest: its kernel panicked, or a disk of the host failed."""
    async with guest.lock:
        domain = guest.domain
        if domain is None or (await guest.record()).state is not SandboxState.RUNNING:
            return
        if isinstance(event, Panicked):
            # What it panicked of comes first, the stack of calls after it can be long.
            console = guest.last_words("Kernel panic")
            await guest.end()
            await world.change_sandbox(
                guest.id,
                state=SandboxState.FAILED,
                state_reason=f"the guest's kernel panicked; its console says: {console}",
                ready=False,
            )
            return
        if await domain.status() == "running":
            return  # somebody has let it run again
        reason = reasons.PAUSED_FULL if event.nospace else reasons.PAUSED_FAILED
        record = await guest.record()
        await world.change_sandbox(
            guest.id,
            state=SandboxState.PAUSED,
            state_reason=reasons.keeping(record.state_reason, reason),
        )


async def disk_failed(world: World, guest: Guest, event: BlockError) -> None:
    """The host's disk gave an I/O error, which the guest was told."""
    async with guest.lock:
        # One that was taken out meanwhile is a volume, whose own record says it.
        if guest.domain is not None and event.node in guest.failed_nodes:
            await note_failure(world, await guest.record(), guest.domain, event)
