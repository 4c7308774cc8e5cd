"""What a guest's processes may take of the host: the figures, and the words for them. Pure.

A limit is there for a QEMU that a guest has taken over, or that leaks: one that behaves must never
meet it. So it is counted from above:

    memory   RAM + 1/64 of it (page tables) + overhead (QEMU, its threads, pages of files)
             + under TCG the buffer of translated code, and a quarter of it for what goes with it
    cpu      CPUs + overhead, for the main loop and the threads that read and write disks
    pids     CPUs + overhead

Pages of files that a group has read are counted to it, too; they are dropped when it comes to its
limit, and nothing waits for that but who reads new ones. The RAM of a snapshot that guests share is
counted to the daemon, who has written it, or to the first that has read it; what a guest writes is
its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

MIB = 1 << 20
PERIOD = 100_000
"""Microseconds in which a group may have its share of the CPUs."""
_MOST_TRANSLATED = 1 << 30
"""Bytes of QEMU's buffer of translated code, where the host has 8 GiB or more (tcg/region.c)."""
_NETWORK_MEMORY = 512 * MIB
"""A helper's addresses are limited to 1 GiB; it has some 40 MiB of RAM."""
_NETWORK_PIDS = 32


class Controller(StrEnum):
    """What a control group can limit."""

    MEMORY = "memory"
    CPU = "cpu"
    PIDS = "pids"
    IO = "io"


@dataclass(frozen=True, kw_only=True)
class IoLimits:
    """Of the device that the state folder is on. 0: none."""

    weight: int = 0
    read_bandwidth: int = 0
    """Bytes a second."""
    write_bandwidth: int = 0
    read_iops: int = 0
    write_iops: int = 0

    @property
    def most(self) -> dict[str, int]:
        """Those that there are but the weight, by the names of io.max."""
        named = {
            "rbps": self.read_bandwidth,
            "wbps": self.write_bandwidth,
            "riops": self.read_iops,
            "wiops": self.write_iops,
        }
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, kw_only=True)
class GroupLimits:
    """Of one group."""

    memory: int
    """Bytes."""
    cpu: int
    """Per cent of one CPU."""
    pids: int
    io: IoLimits = field(default_factory=IoLimits)

    @property
    def controllers(self) -> frozenset[Controller]:
        """What it takes to hold them."""
        found = {Controller.MEMORY, Controller.CPU, Controller.PIDS}
        return frozenset(found | {Controller.IO} if self.io != IoLimits() else found)


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What the configuration gives each guest beside what it was created with."""

    memory: int
    """Bytes."""
    cpu: int
    """Per cent of one CPU."""
    pids: int
    io: IoLimits = field(default_factory=IoLimits)

    def guest(self, *, cpus: int, memory: int, accelerator: str, host_memory: int) -> GroupLimits:
        """Limits of a QEMU.

        :param memory: the guest's RAM, MiB.
        :param accelerator: "kvm" or "tcg".
        :param host_memory: all that the host has, MiB.
        """
        translated = translation_buffer(host_memory) if accelerator == "tcg" else 0
        ram = memory * MIB
        return GroupLimits(
            memory=ram + ram // 64 + self.memory + translated + translated // 4,
            cpu=cpus * 100 + self.cpu,
            pids=cpus + self.pids,
            io=self.io,
        )

    def network(self) -> GroupLimits:
        """Limits of a network's helper: one thread."""
        return GroupLimits(memory=_NETWORK_MEMORY, cpu=100, pids=_NETWORK_PIDS)


def translation_buffer(host_memory: int) -> int:
    """Bytes that QEMU's buffer of translated code can grow to.

    :param host_memory: MiB.
    """
    return min(_MOST_TRANSLATED, host_memory * MIB // 8)


def group_files(
    limits: GroupLimits, held: Collection[Controller], device: str | None
) -> dict[str, str]:
    """What is to be written into the files of a group of version 2, as far as it has them.

    :param device: MAJOR:MINOR of the disk that bandwidth is limited of; None: of none.
    """
    files = {}
    if Controller.MEMORY in held:
        files["memory.max"] = str(limits.memory)
        # Of a guest that is killed in part nothing is of use.
        files["memory.oom.group"] = "1"
    if Controller.CPU in held:
        files["cpu.max"] = f"{limits.cpu * PERIOD // 100} {PERIOD}"
    if Controller.PIDS in held:
        files["pids.max"] = str(limits.pids)
    if Controller.IO in held:
        if limits.io.weight:
            files["io.weight"] = f"default {limits.io.weight}"
        if device is not None and limits.io.most:
            most = " ".join(f"{name}={value}" for name, value in limits.io.most.items())
            files["io.max"] = f"{device} {most}"
    return files


_SYSTEMD_IO = {
    "rbps": "IOReadBandwidthMax",
    "wbps": "IOWriteBandwidthMax",
    "riops": "IOReadIOPSMax",
    "wiops": "IOWriteIOPSMax",
}


def scope_properties(limits: GroupLimits, path: str) -> list[tuple[str, tuple[str, object]]]:
    """The same as properties of a unit of systemd (systemd.resource-control(5)), with their types.

    :param path: a file on the device that bandwidth is limited of.
    """
    found: list[tuple[str, tuple[str, object]]] = [
        ("MemoryMax", ("t", limits.memory)),
        ("CPUQuotaPerSecUSec", ("t", limits.cpu * 10_000)),
        ("TasksMax", ("t", limits.pids)),
    ]
    if limits.io.weight:
        found.append(("IOWeight", ("t", limits.io.weight)))
    found += [
        (_SYSTEMD_IO[name], ("a(st)", [(path, value)])) for name, value in limits.io.most.items()
    ]
    return found
