"""Which pages of a guest's RAM are its process's own, told by the kernel's page tables.

A page is *private* when the process has written it since it started: it is there (or swapped out)
and is neither the mapped file's nor the kernel's page of zeros. Linux 6.7 finds such pages by
itself (PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst) in microseconds; before that, the
64-bit entries of /proc/PID/pagemap are read and sorted out, which takes some ms for each GiB.

Runs are (first page, count), in order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Iterable
from typing import TypeAlias

from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping, denied
from stratabox.storage.model.errors import UnavailableError

Runs: TypeAlias = list[tuple[int, int]]

# include/uapi/linux/fs.h
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_ARGUMENT = struct.Struct("<12Q")
_WRITTEN, _FILE, _PRESENT, _SWAPPED, _PFNZERO = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_WP_MATCHING, _CHECK_WPASYNC = 1 << 0, 1 << 1
_REGIONS = 1 << 14

# The entries of /proc/PID/pagemap: bit 63 present, 62 swapped, 61 file-backed, 55 soft-dirty.
_BATCH = 1 << 18
_PRIVATE = bytes(int(byte & 0xC0 != 0 and not byte & 0x20) for byte in range(256))
_SOFT_DIRTY = bytes(byte >> 7 for byte in range(256))


class PageMap:
    """The page tables of one mapping; a context manager.

    :raise DeniedError: MEMORY_UNREADABLE.
    :raise UnavailableError: MEMORY_UNREADABLE, when the process is gone.
    """

    def __init__(self, mapping: RamMapping) -> None:
        self._mapping = mapping
        self._regions = array("Q", bytes(24 * _REGIONS))
        try:
            self._descriptor = os.open(f"/proc/{mapping.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise denied(mapping.pid) from error
        except OSError as error:
            raise _gone(mapping.pid) from error

    def __enter__(self) -> PageMap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)

    def private(self) -> Runs:
        """Every page that the process has written since it started."""
        try:
            return self._scan(flags=0, also=0)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        return self._read(soft_dirty=False)

    def is_tracked(self) -> bool:
        """Whether the whole mapping is registered for `take_written`."""
        try:
            # Asked for what no page is, a file's and zeros at once: there is no result, but the
            # kernel checks the registration of each mapping on the way.
            self._call(_CHECK_WPASYNC, self._mapping.start, 0, _FILE | _PFNZERO, 0)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
                return False
            raise
        return True

    def take_written(self) -> Runs:
        """The private pages written since this was last called, or at all for the first time.

        Each page is told and protected in one step under its page table's lock, so that this may
        be called while the guest runs: what is written afterwards, the next call tells.
        """
        return self._scan(flags=_WP_MATCHING | _CHECK_WPASYNC, also=_WRITTEN)

    def soft_dirty(self) -> Runs:
        """The private pages with the soft-dirty bit."""
        return self._read(soft_dirty=True)

    def _scan(self, *, flags: int, also: int) -> Runs:
        runs: Runs = []
        base, position = self._mapping.start, self._mapping.start
        regions = self._regions
        while position < self._mapping.end:
            count, position = self._call(
                flags, position, _PRESENT | _SWAPPED, _FILE | _PFNZERO | also, _FILE | _PFNZERO
            )
            runs += [
                ((begin - base) // PAGE, (end - begin) // PAGE)
                for begin, end in zip(
                    regions[: 3 * count : 3], regions[1 : 3 * count : 3], strict=True
                )
            ]
            if count:
                # The kernel walks in steps, and after the last one may name an earlier end (seen
                # on 6.18): what was found already must not be found again.
                position = max(position, regions[3 * count - 2])
        return joined(runs)

    def _call(
        self, flags: int, start: int, any_of: int, all_of: int, inverted: int
    ) -> tuple[int, int]:
        """One PAGEMAP_SCAN from `start`: (regions found, where it stopped)."""
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size, flags, start, self._mapping.end, 0,
                self._regions.buffer_info()[0], _REGIONS, 0, inverted, all_of, any_of, 0,
            )
        )  # fmt: skip
        try:
            found = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument, True)
        except ProcessLookupError as error:
            raise _gone(self._mapping.pid) from error
        return found, _ARGUMENT.unpack(argument)[4]

    def _read(self, *, soft_dirty: bool) -> Runs:
        runs: Runs = []
        first, last = self._mapping.start // PAGE, self._mapping.end // PAGE
        for begin in range(first, last, _BATCH):
            wanted = min(_BATCH, last - begin) * 8
            entries = os.pread(self._descriptor, wanted, begin * 8)
            if len(entries) != wanted:
                raise _gone(self._mapping.pid)
            marks = entries[7::8].translate(_PRIVATE)
            if soft_dirty:
                dirty = entries[6::8].translate(_SOFT_DIRTY)
                both = int.from_bytes(marks, "little") & int.from_bytes(dirty, "little")
                marks = both.to_bytes(len(marks), "little")
            runs += _runs_of(marks, begin - first)
        return joined(runs)


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """The same pages, with neighbours in one run each."""
    result: Runs = []
    end = -1
    for first, count in runs:
        if first == end:
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((first, count))
        end = first + count
    return result


def bytes_of(runs: Runs) -> int:
    """How many bytes these pages have."""
    return sum(count for _, count in runs) * PAGE


def pieces_of(runs: Runs, size: int) -> list[Runs]:
    """The same pages, in portions of at most `size` bytes."""
    limit = size // PAGE
    portions: list[Runs] = [[]]
    room = limit
    for first, count in runs:
        while count:
            if room == 0:
                portions.append([])
                room = limit
            part = min(count, room)
            portions[-1].append((first, part))
            first, count, room = first + part, count - part, room - part
    return [portion for portion in portions if portion]


def _runs_of(marks: bytes, offset: int) -> Runs:
    """Runs of ones in a string of zero and one bytes."""
    runs: Runs = []
    begin = marks.find(1)
    while begin >= 0:
        end = marks.find(0, begin)
        end = len(marks) if end < 0 else end
        runs.append((offset + begin, end - begin))
        begin = marks.find(1, end)
    return runs


def _gone(pid: int) -> UnavailableError:
    return UnavailableError(f"QEMU (process {pid}) is gone", reason="MEMORY_UNREADABLE")
