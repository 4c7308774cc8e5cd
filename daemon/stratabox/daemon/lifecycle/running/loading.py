"""Bringing a domain to where only `cont` is missing: for a sandbox that starts, or for a spare."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import OnEvent
from stratabox.daemon.hypervisor.memory.load import load_devices
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.failpoints import hit
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.records import Sandbox


async def load(
    world: World,
    sandbox: Sandbox,
    memory: Origin | None,
    on_event: OnEvent,
    staged: Sequence[NewOverlay] = (),
) -> Domain:
    """Start a sandbox's domain and, where it goes on from saved memory, have it loaded.

    Its vCPUs are stopped. If this raises or is cancelled, nothing runs.

    :param memory: the saved memory that the guest goes on from; None: it boots.
    :param staged: its overlays that lie in its own folder, and in no catalog.
    :raise DeniedError: MACHINE_MISMATCH, when that memory cannot go on here.
    :raise FailedError: QEMU_FAILED.
    :raise CorruptError: when a file that the guest stands on is gone or damaged.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(world.opening.hold())
        spec = await world.domain_spec(sandbox, staged, memory.volumes if memory else None)
        if memory is not None:
            await world.memories.check_fits(memory)
            saved = await stack.enter_async_context(world.memories.use(memory))
            spec = replace(spec, saved=saved)
        handle = await world.launcher.start(spec)
    domain: Domain | None = None
    try:
        hit("boot.started")
        domain = await Domain.attach(handle, on_event, fresh=True, console=world.console_limits)
        if memory is not None:
            await load_devices(domain, wired=sandbox.machine.uplink)
    except BaseException:
        if domain is not None:
            await settle(domain.detach())
        await settle(world.launcher.stop(handle))
        raise
    return domain
