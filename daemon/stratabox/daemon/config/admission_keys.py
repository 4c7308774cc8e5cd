"""The keys of how many guests the host takes, and what of it they may never have."""

from __future__ import annotations

from enum import StrEnum

from stratabox.daemon.config.factor_kind import Factor
from stratabox.daemon.config.key import Key
from stratabox.daemon.config.kinds import Choice, Integer, Size
from stratabox.storage.model.records import GIB


class SwapWish(StrEnum):
    """What admission thinks of the host's swap."""

    IGNORE = "ignore"
    COUNT = "count"


ADMISSION_KEYS: tuple[Key, ...] = (
    Key(
        "admission.memory",
        Size(0, 16384 * GIB),
        0,
        "RAM that all guests with a process may have together, each counted whole; more are "
        "refused (ADMISSION_REFUSED). Warm spares count for nothing. 0: no limit.",
    ),
    Key(
        "admission.memory_overcommit",
        Factor(100),
        "4",
        "How many times the host's memory that is available, above `admission.memory_reserve`, "
        "all guests together may still grow by: each by its RAM, and some for QEMU itself, less "
        "what it has written of it. Beyond, more are refused (ADMISSION_REFUSED). 1: all of it is "
        "there, whatever guests do. 0: no limit.",
    ),
    Key(
        "admission.memory_reserve",
        Size(0, 16384 * GIB),
        "256MiB",
        "Memory of the host, or of the daemon's control group, that no guest is given.",
    ),
    Key(
        "admission.swap",
        Choice(SwapWish),
        "ignore",
        "Whether free swap counts as available memory. A guest that is swapped out stands still "
        "for seconds at a time.",
    ),
    Key(
        "admission.cpu_overcommit",
        Factor(1000),
        "0",
        "How many times the host's CPUs all guests with a process may have together, paused ones "
        "too. Too many are slow, and nothing worse. 0: no limit.",
    ),
    Key(
        "admission.sandboxes",
        Integer(0, 65536),
        0,
        "How many sandboxes may have a process at a time. 0: no limit.",
    ),
    Key(
        "admission.disk_overcommit",
        Factor(1_000_000),
        "0",
        "How many times the free space of the state folder's file system all disks and volumes "
        "together may still grow by, were they written full; a new sandbox is refused beyond. "
        "0: no limit, as they share most of what they hold and few are ever full.",
    ),
    Key(
        "admission.disk_reserve",
        Size(0, 16384 * GIB),
        0,
        "Bytes that must be free on that file system for a new sandbox, beside `store.high_water`.",
    ),
)
