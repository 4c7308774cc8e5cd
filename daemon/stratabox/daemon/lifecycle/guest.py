"""One sandbox's running side: its domain, its agent, and the sole writer of its state.

Use cases take `lock` for as long as they change what runs or what it stands on; waiting for a
guest to become ready, and commands in it, go on without it. What happens by itself (the guest
powers off, QEMU dies, a disk fills) arrives as an event and takes the same lock.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from stratabox.daemon.hypervisor.agent import GuestAgent
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import AgentPort, BlockError, Event, Panicked, Reset
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.hypervisor.memory.load import wait_loaded
from stratabox.daemon.lifecycle.events import Happening
from stratabox.daemon.lifecycle.threads import in_thread, settle
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import (
    ConflictError,
    DeniedError,
    FailedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import SandboxState

log = logging.getLogger(__name__)

PAUSED_BY_USER = "paused by request"
PAUSED_BY_DISK = "the host's disk was full or failed: look at it, then resume"


def nothing_more(tx: Transaction) -> None:
    """For :meth:`Guest.boot`: no change beside the sandbox's own."""


class Guest:
    """The running side of one sandbox."""

    def __init__(self, world: World, sandbox: SandboxId) -> None:
        self.id = sandbox
        self.lock = asyncio.Lock()
        self.hurry = asyncio.Event()
        """Set by whoever wants the guest gone now: an orderly shutdown stops waiting."""
        self._world = world
        self._domain: Domain | None = None
        self._agent: GuestAgent | None = None
        self._ready = asyncio.Event()
        self._reset = asyncio.Event()
        self._continued = False
        self._tasks: list[asyncio.Task[None]] = []
        self._debt: Callable[[], Awaitable[object]] | None = None

    # Looking

    @property
    def domain(self) -> Domain | None:
        """The running domain, if there is one."""
        return self._domain

    @property
    def is_ready(self) -> bool:
        """The agent has answered since this start."""
        return self._ready.is_set()

    async def record(self) -> Sandbox:
        """The sandbox's record. :raise NotFoundError: SANDBOX_NOT_FOUND."""
        return await self._world.read(lambda tx: sandboxes.get(tx, self.id))

    def require_domain(self) -> Domain:
        """The running domain. :raise DeniedError: INVALID_STATE, when there is none."""
        if self._domain is None:
            raise DeniedError(f"sandbox {self.id} is not running", sandbox=self.id)
        return self._domain

    def require_agent(self) -> GuestAgent:
        """The agent's channel. :raise DeniedError: INVALID_STATE, when nothing runs."""
        if self._agent is None:
            raise DeniedError(f"sandbox {self.id} is not running", sandbox=self.id)
        return self._agent

    async def agent_answers(self, seconds: float = 2) -> bool:
        """Ask the agent for a sign of life."""
        if self._agent is None or not self.is_ready:
            return False
        try:
            await self._agent.ping(seconds)
        except UnavailableError:
            return False
        return True

    # Coming and going. The caller holds the lock.

    def owe(self, debt: Callable[[], Awaitable[object]]) -> None:
        """Remember a change of the disks that the catalog could not be told of."""
        self._debt = debt

    async def settle(self) -> None:
        """Tell the catalog what it missed; before anything that trusts the record's disks.

        :raise StrataboxError: when that still cannot be done; nothing else may be, then.
        """
        if self._debt is not None:
            await self._debt()
            self._debt = None

    async def boot(
        self,
        sandbox: Sandbox,
        also: Callable[[Transaction], None] = nothing_more,
        memory: Snapshot | None = None,
    ) -> Sandbox:
        """Start the domain and write RUNNING; `also` joins that transaction.

        If this raises or is cancelled, nothing runs.

        :param memory: a snapshot whose saved memory the guest goes on from; None: it boots.
        :raise DeniedError: MACHINE_MISMATCH, when that memory cannot go on here.
        :raise FailedError: QEMU_FAILED.
        :raise CorruptError: when a file that the guest stands on is gone.
        """
        world = self._world
        await self.settle()
        spec = await world.domain_spec(sandbox)
        async with AsyncExitStack() as stack:
            if memory is not None:
                await world.memories.check_fits(memory)
                saved = await stack.enter_async_context(world.memories.use(memory))
                spec = replace(spec, saved=saved)
            handle = await world.launcher.start(spec)
        domain: Domain | None = None
        # Before the guest goes on: one that continues opens its agent's port at once.
        self._agent = GuestAgent(spec.folder)
        try:
            hit("boot.started")
            domain = await Domain.attach(handle, self._on_event)
            if memory is not None:
                await wait_loaded(domain)
            await domain.cont()
            machine = replace(sandbox.machine, qemu_version=world.qemu.version_text)

            def running(tx: Transaction) -> Sandbox:
                also(tx)
                return sandboxes.change(
                    tx, self.id, state=SandboxState.RUNNING, state_reason="", ready=False,
                    ready_at=None, started_at=tx.now, clean_shutdown=False, machine=machine,
                    ram_origin=memory.id if memory else None, ram_since=None,
                )  # fmt: skip

            record = await world.write(running)
        except BaseException:
            self._agent = None
            if domain is not None:
                await settle(domain.detach())
            await settle(world.launcher.stop(handle))
            raise
        self._continued = memory is not None
        self._take(domain)
        world.bus.publish(Happening.UPDATED, record)
        hit("boot.running-written")
        log.info("sandbox %s runs, pid %d", self.id, handle.pid)
        return record

    async def adopt(self, handle: DomainHandle, *, ready: bool) -> Domain:
        """Take over a domain that an earlier daemon started.

        :param ready: its agent has answered before, so it can be spoken to at once.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when it does not answer.
        """
        domain = await Domain.attach(handle, self._on_event)
        self._take(domain)
        if ready:
            self._ready.set()
        return domain

    async def end(self) -> None:
        """End the domain at once, if there is one. The record is the caller's to write."""
        domain = self._release()
        if domain is not None:
            await settle(self._kill(domain))

    async def forget_folder(self) -> None:
        """Remove the sandbox's folder (sockets, QEMU's messages)."""
        folder = self._world.store.layout.sandbox(self.id)
        await in_thread(shutil.rmtree, folder, ignore_errors=True)

    def let_go(self) -> None:
        """Stop watching; the guest runs on. For the daemon's own end."""
        domain = self._release()
        if domain is not None:
            self._world.tasks.spawn(domain.detach(), f"detach {self.id}")

    # Waiting, without the lock.

    async def wait_ready(self, timeout: float) -> Sandbox:
        """Wait until the agent has answered since this start.

        :param timeout: seconds.
        :raise UnavailableError: AGENT_UNAVAILABLE, when it has not, with the console's last lines.
        :raise FailedError: GUEST_ENDED, when the guest ended first.
        :raise ConflictError: INTERRUPTED, when somebody ended it first.
        """
        domain = self._domain
        if domain is None:
            sandbox = await self.record()
            raise ConflictError(
                f"sandbox {sandbox.name!r} is {sandbox.state} ({sandbox.state_reason})",
                reason="INTERRUPTED",
                sandbox=self.id,
            )
        ready = asyncio.create_task(self._ready.wait())
        try:
            either: set[asyncio.Future[Any]] = {ready, domain.exited}
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if domain.exited.cancelled():
                raise ConflictError(
                    "the sandbox was ended before its agent answered",
                    reason="INTERRUPTED",
                    sandbox=self.id,
                )
            if domain.exited.done():
                raise FailedError(
                    f"the guest ended before its agent answered: {domain.exited.result().reason}",
                    reason="GUEST_ENDED",
                    sandbox=self.id,
                )
            if not ready.done():
                raise UnavailableError(
                    f"the guest's agent did not answer within {timeout:g} s; its console says:"
                    f" {await self._console() or '(nothing)'}",
                    reason="AGENT_UNAVAILABLE",
                    sandbox=self.id,
                )
        finally:
            ready.cancel()
        return await self.record()

    # Inside

    def _take(self, domain: Domain) -> None:
        self._domain = domain
        if self._agent is None:
            self._agent = GuestAgent(domain.handle.folder)
        self._ready.clear()
        self._tasks = [
            asyncio.create_task(self._watch_exit(domain), name=f"watch {self.id}"),
            asyncio.create_task(self._watch_agent(domain), name=f"agent {self.id}"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._watcher_ended)

    def _watcher_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            # QEMU that died under it is told of by the other watcher; anything else is a bug.
            level = logging.INFO if isinstance(error, StrataboxError) else logging.ERROR
            log.log(level, "%s ended: %s", task.get_name(), error, exc_info=error)

    def _release(self) -> Domain | None:
        domain, self._domain = self._domain, None
        agent, self._agent = self._agent, None
        if agent is not None:
            self._world.tasks.spawn(agent.close(), f"close agent {self.id}")
        self._ready.clear()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = []
        return domain

    async def _kill(self, domain: Domain) -> None:
        await domain.detach()
        await self._world.launcher.stop(domain.handle)

    async def _console(self) -> str:
        try:
            return await self.require_domain().serial_tail()
        except StrataboxError:
            return ""

    def _on_event(self, event: Event) -> None:
        """What QEMU tells by itself. Called in the event loop; must not block."""
        match event:
            case Reset():
                self._reset.set()
                if self._agent is not None:
                    self._agent.port_changed(is_open=False)
            case AgentPort(open=is_open) if self._agent is not None:
                self._agent.port_changed(is_open=is_open)
            case Panicked() | BlockError(action="stop"):
                self._world.tasks.spawn(self._stopped_by_itself(event), f"stopped {self.id}")

    async def _watch_exit(self, domain: Domain) -> None:
        """See the domain end by itself, and write down why."""
        await asyncio.wait({domain.exited})
        if domain.exited.cancelled():
            return
        ending = domain.exited.result()
        async with self.lock:
            if self._domain is not domain:
                return  # ended on purpose, by a use case that held the lock
            self._release()
            await self._kill(domain)
            log.warning("sandbox %s ended: %s", self.id, ending.reason)
            await self._world.change_sandbox(
                self.id,
                state=SandboxState.STOPPED if ending.guest else SandboxState.FAILED,
                state_reason=ending.reason,
                ready=False,
            )

    async def _stopped_by_itself(self, event: Panicked | BlockError) -> None:
        """QEMU has stopped the guest: its kernel panicked, or a disk of the host failed."""
        async with self.lock:
            domain = self._domain
            if domain is None or (await self.record()).state is not SandboxState.RUNNING:
                return
            if isinstance(event, Panicked):
                console = await self._console()
                await self.end()
                await self._world.change_sandbox(
                    self.id,
                    state=SandboxState.FAILED,
                    state_reason=f"the guest's kernel panicked; its console says: {console}",
                    ready=False,
                )
                return
            if await domain.status() == "running":
                return  # somebody has let it run again
            reason = (
                "the host's disk is full: free some space, then resume"
                if event.nospace
                else "the host's disk failed: look at it before you resume"
            )
            await self._world.change_sandbox(
                self.id, state=SandboxState.PAUSED, state_reason=reason
            )

    async def _watch_agent(self, domain: Domain) -> None:
        """See the agent answer after every start and reset, and write it down."""
        limit = self._world.config.ready_timeout
        agent = self.require_agent()
        if await domain.agent_port_open():
            agent.port_changed(is_open=True)
        while True:
            self._reset.clear()
            waiting = asyncio.create_task(agent.wait_ready(limit))
            reset = asyncio.create_task(self._reset.wait())
            try:
                await asyncio.wait({waiting, reset}, return_when=asyncio.FIRST_COMPLETED)
                if not reset.done():
                    try:
                        waiting.result()
                    except UnavailableError:
                        self._ready.clear()
                        await self._note(
                            ready=False,
                            state_reason=f"the guest's agent has not answered for {limit:g} s",
                        )
                        continue
                    if self._continued:
                        await self._set_clock(agent)
                    # Written first: whoever is woken by it reads a record that says so.
                    await self._note(ready=True, state_reason="")
                    self._ready.set()
                    await reset
            finally:
                waiting.cancel()
                reset.cancel()
            self._ready.clear()
            await self._note(
                ready=False, state_reason="the guest was reset; its agent has not answered yet"
            )

    async def _set_clock(self, agent: GuestAgent) -> None:
        """A guest that goes on from its memory woke up at the instant of its snapshot."""
        self._continued = False
        try:
            await agent.set_time(time.time_ns())
        except StrataboxError as error:
            log.warning("the clock of sandbox %s stays behind: %s", self.id, error)

    async def _note(self, *, ready: bool, state_reason: str) -> None:
        """Write readiness, unless the record has moved on; a pause's reason is kept."""

        def write(tx: Transaction) -> Sandbox | None:
            old = sandboxes.get(tx, self.id)
            if old.state is not SandboxState.RUNNING:
                return None
            if (old.ready, old.state_reason) == (ready, state_reason):
                return None
            return sandboxes.change(
                tx,
                self.id,
                ready=ready,
                ready_at=tx.now if ready else None,
                state_reason=state_reason,
            )

        record = await self._world.write(write)
        if record is not None:
            self._world.bus.publish(Happening.UPDATED, record)
