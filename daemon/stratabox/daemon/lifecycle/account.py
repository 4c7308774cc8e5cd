"""The arithmetic of admission: what guests have, what they may yet take, what the host has. Pure.

What a guest's RAM costs the host is what its process has *written* of it, for it is a private
mapping: zeros that nobody wrote cost nothing, and pages of saved memory are there once for all
that go on from it, however many. But any guest may write any page, and then has it for itself; so
what is assumed is that every guest *grows* until all of its RAM is its own, and QEMU with it:

    can grow by = RAM + `OVERHEAD` - what its process has written

What has been written is missing from the host's available memory already, and so is the one copy
of saved memory. Over-committing is to assume that not all of them do so at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from stratabox.daemon.hypervisor.host_room import HostRoom

OVERHEAD = 64
"""MiB that a QEMU takes beside the guest's RAM, generously: 34 to 45 MiB were measured under TCG,
most of it translated code."""


class Resource(StrEnum):
    """What there can be too little of."""

    MEMORY = "memory"
    HOST_MEMORY = "host_memory"
    CPUS = "cpus"
    SANDBOXES = "sandboxes"
    DISK = "disk"
    DISK_FREE = "disk_free"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the configuration allows; 0: no limit. Memory and disks in MiB."""

    memory: int = 0
    memory_overcommit: float = 0
    memory_reserve: int = 0
    swap: bool = False
    """Free swap is memory, too."""
    cpu_overcommit: float = 0
    sandboxes: int = 0

    @property
    def unlimited(self) -> bool:
        """Everybody may start."""
        return not (self.memory or self.memory_overcommit or self.cpu_overcommit or self.sandboxes)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one guest has. Memory in MiB."""

    memory: int
    cpus: int
    own: int = 0
    """What its process has written."""

    @property
    def growth(self) -> int:
        """What it can still grow by."""
        return max(0, self.memory + OVERHEAD - self.own)

    def written(self, own: int) -> Share:
        """The same guest, whose process has so much of its own."""
        return replace(self, own=own)

    def larger(self, other: Share | None) -> Share:
        """What holds either."""
        if other is None:
            return self
        return Share(memory=max(self.memory, other.memory), cpus=max(self.cpus, other.cpus))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why one more may not start."""

    resource: Resource
    limit: int
    in_use: int
    wanted: int
    sandboxes: int

    @property
    def missing(self) -> int:
        """How much more there would have to be."""
        return self.in_use + self.wanted - self.limit


@dataclass(frozen=True, kw_only=True)
class Account:
    """What there is, and who has it."""

    limits: Limits
    room: HostRoom
    shares: tuple[Share, ...]

    @property
    def memory(self) -> int:
        """RAM of all guests."""
        return sum(share.memory for share in self.shares)

    @property
    def own(self) -> int:
        """What their processes have written."""
        return sum(share.own for share in self.shares)

    @property
    def growth(self) -> int:
        """What all of them together can still grow by."""
        return sum(share.growth for share in self.shares)

    @property
    def cpus(self) -> int:
        """CPUs of all guests."""
        return sum(share.cpus for share in self.shares)

    @property
    def growth_limit(self) -> int:
        """What all of them together may still grow by; 0 also where there is no limit."""
        here = self.room.memory(swap=self.limits.swap) - self.limits.memory_reserve
        return int(max(0, here) * self.limits.memory_overcommit)

    @property
    def cpu_limit(self) -> int:
        """CPUs that all of them may have; 0: no limit."""
        return int(self.room.cpus * self.limits.cpu_overcommit)

    def refuses(self, one: Share) -> Verdict | None:
        """Why one more guest may not start; None: it may."""
        limits, count = self.limits, len(self.shares)
        for resource, limited, limit, in_use, wanted in (
            (Resource.SANDBOXES, limits.sandboxes, limits.sandboxes, count, 1),
            (Resource.MEMORY, limits.memory, limits.memory, self.memory, one.memory),
            (Resource.CPUS, limits.cpu_overcommit, self.cpu_limit, self.cpus, one.cpus),
            (
                Resource.HOST_MEMORY,
                limits.memory_overcommit,
                self.growth_limit,
                self.growth,
                one.growth,
            ),
        ):
            if limited and in_use + wanted > limit:
                return Verdict(
                    resource=resource, limit=limit, in_use=in_use, wanted=wanted, sandboxes=count
                )
        return None
