"""Some room that is given up when the disk is full, so that the catalog can still be written.

Without it a full disk would keep the daemon from starting, and its users from deleting anything.
Guests that write take whatever comes free, until QEMU stops them, each once. So it is given up in
slices: what a guest takes of one leaves the others for writing down that it was stopped.
It is taken again once there is plenty of room; guests that a full disk has stopped are let go on
only where there is more room than the reserve gives back (`upkeep.full_disk`).
"""

from __future__ import annotations

import os
from pathlib import Path

from stratabox.storage.model.records import MIB

LARGEST = 16 * MIB
SLICE = MIB // 2
"""Far more than one transaction of the catalog takes."""
_SHARE = 50
"""It takes at most the 50th part of the file system."""
_PLENTY = 8
"""It is taken where there is so many times as much free."""


def free_bytes(folder: Path) -> int:
    """Bytes that QEMU, which is nobody special, can still write."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def wanted_bytes(folder: Path) -> int:
    """How large the reserve is on that file system."""
    found = os.statvfs(folder)
    return min(LARGEST, found.f_blocks * found.f_frsize // _SHARE)


def release(path: Path) -> bool:
    """Give up a slice of it; False: there was none left."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    if size > 0:
        os.truncate(path, max(0, size - SLICE))
    return size > 0


def take(path: Path) -> bool:
    """Take it where it is not taken and there is plenty of room; whether it is taken now.

    :raise OSError: when the disk fails. A full one is no failure: there is none, then.
    """
    size = wanted_bytes(path.parent)
    if path.exists() and path.stat().st_size >= size:
        return True
    if free_bytes(path.parent) < _PLENTY * size:
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    finally:
        os.close(descriptor)
    return True
