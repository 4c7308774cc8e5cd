"""The store's budget: whether there is room for one more thing that is kept.

Asked in the transaction that writes a new snapshot, sandbox, image or volume down, before anything
is made. Guests that run go on writing whatever it says, and deleting is never refused: what is
refused is to begin something that would take the room which they still need.
"""

from __future__ import annotations

from stratabox.daemon.config import Config
from stratabox.daemon.lifecycle.account import Resource, Verdict
from stratabox.daemon.lifecycle.admission import refusal
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files import usage
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import NoSpaceError
from stratabox.storage.model.records import MIB


class BudgetError(NoSpaceError):
    """The store has all that `store.budget` allows. BUDGET_EXCEEDED.

    Metadata, in bytes: `budget`, `used`, `wanted`.
    """

    default_reason = "BUDGET_EXCEEDED"


class NearlyFullError(NoSpaceError):
    """The file system is fuller than `store.high_water` allows. STORE_NEARLY_FULL.

    Metadata: `high_water` and `percent`; in bytes `free` and `filesystem`.
    """

    default_reason = "STORE_NEARLY_FULL"


_WAY = "delete snapshots, sandboxes or images ('stratabox df --verbose' tells what takes it)"


def check(tx: Transaction, config: Config, layout: Layout, what: str, wanted: int = 0) -> None:
    """Let something new be kept, or refuse it.

    :param what: what is to be made, for the message: "a snapshot".
    :param wanted: bytes that it is known to take at once, as an import's.
    :raise BudgetError: BUDGET_EXCEEDED.
    :raise NearlyFullError: STORE_NEARLY_FULL.
    """
    if config.store_budget:
        used = usage.counted(tx, layout)
        if used + wanted > config.store_budget:
            more = f" and {_mib(wanted)} more would be" if wanted else ""
            raise BudgetError(
                f"no room for {what}: {_mib(used)} of the {_mib(config.store_budget)} that"
                f" store.budget allows are taken{more}; {_WAY}, or raise it",
                budget=config.store_budget,
                used=used,
                wanted=wanted,
            )
    if config.store_high_water < 100:
        disk = usage.file_system(layout)
        after = 100 * (1 - (disk.free - wanted) / disk.bytes) if disk.bytes else 100.0
        if after > config.store_high_water:
            raise NearlyFullError(
                f"no room for {what}: the file system of {layout.root} is {disk.percent:.1f} % full"
                f" ({_mib(disk.free)} free) and store.high_water is {config.store_high_water} %;"
                f" {_WAY}, make room on it, or raise the mark",
                high_water=config.store_high_water,
                percent=f"{disk.percent:.1f}",
                free=disk.free,
                filesystem=disk.bytes,
            )


def check_growth(tx: Transaction, config: Config, layout: Layout, wanted: int) -> None:
    """Let a sandbox be made whose disks can grow to so many bytes, or refuse it.

    :raise AdmissionError: ADMISSION_REFUSED.
    """
    factor, reserve = config.admission_disk_overcommit, config.admission_disk_reserve
    if not (factor or reserve):
        return
    free = usage.file_system(layout).free - reserve
    growing = usage.growth(tx, layout) if factor else 0
    if free < 0 or (factor and growing + wanted > free * factor):
        raise refusal(
            Verdict(
                resource=Resource.DISK if free >= 0 else Resource.DISK_FREE,
                limit=int(max(0, free) * (factor or 1)) // MIB,
                in_use=growing // MIB,
                wanted=wanted // MIB,
                sandboxes=len(sandboxes.memory_in_use(tx)),
            )
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
