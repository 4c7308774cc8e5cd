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
import base64
import contextlib
import os

from stratabox.daemon.hypervisor import process
from stratabox.daemon.hypervisor.block import BLOCK_SECONDS, BlockGraph
from stratabox.daemon.hypervisor.command_line import SERIAL_BYTES
from stratabox.daemon.hypervisor.events import (
    Event,
    Exited,
    OnEvent,
    Panicked,
    Reset,
    Shutdown,
    describe_end,
)
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.hypervisor.memory.control import MemoryControl
from stratabox.daemon.hypervisor.monitor import Monitor
from stratabox.daemon.hypervisor.qmp import ReplyLostError
from stratabox.storage.model.errors import UnavailableError

_LAST_EVENTS_SECONDS = 1.0


class Domain:
    """A running domain under our control. Made by `attach`."""

    def __init__(self, handle: DomainHandle, on_event: OnEvent, pidfd: int) -> None:
        self.handle = handle
        self.exited: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        """Resolved when the process is gone, with why; cancelled by `detach`."""
        self._on_event = on_event
        self._pidfd = pidfd
        self._monitor = Monitor(handle.folder, self._hear)
        self.disks = BlockGraph(self._monitor)
        """Its disks: overlays, and which layer is active."""
        self.memory = MemoryControl(self._monitor)
        """Its RAM and the state of its devices."""
        self._shutdown: Shutdown | None = None
        self._panicked = False
        self._log_start = process.log_size(handle.folder)
        self._console = b""
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def attach(cls, handle: DomainHandle, on_event: OnEvent) -> Domain:
        """Take over a running domain.

        Events that came before are lost: ask `status`, `agent_port_open` and
        ``disks.active_layers``.

        :param on_event: called with each event, in the event loop; it must not block.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when the process is gone or its monitor does
            not answer. Then nothing of this attempt is left.
        """
        pidfd = process.open_pidfd(handle.pid, handle.started)
        if pidfd is None:
            ended = process.describe(process.reap(handle.pid, handle.started))
            raise UnavailableError(
                f"QEMU {ended}. {process.log_tail(handle.folder)}".strip(),
                reason="MONITOR_UNAVAILABLE",
            )
        domain = cls(handle, on_event, pidfd)
        try:
            await domain._monitor.open()
            await domain.disks.tidy()
        except BaseException:
            await domain.detach()
            raise
        domain._watcher = asyncio.create_task(domain._watch(), name=f"end of {handle.sandbox}")
        return domain

    async def detach(self) -> None:
        """Let go of the domain, which runs on. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
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

    async def agent_port_open(self) -> bool:
        """Whether the guest's agent has its port open now.

        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        answer = await self._monitor.execute("query-chardev", repeatable=True)
        return isinstance(answer, list) and any(
            isinstance(each, dict) and each.get("label") == "agent" and each.get("frontend-open")
            for each in answer
        )

    async def serial_tail(self) -> str:
        """The last 64 KiB that the guest wrote to its console since we attached, made printable.

        What an earlier daemon has read of it is gone.

        :raise UnavailableError: MONITOR_UNAVAILABLE, as when QEMU has ended.
        """
        answer = await self._monitor.execute(
            "ringbuf-read", {"device": "console", "size": SERIAL_BYTES, "format": "base64"}
        )
        # Reading empties the ring, so what was read is kept here.
        self._console = (self._console + base64.b64decode(str(answer)))[-SERIAL_BYTES:]
        return process.printable(self._console.decode(errors="replace"))

    def _hear(self, event: Event) -> None:
        match event:
            case Shutdown():
                self._shutdown = event
            case Panicked():
                self._panicked = True
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
        await self._monitor.close()
