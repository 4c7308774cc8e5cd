"""Where a QEMU has its guest's RAM.

QEMU itself says which file its RAM is a mapping of (`mem-path`); the kernel says where that file
is mapped. It is told by device, inode and offset, over all the process's mappings: names can be
anything, and one mapping may be split in many.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.model.errors import DeniedError, UnavailableError

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class RamMapping:
    """The guest's RAM within one process: `size` bytes at `start`."""

    pid: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.size


def find(pid: int, path: str, size: int) -> RamMapping:
    """Find the RAM of a QEMU.

    :param path: its memory backend's `mem-path`; under /proc/self it is QEMU's own.
    :raise DeniedError: MEMORY_UNREADABLE, when the kernel does not let us look.
    :raise UnavailableError: MEMORY_UNREADABLE, when it is not mapped as it should be.
    """
    try:
        status = os.stat(path.replace("/proc/self/", f"/proc/{pid}/", 1))  # noqa: PTH116
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except PermissionError as error:
        raise denied(pid) from error
    except OSError as error:
        raise UnavailableError(
            f"the memory of QEMU (process {pid}) is gone: {error.strerror}",
            reason="MEMORY_UNREADABLE",
        ) from error
    found = sorted(
        (start, end, offset)
        for start, end, offset, device, inode in map(_parse, lines)
        if device == status.st_dev and inode == status.st_ino
    )
    # Anonymous memory has no offset that means anything once it was split; a file's has.
    begin = found[0][0] if found else 0
    reached = begin
    for start, end, _ in found:
        if start != reached:
            break
        reached = end
    if reached - begin != size or any(
        offset not in (0, start - begin) for start, _, offset in found
    ):
        raise UnavailableError(
            f"QEMU (process {pid}) does not map its guest's RAM as Stratabox starts it",
            reason="MEMORY_UNREADABLE",
        )
    return RamMapping(pid=pid, start=begin, size=size)


def denied(pid: int) -> DeniedError:
    """The error that says what is needed to read another process's memory."""
    return DeniedError(
        f"the kernel does not let Stratabox read the memory of QEMU (process {pid}): run the "
        "daemon as root or with CAP_SYS_PTRACE, or let QEMU run as the daemon's own user with "
        "kernel.yama.ptrace_scope=0",
        reason="MEMORY_UNREADABLE",
    )


def _parse(line: str) -> tuple[int, int, int, int, int]:
    """(start, end, offset, device, inode) of a line of /proc/PID/maps (proc_pid_maps(5))."""
    addresses, _, offset, device, inode = line.split(maxsplit=5)[:5]
    start, _, end = addresses.partition("-")
    major, _, minor = device.partition(":")
    return (
        int(start, 16),
        int(end, 16),
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
    )
