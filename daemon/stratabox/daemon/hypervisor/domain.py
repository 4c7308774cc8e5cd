"""Control of one running domain, the same for every launcher.

`Domain.attach` takes over a domain that somebody started, this daemon or an earlier one. From then
on its events come in, its end is seen by a pidfd (so also when it is not our child), and commands
go over its monitor. `detach` lets go of it; the guest runs on.

```
            attach                     events → on_event (sync, in the loop)
 (running) ────────▶ attached ──┬────▶ Exited, and `exited` is resolved
                        │       │
                        └───────┴────▶ detach: nothing is told any more
```
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence

from stratabox.daemon.hypervisor import process, usage
from stratabox.daemon.hypervisor.block import BLOCK_SECONDS, BlockGraph
from stratabox.daemon.hypervisor.console import DEFAULT_LIMITS, Console, Limits
from stratabox.daemon.hypervisor.events import (
    Event,
    Exited,
    OnEvent,
    Panicked,
    Reset,
    Shutdown,
    Wired,
    describe_end,
)
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainHandle
from stratabox.daemon.hypervisor.memory.control import MemoryControl
from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.daemon.hypervisor.takeover import take_over
from stratabox.daemon.hypervisor.usage import DiskUsage
from stratabox.daemon.hypervisor.volumes import VolumeBus
from stratabox.storage.model.errors import FailedError, UnavailableError

_LAST_EVENTS_SECONDS = 1.0
_WIRED_SECONDS = 30.0


class Domain:
    """A running domain under our control. Made by `attach`."""

    def __init__(
        self, handle: DomainHandle, on_event: OnEvent, pidfd: int, console: Limits
    ) -> None:
        self.handle = handle
        self.exited: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        """Resolved when the process is gone, with why; cancelled by `detach`."""
        self._on_event = on_event
        self._pidfd = pidfd
        self._monitor = Monitor(handle.folder, self._hear)
        self.disks = BlockGraph(self._monitor)
        """Its disks: overlays, and which layer is active."""
        self.volumes = VolumeBus(self._monitor)
        """Its bus of volumes."""
        self.memory = MemoryControl(self._monitor)
        """Its RAM and the state of its devices."""
        self._shutdown: Shutdown | None = None
        self._panicked = False
        self._wired = asyncio.Event()
        self._log_start = process.log_size(handle.folder)
        self.console = Console(handle.folder, console)
        """Its serial console."""
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def attach(
        cls,
        handle: DomainHandle,
        on_event: OnEvent,
        *,
        fresh: bool = False,
        console: Limits = DEFAULT_LIMITS,
    ) -> Domain:
        """Take over a running domain.

        Events that came before are lost: ask `status`, `agent_port_open` and
        ``disks.active_layers``.

        :param on_event: called with each event, in the event loop; it must not block.
        :param fresh: it was started just now, so that nothing can need tidying.
        :param console: how much it may write there, and how much of it is kept.
        :raise FailedError: QEMU_FAILED, when a fresh one has ended already, with its own words: it
            could not load its saved state, for instance.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when the process is gone or its monitor does
            not answer. Then nothing of this attempt is left.
        """
        pidfd = process.open_pidfd(handle.pid, handle.started)
        if pidfd is None:
            raise _ended(handle, fresh=fresh)
        domain = cls(handle, on_event, pidfd, console)
        try:
            if not await domain._open_monitor():
                raise _ended(handle, fresh=fresh)
            await domain.console.open(handle.console, fresh=fresh)
            if not fresh:
                await domain.disks.tidy()
        except BaseException:
            await domain.detach()
            raise
        domain._watcher = asyncio.create_task(domain._watch(), name=f"end of {handle.sandbox}")
        return domain

    async def _open_monitor(self) -> bool:
        """Connect; False when the process ends before that."""
        opening = asyncio.ensure_future(self._monitor.open())
        gone = asyncio.ensure_future(process.wait_gone(self._pidfd))
        try:
            await asyncio.wait((opening, gone), return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                return True
            return False
        finally:
            for each in (opening, gone):
                each.cancel()
            await asyncio.wait((opening, gone))

    async def detach(self) -> None:
        """Let go of the domain, which runs on. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        await self.console.close()
        await self._monitor.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self.exited.cancel()

    async def status(self) -> str:
        """QEMU's runstate: "running", "paused", "prelaunch", "io-error", "guest-panicked", …

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        answer = await self._monitor.execute("query-status", repeatable=True)
        return str(answer.get("status")) if isinstance(answer, dict) else ""

    async def cont(self) -> None:
        """Let the vCPUs run. Running already is fine.

        :raise FailedError: QEMU_FAILED, when QEMU refuses.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self.resume()
        await self.disks.tidy()

    async def resume(self) -> None:
        """Let the vCPUs run and do nothing else; `disks.tidy` is the caller's, soon after.

        :raise FailedError: QEMU_FAILED, when QEMU refuses.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._monitor.execute("cont", repeatable=True, seconds=BLOCK_SECONDS)

    async def pause(self) -> None:
        """Stop the vCPUs; QEMU flushes the disks. Stopped already is fine.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._monitor.execute("stop", repeatable=True, seconds=BLOCK_SECONDS)

    async def take_over(self, chains: Sequence[Sequence[ChainLayer]]) -> int:
        """Bring its chains to where they are to be, step by step; as ``takeover.take_over``."""
        return await take_over(self._monitor, self.disks, chains)

    async def quit(self) -> None:
        """Have QEMU end in its own good order (disks flushed), without asking the guest.

        Returns when QEMU took the order; await `exited` for the end.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        with contextlib.suppress(ReplyLostError):  # it may be gone before it replies
            await self._monitor.execute("quit")

    async def powerdown(self) -> None:
        """Press the guest's power button (ACPI). Guests without an ear for it do nothing.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._monitor.execute("system_powerdown", repeatable=True)

    async def wired(self) -> None:
        """Wait until QEMU has taken the connection that somebody made to its network card's socket.

        Before that no packet may be on its way: QEMU 7.2 takes connections when it has nothing
        else to do, and until then writes to none at all, and crashes.

        :raise FailedError: NETWORK_FAILED, when it does not in `_WIRED_SECONDS`.
        """
        try:
            async with asyncio.timeout(_WIRED_SECONDS):
                await self._wired.wait()
        except TimeoutError:
            raise FailedError(
                "QEMU does not take the network's connection.", reason="NETWORK_FAILED"
            ) from None

    async def set_link(self, *, up: bool) -> None:
        """Plug the network card's cable in or out; the guest notices. Idempotent.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        await self._monitor.execute("set_link", {"name": "net0", "up": up}, repeatable=True)

    async def agent_port_open(self) -> bool:
        """Whether the guest's agent has its port open now.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        answer = await self._monitor.execute("query-chardev", repeatable=True)
        return isinstance(answer, list) and any(
            isinstance(each, dict) and each.get("label") == "agent" and each.get("frontend-open")
            for each in answer
        )

    async def disk_usage(self) -> list[DiskUsage]:
        """What the guest has done with its disks and volumes since this process started.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        return await usage.disk_usage(self._monitor)

    def _hear(self, event: Event) -> None:
        match event:
            case Shutdown():
                self._shutdown = event
            case Panicked():
                self._panicked = True
            case Wired(connected=True):
                self._wired.set()
            case Wired():
                self._wired.clear()
            case Reset():
                self._panicked = False
        self._on_event(event)

    async def _watch(self) -> None:
        await process.wait_gone(self._pidfd)
        # QEMU's last event, which says why, can still be on its way to us.
        await self._monitor.drained(_LAST_EVENTS_SECONDS)
        await asyncio.sleep(0)
        status = process.reap(self.handle.pid, self.handle.started)
        reason = describe_end(
            self._shutdown,
            panicked=self._panicked,
            ended=process.describe(status),
            last_words=process.log_tail(self.handle.folder, self._log_start),
        )
        guest = self._shutdown is not None and self._shutdown.guest and not self._panicked
        gone = Exited(reason=reason, guest=guest, status=status)
        if not self.exited.done():
            self.exited.set_result(gone)
        self._on_event(gone)
        await self.console.close()
        await self._monitor.close()


def _ended(handle: DomainHandle, *, fresh: bool) -> FailedError | UnavailableError:
    """The error for a QEMU that is gone."""
    status = process.describe(process.reap(handle.pid, handle.started))
    words = f"QEMU {status}. {process.log_tail(handle.folder)}".strip()
    if fresh:
        return FailedError(words, reason="QEMU_FAILED")
    return UnavailableError(words, reason="MONITOR_UNAVAILABLE")
