"""One sandbox's running side: its domain, its agent, and the sole writer of its state.

Use cases take `lock` for as long as they change what runs or what it stands on; waiting for a
guest to become ready, and commands in it, go on without it. What happens by itself (the guest
powers off, QEMU dies, a disk fills) arrives as an event and takes the same lock.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import asyncssh

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import (
    AgentPort,
    BlockError,
    ChannelPort,
    Event,
    Panicked,
    Reset,
)
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.channel import Channel
from stratabox.daemon.hypervisor.guest.exec_port import ExecPort
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.hypervisor.qemu_host import random_mac
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.common.guest_lock import GuestLock
from stratabox.daemon.lifecycle.common.threads import in_thread, settle, undone_by
from stratabox.daemon.lifecycle.memory.memories import Origin
from stratabox.daemon.lifecycle.memory.spares import Spare
from stratabox.daemon.lifecycle.running import mishaps, probing, reasons, waiting
from stratabox.daemon.lifecycle.running.loading import load
from stratabox.daemon.lifecycle.running.readiness import Readiness
from stratabox.daemon.lifecycle.running.telling import Telling
from stratabox.daemon.lifecycle.running.ways import Ways
from stratabox.daemon.lifecycle.running.wiring import Wiring
from stratabox.daemon.lifecycle.seeding import outcome
from stratabox.daemon.lifecycle.volumes import settling
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes, volumes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import (
    DeniedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import SandboxId, mint
from stratabox.storage.model.records import Machine, Sandbox
from stratabox.storage.model.states import Identity, SandboxState

log = logging.getLogger(__name__)

_LAST_WORDS = 1500
"""Characters of a guest's console that go into a message, which travels with 2 KiB."""


def nothing_more(tx: Transaction) -> None:
    """For :meth:`Guest.boot`: no change beside the sandbox's own."""


class Guest:
    """The running side of one sandbox."""

    def __init__(self, world: World, sandbox: SandboxId) -> None:
        self.id = sandbox
        self.lock = GuestLock()
        self.telling = Telling(world, sandbox)
        self.wiring = Wiring(world, sandbox)
        self.has_volumes = False
        """There may be something to do for its volumes when it becomes ready."""
        self.has_seed = False
        """It has booted with a seed, by which cloud-init may still set it up."""
        self._readiness = Readiness(
            world,
            self.telling,
            prepare=self._prepare,
            answered=self._prepare_channel,
            attempt=lambda probe: probing.attempt(self, probe),
        )
        self._world = world
        self._domain: Domain | None = None
        self._agent: GuestAgent | None = None
        self._ways: Ways | None = None
        self._booted = False
        """It has booted since this daemon knows it, and has nothing in memory of ours."""
        self._tasks: list[asyncio.Task[None]] = []
        self._debt: Callable[[], Awaitable[object]] | None = None
        self.failed_nodes: set[str] = set()
        """Nodes of this domain's disks that gave an I/O error."""

    # Looking

    @property
    def domain(self) -> Domain | None:
        """The running domain, if there is one."""
        return self._domain

    @property
    def is_ready(self) -> bool:
        """The agent has answered since this start."""
        return self._readiness.is_ready

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

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The SSH connection into the guest, as root; made where there is none. Never close it.

        It ends when the guest does, or its sshd; ask for it anew for each use.

        :raise DeniedError: INVALID_STATE, when nothing runs; NO_SSHD and NO_CHANNEL.
        :raise FailedError: CHANNEL_FAILED, AGENT_FAILED.
        :raise UnavailableError: CHANNEL_UNAVAILABLE, AGENT_UNAVAILABLE.
        """
        return await self.require_channel().connection()

    def require_channel(self) -> Channel:
        """The channel. :raise DeniedError: INVALID_STATE, when nothing runs."""
        if self._ways is None:
            raise DeniedError(f"sandbox {self.id} is not running", sandbox=self.id)
        return self._ways.channel

    @property
    def exec_port(self) -> ExecPort | None:
        """What a command can go by while there is no channel; None: by the channel alone."""
        return self._ways.exec_port if self._ways is not None else None

    async def tell_now(self) -> None:
        """Return when the guest knows the time. :raise UnavailableError: AGENT_UNAVAILABLE."""
        await self.telling.now(self.require_agent())

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

    @property
    def owes(self) -> bool:
        """The catalog has missed a change of the disks."""
        return self._debt is not None

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
        memory: Origin | None = None,
        spare: Spare | None = None,
        *,
        identity: Identity | None = None,
        paused: bool = False,
    ) -> Sandbox:
        """Start the domain and write RUNNING; `also` joins that transaction.

        If this raises or is cancelled, nothing runs.

        :param memory: the saved memory that the guest goes on from; None: it boots.
        :param spare: a domain that has that memory loaded; it ends if this raises.
        :param identity: who it is; None: who it was. A renewal that is due already stays so.
        :param paused: leave it at its first instant, and write PAUSED; `go_on` lets it run.
        :raise NoSpaceError: ADMISSION_REFUSED, before anything is done.
        :raise DeniedError: MACHINE_MISMATCH, when that memory cannot go on here.
        :raise FailedError: QEMU_FAILED.
        :raise CorruptError: when a file that the guest stands on is gone.
        """
        world = self._world
        await self.settle()
        due = Identity.KEEP if memory else None
        if Identity.RENEW in (identity, sandbox.identity_due):
            due = Identity.RENEW
            if spare is None:  # whose card has a new address already
                sandbox = replace(sandbox, machine=replace(sandbox.machine, mac=random_mac()))
        if memory is not None and spare is None:
            # Whatever goes on from saved memory is told so, and its kernel reseeds; an id that it
            # had already would tell it nothing.
            sandbox = replace(sandbox, vmgenid=mint())
        if memory is not None:
            other = replace(sandbox.machine, channel_port=1 - sandbox.machine.channel_port)
            sandbox = replace(sandbox, machine=other)
        async with AsyncExitStack() as stack:
            stack.enter_context(world.rush.hold())
            if sandbox.state is not SandboxState.CREATING:  # whose record was admitted itself
                room = world.admission.room(world.read, self.id, sandbox.memory, sandbox.cpus)
                await stack.enter_async_context(room)
            return await self._boot(sandbox, also, memory, spare, due, paused=paused)

    async def _boot(
        self,
        sandbox: Sandbox,
        also: Callable[[Transaction], None],
        memory: Origin | None,
        spare: Spare | None,
        due: Identity | None,
        *,
        paused: bool,
    ) -> Sandbox:
        world = self._world
        domain: Domain | None = None
        self.has_volumes = bool(sandbox.volumes or (memory and memory.volumes))
        self.has_seed = bool(sandbox.machine.seed) and memory is None
        # Before the guest goes on: one that continues opens its agent's port at once.
        self._agent = GuestAgent(world.store.layout.sandbox(self.id))
        try:
            self.wiring.begin(sandbox)
            if spare is None:
                domain = await load(world, sandbox, memory, self._on_event)
            else:
                domain = await world.spares.hand_over(spare, self._on_event)
            await self.wiring.plug(domain)
            if not paused:
                if memory is not None:
                    self._agent.ask_early()
                await domain.resume()
            await self.wiring.up()
            machine = replace(sandbox.machine, qemu_version=world.qemu.version_text)

            def running(tx: Transaction) -> Sandbox:
                also(tx)
                volumes.note_opened(tx, self.id, booting=memory is None)
                return sandboxes.change(
                    tx, self.id, ready=False,
                    state=SandboxState.PAUSED if paused else SandboxState.RUNNING,
                    state_reason=reasons.PAUSED_BY_USER if paused else "",
                    ready_at=None, started_at=tx.now, clean_shutdown=False, machine=machine,
                    vmgenid=sandbox.vmgenid,
                    ram_origin=memory.id if memory else None, ram_since=None, identity_due=due,
                )  # fmt: skip

            record = await world.write(running)
        except BaseException:
            agent, self._agent = self._agent, None
            await settle(agent.close())
            await settle(self._kill(domain) if domain is not None else self.wiring.end())
            raise
        self.telling.owe(due)
        self._booted = memory is None
        self._take(domain, machine, goes_on=memory is not None)
        if not paused:
            self._watch(domain)
        world.bus.publish(Happening.UPDATED, record)
        hit("boot.running-written")
        log.info("sandbox %s runs, pid %d", self.id, domain.handle.pid)
        return record

    async def adopt(self, handle: DomainHandle, *, ready: bool) -> Domain:
        """Take over a domain that an earlier daemon started.

        :param ready: its agent has answered before, so it can be spoken to at once.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when it does not answer.
        """
        domain = await Domain.attach(handle, self._on_event, console=self._world.console_limits)
        try:
            record = await self.record()
            runs = record.state is not SandboxState.PAUSED or await domain.status() == "running"
        except BaseException:
            await domain.detach()
            raise
        self.has_volumes = bool(record.volumes or record.left_behind)
        self.has_seed = bool(record.machine.seed) and record.ram_origin is None
        self.telling.owe(record.identity_due)
        self._booted = False
        self._take(domain, record.machine, goes_on=False)
        if runs:
            self._watch(domain)
        if ready:
            self._readiness.answered(ready=record.ready)
        await self.wiring.adopt(domain, record)
        return domain

    async def go_on(self, identity: Identity | None = None) -> Sandbox:
        """Let a guest run that stands still with its process, and write RUNNING.

        If this raises or is cancelled, it stands still. Its clock is set by its agent, before the
        first command is answered; nobody need wait for that.

        :param identity: who it is; None: what is due, and otherwise who it was.
        :raise DeniedError: INVALID_STATE, when there is no process.
        """
        domain, old = self.require_domain(), await self.record()
        due = identity or old.identity_due or Identity.KEEP
        renews = due is Identity.RENEW
        async with undone_by(domain.pause):
            await domain.cont()
            hit("resume.continued")
            record = await self._world.change_sandbox(
                self.id, state=SandboxState.RUNNING,
                state_reason=reasons.failed_disk(old.state_reason), identity_due=due,
                ready=old.ready and not renews, ready_at=None if renews else old.ready_at,
            )  # fmt: skip
        self.telling.owe(due)
        if renews:
            self._readiness.lost()
        if self.is_ready:
            self.telling.soon(self.require_agent(), 0)
        if not (self.is_ready and self._is_watched):
            self._watch(domain)
        return record

    def set_clock_soon(self) -> None:
        """Have the clock set: the host's has jumped. A guest that boots takes the right one."""
        if self._agent is not None and self.is_ready and not self.telling.renews:
            self.telling.owe(Identity.KEEP)
            self.telling.soon(self._agent, 0)

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
        self.wiring.let_go()
        domain = self._release()
        if domain is not None:
            self._world.tasks.spawn(domain.detach(), f"detach {self.id}")

    # Waiting, without the lock.

    async def wait_ready(self, timeout: float) -> Sandbox:
        """Wait until the agent has answered since this start, and the probe has passed.

        :param timeout: seconds.
        :raise UnavailableError: AGENT_UNAVAILABLE, when it has not, with the console's last lines.
        :raise FailedError: GUEST_ENDED, when the guest ended first; PROBE_FAILED, when the probe
            has not passed; VOLUME_MOUNT_FAILED and the like, when it is ready but for a volume.
        :raise ConflictError: INTERRUPTED, when somebody ended it first.
        """
        await waiting.until_ready(self, self._readiness, timeout)
        return await self.record()

    # Inside

    async def _prepare(self) -> StrataboxError | None:
        """What is to be done for a guest whose agent has answered, before it is ready."""
        problem = await settling.see_to(self._world, self)
        if self._booted:
            await self.wiring.configured(self.require_agent())
        if self.has_seed:
            self._readiness.waits_for = outcome.RUNS
            problem = problem or await outcome.of(self.require_agent(), self.id)
        return problem

    def _take(self, domain: Domain, machine: Machine, *, goes_on: bool) -> None:
        self._domain = domain
        self.failed_nodes.clear()
        if self._agent is None:
            self._agent = GuestAgent(domain.handle.folder)
        self._ways = Ways(self._world, domain.handle, self._agent, machine, goes_on=goes_on)
        self._readiness.lost()
        task = asyncio.create_task(self._watch_exit(domain), name=f"watch {self.id}")
        task.add_done_callback(self._watcher_ended)
        self._tasks = [task]

    def _prepare_channel(self) -> None:
        """The agent has answered: what the guest's channel needs can be given to it."""
        if self._ways is not None and self._booted:
            self._ways.channel.tell_soon()

    @property
    def _is_watched(self) -> bool:
        return len(self._tasks) > 1

    def _watch(self, domain: Domain) -> None:
        """Wait for the agent from now on: the guest runs."""
        agent = self.require_agent()
        for task in self._tasks[1:]:
            task.cancel()
        task = asyncio.create_task(self._readiness.watch(domain, agent), name=f"agent {self.id}")
        task.add_done_callback(self._watcher_ended)
        self._tasks[1:] = [task]

    def _watcher_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            # QEMU that died under it is told of by the other watcher; anything else is a bug.
            level = logging.INFO if isinstance(error, StrataboxError) else logging.ERROR
            log.log(level, "%s ended: %s", task.get_name(), error, exc_info=error)

    def _release(self) -> Domain | None:
        domain, self._domain = self._domain, None
        ways, self._ways = self._ways, None
        if ways is not None:
            self._world.tasks.spawn(ways.close(), f"close channel {self.id}")
        agent, self._agent = self._agent, None
        if agent is not None:
            self._world.tasks.spawn(agent.close(), f"close agent {self.id}")
        self._readiness.lost()
        self.telling.owe(None)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._tasks = []
        return domain

    async def _kill(self, domain: Domain) -> None:
        await domain.detach()
        await self._world.launcher.stop(domain.handle)
        await self.wiring.end()

    def last_words(self, since: str = "") -> str:
        """The end of what its console says; the first of what it says since, if it says that."""
        tail = self._domain.console.tail() if self._domain else ""
        begin = tail.rfind(since) if since in tail and since else len(tail) - _LAST_WORDS
        return tail[max(0, begin) :][:_LAST_WORDS]

    def _on_event(self, event: Event) -> None:
        """What QEMU tells by itself. Called in the event loop; must not block."""
        match event:
            case Reset():
                self._readiness.was_reset()
                if self._agent is not None:
                    self._agent.port_changed(is_open=False)
                self._booted = True
                if self._ways is not None:
                    self._ways.was_reset()
            case AgentPort(open=is_open) if self._agent is not None:
                self._agent.port_changed(is_open=is_open)
            case ChannelPort(open=False) if self._ways is not None:
                self._ways.channel.port_closed(event.number)
            case Panicked() | BlockError(action="stop"):
                mishap = mishaps.stopped_by_itself(self._world, self, event)
                self._world.tasks.spawn(mishap, f"stopped {self.id}")
            case BlockError(nospace=False) if event.node not in self.failed_nodes:
                self.failed_nodes.add(event.node)  # told once: every further access fails as well
                mishap = mishaps.disk_failed(self._world, self, event)
                self._world.tasks.spawn(mishap, f"disk failed {self.id}")

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
            state = SandboxState.STOPPED if ending.guest else SandboxState.FAILED
            await mishaps.ended(self._world, self, state, ending.reason)
