"""What the host has for guests: its memory and CPUs, or less where a control group says so.

Read anew at each question, from /proc and the control group's own files; some 0.2 ms.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor import cgroup

MIB = 1 << 20

_FIELD = re.compile(r"^(MemTotal|MemAvailable|SwapFree|SwapTotal):\s+(\d+) kB$", re.MULTILINE)
_OWN = re.compile(r"^(RssAnon|VmSwap):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class HostRoom:
    """What there is, in MiB and CPUs."""

    total: int
    """Of the host's memory."""
    available: int
    """What can be taken without swapping, by the kernel's own estimate."""
    swap: int
    """Swap that nobody has taken."""
    group: int | None
    """What the daemon's control group, or one above it, may still take; None: as much as it likes.
    """
    cpus: int
    """That the daemon may run on."""

    def memory(self, *, swap: bool) -> int:
        """What guests can still be given."""
        host = self.available + (self.swap if swap else 0)
        return host if self.group is None else min(host, self.group)


def look(meminfo: Path = Path("/proc/meminfo")) -> HostRoom:
    """Look at the host."""
    found = {name: int(size) // 1024 for name, size in _FIELD.findall(meminfo.read_text())}
    group = cgroup.memory_room()
    return HostRoom(
        total=found.get("MemTotal", 0),
        available=found.get("MemAvailable", 0),
        swap=found.get("SwapFree", 0),
        group=None if group is None else group // MIB,
        cpus=len(os.sched_getaffinity(0)),
    )


def own_memory(pid: int) -> int:
    """MiB that only that process has, swapped or not: what it has written. 0 when it is gone.

    A guest's RAM is a private mapping, so what it shares with others (the zeros that it was
    started with, or the saved memory that its copies have too) is not in here.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(size) for _, size in _OWN.findall(text)) // 1024
