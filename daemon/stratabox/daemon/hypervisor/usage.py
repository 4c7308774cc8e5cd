"""What a domain uses of the host: its process, by the kernel's word, and its disks, by QEMU's.

The guest is not asked and does not notice.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor.monitor import Monitor

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_DEVICE = re.compile(r"(?:^|/)((?:disk|vol)(\d{1,3}))(?:/|$)")
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ProcessUsage:
    """What a process has used so far."""

    at: float
    """When it was looked at, by the monotonic clock."""
    uptime: float
    """Seconds since it started."""
    cpu: float
    """Seconds of CPU time, of all its threads."""
    rss: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class MemoryShares:
    """A process's memory, told apart from what others share with it. Bytes."""

    pss: int
    """Shared pages divided among those who share them."""
    private: int


@dataclass(frozen=True, kw_only=True)
class DiskUsage:
    """What a guest has done with a disk since its process started."""

    device: str
    """As "disk0" or "vol3"."""
    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0


def process_usage(pid: int, started: int) -> ProcessUsage | None:
    """Look at exactly that process; None when it is gone."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if int(fields[19]) != started or fields[0] in (b"Z", b"X"):
        return None
    return ProcessUsage(
        at=time.monotonic(),
        uptime=max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / _TICKS),
        cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
        rss=int(fields[21]) * _PAGE,
    )


def memory_shares(pid: int) -> MemoryShares | None:
    """Look through all of a process's memory; None when that may not be.

    Takes the longer the more memory there is: some ms for each GiB.
    """
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    sizes = {
        words[0].rstrip(":"): int(words[1]) << 10
        for line in text.splitlines()[1:]
        if len(words := line.split()) == 3
    }
    if "Pss" not in sizes:
        return None
    private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return MemoryShares(pss=sizes["Pss"], private=private)


async def disk_usage(monitor: Monitor) -> list[DiskUsage]:
    """Each disk and volume, disks first, by their numbers.

    :raise UnavailableError: MONITOR_UNAVAILABLE.
    """
    answer = await monitor.execute("query-blockstats", repeatable=True, seconds=_ANSWER_SECONDS)
    found = []
    for each in answer if isinstance(answer, Sequence) else ():
        match = _DEVICE.search(str(each.get("qdev", ""))) if isinstance(each, Mapping) else None
        if match is not None and isinstance(stats := each.get("stats"), Mapping):
            usage = DiskUsage(
                device=match[1],
                read_bytes=_count(stats, "rd_bytes"),
                written_bytes=_count(stats, "wr_bytes"),
                reads=_count(stats, "rd_operations"),
                writes=_count(stats, "wr_operations"),
                flushes=_count(stats, "flush_operations"),
            )
            found.append((not match[1].startswith("disk"), int(match[2]), usage))
    return [usage for *_, usage in sorted(found, key=lambda one: one[:2])]


def _count(stats: Mapping[str, object], name: str) -> int:
    value = stats.get(name)
    return value if isinstance(value, int) else 0
