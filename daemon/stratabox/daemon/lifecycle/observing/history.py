"""What guests' processes have used lately, on average: looked at again and again, kept for an hour.

Only of processes that run. What was used before a process was started anew is not told.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from stratabox.daemon.hypervisor import usage
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.hypervisor.usage import ProcessUsage
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.storage.model.ids import SandboxId

PERIOD = 10.0
"""Seconds between two looks."""
KEPT = 360
"""Looks that are kept of each process: an hour."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """What a process has used over some time."""

    samples: int = 0
    observed: timedelta = timedelta(0)
    """From the first of them to the last."""
    cores: float | None = None
    """CPUs, all the time; None: there are no two moments to compare."""
    bytes: float | None = None
    """Of the host's memory; None: it has no process."""
    first: datetime | None = None
    last: datetime | None = None


class History:
    """Looks, and keeps what it has seen. One for all who ask."""

    def __init__(self, guests: Guests) -> None:
        self._guests = guests
        self._seen: dict[DomainHandle, deque[ProcessUsage]] = {}

    async def keep(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD)

    async def look(self) -> None:
        """Look once at every guest that has a process."""
        domains = [guest.domain for guest in self._guests.running()]
        handles = [domain.handle for domain in domains if domain is not None]
        found = await in_thread(_look, handles)
        self._seen = {
            handle: self._seen.get(handle) or _from_its_start(used)
            for handle, used in found.items()
        }
        for handle, used in found.items():
            self._seen[handle].append(used)

    async def average(self, sandbox: SandboxId, window: timedelta) -> Average:
        """What a sandbox has used from so long ago until now."""
        domain = self._guests.of(sandbox).domain
        if domain is None:
            return Average()
        handle = domain.handle
        used = (await in_thread(_look, [handle])).get(handle)
        if used is None:
            return Average()
        seen = self._seen.get(handle) or _from_its_start(used)
        begin = used.at - window.total_seconds()
        return average([*(each for each in seen if each.at >= begin), used])


def average(seen: Sequence[ProcessUsage]) -> Average:
    """What was used from the first moment to the last; there is at least one."""
    first, last = seen[0], seen[-1]
    # Of a process that was just started nothing is known but that it had used nothing.
    real = [each for each in seen if each.uptime > 0] or seen
    span = last.at - first.at
    now, monotonic = datetime.now(UTC), time.monotonic()
    return Average(
        samples=len(real),
        observed=timedelta(seconds=span),
        cores=max(0.0, last.cpu - first.cpu) / span if span > 0 else None,
        bytes=sum(each.rss for each in real) / len(real),
        first=now - timedelta(seconds=monotonic - first.at),
        last=now - timedelta(seconds=monotonic - last.at),
    )


def _from_its_start(used: ProcessUsage) -> deque[ProcessUsage]:
    start = ProcessUsage(at=used.at - used.uptime, uptime=0.0, cpu=0.0, rss=0)
    return deque([start], maxlen=KEPT)


def _look(handles: Sequence[DomainHandle]) -> dict[DomainHandle, ProcessUsage]:
    found = ((each, usage.process_usage(each.pid, each.started)) for each in handles)
    return {each: used for each, used in found if used is not None}
