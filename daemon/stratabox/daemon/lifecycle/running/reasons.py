"""Why a sandbox is as it is, where the daemon reads its own words again."""

from __future__ import annotations

from stratabox.storage.catalog import volumes

PAUSED_BY_USER = "paused by request"
PAUSED_FULL = (
    "the host's disk is full: free some space, then it goes on by itself; or pause it, and it stays"
)
PAUSED_FAILED = "the host's disk failed: look at it before you resume"

DISK_FAILED = volumes.DISK_FAILED
"""How it begins what is said of a disk that gave an I/O error; until the next start."""


def is_full(reason: str) -> bool:
    """QEMU has stopped the guest because the host's disk was full."""
    return reason.startswith(PAUSED_FULL)


def failed_disk(reason: str) -> str:
    """What is said in there of a disk that failed; "": nothing."""
    _, mark, rest = reason.partition(DISK_FAILED)
    return mark + rest


def keeping(old: str, new: str) -> str:
    """The new reason, with what the old one said of a failed disk: that is not over by itself."""
    return "; ".join(part for part in (new, failed_disk(old)) if part)
