"""Running, holding and stopping what a sandbox is; and commands in it.

Each takes the guest's lock, but for commands: those go on side by side with everything else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stratabox.daemon.hypervisor.guest import exec as guest_exec
from stratabox.daemon.hypervisor.guest import wants
from stratabox.daemon.hypervisor.guest.identity import errand
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.threads import undone_by
from stratabox.daemon.lifecycle.running import parking, probing, reasons
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.thawing import thaw_after_full_disk
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import volumes
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import StrataboxError, UnavailableError
from stratabox.storage.model.probes import Probe, chosen
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import Identity, SandboxState

log = logging.getLogger(__name__)


async def start(world: World, guest: Guest, probe: Probe | None = None) -> Sandbox:
    """Boot a stopped or failed sandbox from its disks.

    :param probe: what must pass from now on before it is ready; None: what it has.
    :raise DeniedError: INVALID_STATE.
    :raise FailedError: QEMU_FAILED; the record stays as it was.
    """
    async with guest.lock:
        sandbox = await guest.record()
        policy.require_state(sandbox, SandboxState.STOPPED, SandboxState.FAILED, action="start")
        if probe is not None:
            new = chosen(probing.check(probe), None)
            sandbox = await world.change_sandbox(guest.id, probe=new)
        accelerator = world.accelerator.name
        machine = replace(sandbox.machine.up_to_date(), accelerator=accelerator)
        return await guest.boot(replace(sandbox, machine=machine))


async def stop(world: World, guest: Guest, *, force: bool, timeout: float) -> Sandbox:
    """Shut the guest down through its agent, and by force when that takes too long.

    :param timeout: seconds that the guest may take.
    :raise DeniedError: INVALID_STATE.
    """
    async with guest.lock.in_a_hurry() if force else guest.lock:
        sandbox = await guest.record()
        if sandbox.state is SandboxState.STOPPED:
            return sandbox
        policy.require_state(sandbox, SandboxState.RUNNING, SandboxState.PAUSED, action="stop")
        if sandbox.ram_parked:
            why_not = "its memory, which was paused to disk, was given up"
        elif force:
            why_not = "by request"
        elif sandbox.state is SandboxState.PAUSED:
            why_not = "a paused guest cannot be asked"
        elif guest.domain is None:
            why_not = "it had been ended, and the catalog could not be told"
        else:
            why_not = await _shut_down(guest, timeout)
        await guest.end()
        hit("stop.stopped")
        record = await world.change_sandbox(
            guest.id,
            state=SandboxState.STOPPED,
            state_reason=f"power cut: {why_not}" if why_not else "shut down by request",
            ready=False,
            clean_shutdown=not why_not,
        )
        if record.clean_shutdown and record.volumes:
            await world.write(lambda tx: volumes.note_clean(tx, guest.id))
    await world.sweep()
    return record


async def pause_to_disk(world: World, guest: Guest, **changes: Any) -> Sandbox:
    """Save the guest's memory and end its process; `resume` goes on at that instant.

    :param changes: of the record, written with it.
    :raise StrataboxError: as ``parking.park``; the guest is as it was, then.
    """
    async with guest.lock:
        with world.rush.hold():
            record = await parking.park(world, guest, **changes)
    await world.sweep()
    return record


async def pause(world: World, guest: Guest) -> Sandbox:
    """Stop the vCPUs. Paused already, to disk too, is fine. :raise DeniedError: INVALID_STATE."""
    async with guest.lock:
        sandbox = await guest.record()
        paused = reasons.keeping(sandbox.state_reason, reasons.PAUSED_BY_USER)
        if sandbox.state is SandboxState.PAUSED:
            if reasons.is_full(sandbox.state_reason):
                # It would go on by itself.
                return await world.change_sandbox(guest.id, state_reason=paused)
            return sandbox
        policy.require_state(sandbox, SandboxState.RUNNING, action="pause")
        domain = guest.require_domain()
        async with undone_by(domain.cont):
            await domain.pause()
            hit("pause.stopped")
            return await world.change_sandbox(
                guest.id, state=SandboxState.PAUSED, state_reason=paused
            )


async def resume(world: World, guest: Guest, identity: Identity | None = None) -> Sandbox:
    """Let a paused guest go on, from memory or from disk. It is not waited for.

    :param identity: who it is from now on; None: what is due, and otherwise who it was.
    :raise DeniedError: INVALID_STATE.
    :raise StrataboxError: as ``parking.unpark``; one that is paused to disk stays so, then.
    """
    async with guest.lock:
        sandbox = await guest.record()
        if sandbox.state is SandboxState.RUNNING:
            return sandbox
        policy.require_state(sandbox, SandboxState.PAUSED, action="resume")
        if sandbox.ram_parked is not None:
            return await parking.unpark(world, guest, identity)
        record = await guest.go_on(identity)
        await thaw_after_full_disk(guest, sandbox.state_reason)
        return record


async def execute(
    guest: Guest,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    timeout: float | None,
) -> guest_exec.ExecResult:
    """Run one command in the guest.

    :param timeout: seconds; None: no limit.
    :raise DeniedError: INVALID_STATE, when the sandbox does not run.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    sandbox = await guest.record()
    policy.require_state(sandbox, SandboxState.RUNNING, action="execute a command in")
    if not guest.is_ready:
        raise UnavailableError(
            f"the agent of sandbox {sandbox.name!r} has not answered since its start:"
            " wait until it is ready",
            reason="AGENT_UNAVAILABLE",
            sandbox=guest.id,
        )
    environment = {**sandbox.env, **env}
    agent, debt = guest.require_agent(), guest.telling.first()
    result = None
    try:
        directory = cwd or environment.get("HOME", "/root")
        async with guest.telling.turn():
            result = await guest_exec.execute(
                agent,
                argv,
                env=environment,
                cwd=directory,
                timeout=timeout,
                first=errand() if debt else None,
            )
        return await wants.look(agent, result, directory)
    finally:
        if debt:
            await guest.telling.heard(agent, debt, result)


async def _shut_down(guest: Guest, timeout: float) -> str:
    """Ask the guest to power off; say why it did not, in order and in time. "": it did."""
    domain, agent = guest.require_domain(), guest.require_agent()
    if not guest.is_ready:
        return "the guest's agent had not answered yet"
    try:
        await agent.shutdown()
    except StrataboxError as error:
        log.warning("sandbox %s: no orderly shutdown: %s", guest.id, error)
        return f"the guest did not take the request: {error.message}"
    hurry = asyncio.create_task(guest.lock.hurry.wait())
    try:
        either: set[asyncio.Future[Any]] = {hurry, domain.exited}
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if domain.exited.done():
            ending = domain.exited.result()
            return "" if ending.guest else ending.reason
        return "the guest did not shut down in time"
    finally:
        hurry.cancel()
