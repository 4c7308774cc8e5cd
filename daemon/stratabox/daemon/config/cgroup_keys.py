"""The keys of what each guest's processes may take of the host, by control groups."""

from __future__ import annotations

from enum import StrEnum

from stratabox.daemon.config.key import Key
from stratabox.daemon.config.kinds import Choice, Folder, Integer, Size
from stratabox.storage.model.records import GIB, MIB


class LimitsWish(StrEnum):
    """Whether guests are to have limits by control groups."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


CGROUP_KEYS: tuple[Key, ...] = (
    Key(
        "cgroups.limits",
        Choice(LimitsWish),
        "auto",
        "Limits of memory, CPU and processes for each guest, by control groups of version 2. "
        "`auto`: as far as this host has them, and what it lacks is said (`stratabox host`, "
        "`doctor`, the log); `required`: the daemon does not start where one is missing, nor a "
        "guest that cannot be put into its group; `off`: none.",
    ),
    Key(
        "cgroups.folder",
        Folder(optional=True),
        "",
        "Folder of a hierarchy of control groups (version 2) where the daemon makes a group for "
        "each guest, if systemd does not run it. Empty: `stratabox` in the hierarchy's root, for "
        "root on hosts without systemd. Where systemd runs the daemon, each guest has a scope.",
    ),
    Key(
        "cgroups.memory_overhead",
        Size(64 * MIB, 1024 * GIB),
        "256MiB",
        "What a guest's group may take beside the guest's RAM: QEMU itself, and pages of files "
        "that it reads or has yet to write. One 64th of the RAM, and under TCG as much as QEMU's "
        "buffer of translated code can grow to (1 GiB, or an eighth of the host's memory), are "
        "added.",
    ),
    Key(
        "cgroups.cpu_overhead",
        Integer(10, 6400, "per cent of a CPU"),
        100,
        "CPU time that a guest's group may take beside its CPUs: for QEMU's own threads.",
    ),
    Key(
        "cgroups.pids",
        Integer(96, 1_000_000),
        256,
        "Processes and threads that a guest's group may have, beside one for each CPU. QEMU reads "
        "and writes disks by up to 64.",
    ),
    Key(
        "cgroups.io_weight",
        Integer(0, 10_000),
        0,
        "Share of a guest's group when the disks are busy (100 is what other groups have). 0: not "
        "set.",
    ),
    Key(
        "cgroups.io_read_bandwidth",
        Size(0, 16384 * GIB),
        0,
        "Bytes a second that a guest's group may read from the state folder's device. 0: no limit.",
    ),
    Key(
        "cgroups.io_write_bandwidth",
        Size(0, 16384 * GIB),
        0,
        "Bytes a second that it may write there. 0: no limit.",
    ),
    Key(
        "cgroups.io_read_iops",
        Integer(0, 1_000_000_000, "a second"),
        0,
        "Reads a second that it may do there. 0: no limit.",
    ),
    Key(
        "cgroups.io_write_iops",
        Integer(0, 1_000_000_000, "a second"),
        0,
        "Writes a second that it may do there. 0: no limit.",
    ),
)
