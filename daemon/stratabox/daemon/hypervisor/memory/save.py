"""Saves a running domain's RAM and devices: the guest stands still for some milliseconds.

```
 copy, round by round; flush disks │ stop │ the caller's disks │ devices │ last round │ cont │ write
 ──────────── guest runs ──────────┴────────────────── stands still ──────────────────┴── runs ──
```

The devices come before the last round, because saving them may write to RAM. Rounds beforehand
need `Tracking.WRITTEN`; with another tracking the last round copies everything.

A guest that is to stand still for good (`leave_stopped`) gets no `cont` unless saving it fails.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.memory import mapping, reader, tracking
from stratabox.daemon.hypervisor.memory.copying import RamCopy
from stratabox.daemon.hypervisor.memory.threads import in_thread, uncancelled
from stratabox.daemon.hypervisor.memory.tracking import Tracking
from stratabox.storage.files.memory.format import RamFile
from stratabox.storage.files.memory.sealed import write_state
from stratabox.storage.files.memory.writer import RamWriter
from stratabox.storage.model.errors import DeniedError, FailedError
from stratabox.storage.model.ids import Sha256

_ROUNDS = 4
_SMALL = 2 << 20
"""A round of so few bytes is followed by the last one."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a process's memory stands on: ids of RAM files."""

    origin: str | None
    """What it was restored from; None: it started from the beginning."""
    since: str | None = None
    """Its last save, if no page written since was taken by a save that failed or is not known.
    Only so long as the daemon knows that may it say so; None is always right."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a save goes: an id, and two paths where nothing is yet."""

    id: str
    ram: Path
    state: Path


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was saved."""

    file: RamFile
    state_sha256: Sha256
    state_bytes: int
    tracked: Tracking
    pause: timedelta
    """How long the guest stood still; nothing where it was paused already."""
    copied_running: int
    copied_stopped: int
    """Bytes copied while the guest ran, and while it stood still."""
    base: Base
    """For the next save of this process, once this one is on record."""


async def save(
    domain: Domain,
    base: Base,
    target: Target,
    *,
    overlays: Sequence[Path] = (),
    at_pause: Callable[[], Awaitable[None]],
    leave_stopped: bool = False,
) -> Saved:
    """Save a domain's memory, durably. Its guest runs on afterwards if it ran before.

    When this raises or is cancelled nothing is left of the target, and the process's next save
    must be one with `Base.since` None.

    :param overlays: the active layers' files, flushed beforehand so that the pause is short.
    :param at_pause: called while the guest stands still, to switch its disks.
    :param leave_stopped: the guest stands still on return. When this raises, it runs if it ran.
    :raise DeniedError: MEMORY_UNREADABLE, before anything was done. GUEST_BOOTING, when the guest
        reset itself at this very moment.
    :raise FailedError: QEMU_FAILED.
    :raise NoSpaceError: NO_SPACE.
    :raise UnavailableError: MEMORY_UNREADABLE, MONITOR_UNAVAILABLE.
    """
    ram_path, size = await domain.memory.ram_file()
    where = await in_thread(mapping.find, domain.handle.pid, ram_path, size)
    await in_thread(reader.check_readable, where)
    tracked = await in_thread(tracking.of, where)
    since = None if tracked is Tracking.NONE else base.since
    with ExitStack() as stack:
        state = stack.enter_context(_StateFile())
        writer = stack.enter_context(
            RamWriter(target.ram, id=target.id, parent=since or base.origin, ram_bytes=size)
        )
        copy = stack.enter_context(RamCopy(where, tracked, writer, everything=since is None))
        running = await domain.status() == "running"
        copied_running = last = 0
        if running:
            copied_running, last = await _copy_running(copy, tracked, overlays)
        await in_thread(copy.expect, 2 * last)
        pause = _Pause(domain, state, copy, at_pause, running=running, leave_stopped=leave_stopped)
        try:
            await uncancelled(pause.run())
            await in_thread(copy.write)
            file = await in_thread(writer.finish)
            content = state.content()
            digest = await in_thread(write_state, target.state, content)
        except BaseException:
            # Cancelled, too: what a thread has finished meanwhile must go.
            target.ram.unlink(missing_ok=True)
            target.state.unlink(missing_ok=True)
            await uncancelled(pause.end())
            raise
    return Saved(
        file=file,
        state_sha256=digest,
        state_bytes=len(content),
        tracked=tracked,
        pause=pause.duration,
        copied_running=copied_running,
        copied_stopped=pause.copied,
        base=Base(origin=base.origin, since=target.id),
    )


async def _copy_running(
    copy: RamCopy, tracked: Tracking, overlays: Sequence[Path]
) -> tuple[int, int]:
    """Copy and flush while the guest runs: bytes copied in all, and in the last round."""
    total = size = 0
    for number in range(_ROUNDS):
        flushing = asyncio.ensure_future(in_thread(_flush, overlays))
        before, size = size, 0
        if tracked is Tracking.WRITTEN:
            size = await in_thread(copy.copy_running)
        await flushing
        total += size
        if size <= _SMALL or (number and size > before * 2 // 3):
            break
    return total, size


class _Pause:
    """The time in which the guest stands still."""

    def __init__(
        self,
        domain: Domain,
        state: _StateFile,
        copy: RamCopy,
        at_pause: Callable[[], Awaitable[None]],
        *,
        running: bool,
        leave_stopped: bool,
    ) -> None:
        self._domain, self._state, self._copy = domain, state, copy
        self._at_pause, self._running = at_pause, running
        self._leave_stopped = leave_stopped
        self._stands = False
        self.copied = 0
        self.duration = timedelta()

    async def run(self) -> None:
        """From `stop` to `cont`, which is sent whatever happens if the guest ran before.

        Only where it is to be left stopped, and all went well, it is not.
        """
        domain = self._domain
        target = await domain.memory.add_target(self._state.writing)
        begun = time.monotonic()
        try:
            if self._running:
                await domain.pause()
                await self._check_stopped()
            await self._at_pause()
            await domain.memory.save_devices(target)
            self.copied = await in_thread(self._copy.copy_stopped)
            self._stands = self._running and self._leave_stopped
        finally:
            if self._running and not self._stands:
                await domain.resume()
                self.duration = timedelta(seconds=time.monotonic() - begun)
            await domain.memory.remove_target(target)
        if self._running and not self._stands:
            await domain.disks.tidy()

    async def end(self) -> None:
        """Let a guest that was left stopped run after all."""
        if self._stands:
            self._stands = False
            await self._domain.cont()

    async def _check_stopped(self) -> None:
        status = await self._domain.status()
        if status == "prelaunch":
            raise DeniedError(
                "the guest reset itself just now; try again when it is up",
                reason="GUEST_BOOTING",
            )
        if status != "paused":
            raise FailedError(
                f"the guest was to be stopped for its snapshot, but it is {status}",
                reason="QEMU_FAILED",
            )


class _StateFile:
    """A file in memory that QEMU writes its devices' state into; a context manager."""

    def __enter__(self) -> _StateFile:
        self._descriptor = os.memfd_create("stratabox-state", os.MFD_CLOEXEC)
        try:
            self.writing = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.writing)
        os.close(self._descriptor)

    def content(self) -> bytes:
        """All that was written."""
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)


def _flush(overlays: Sequence[Path]) -> None:
    for path in overlays:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
