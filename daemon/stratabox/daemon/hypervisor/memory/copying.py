"""One save's copy of a guest's RAM: in rounds while it runs, a last one while it stands still.

What the rounds bring is kept in memory, and a page that was copied in several of them is written
once, as it was last. When more comes than may be kept, all that is kept goes to the file first:
there too, what is written later counts more.

All methods block and belong in a thread, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping
from stratabox.daemon.hypervisor.memory.pages import PageMap, Runs, bytes_of, pieces_of
from stratabox.daemon.hypervisor.memory.reader import Buffer
from stratabox.daemon.hypervisor.memory.tracking import Tracking, forget_soft_dirty
from stratabox.storage.files.memory.writer import RamWriter

MOST_KEPT = 256 << 20
"""Bytes of a guest that are kept in the daemon's memory at most."""

_LEAST_ROOM = 8 << 20
_PORTION = 8 << 20
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)


class RamCopy:
    """The copy for one snapshot; a context manager.

    :param everything: copy all private pages, not only those written since the last save.
    """

    def __init__(
        self, mapping: RamMapping, tracking: Tracking, writer: RamWriter, *, everything: bool
    ) -> None:
        self._mapping = mapping
        self._tracking = tracking
        self._writer = writer
        self._everything = everything
        self._buffers: list[Buffer] = []
        self._used = 0
        """Of the last buffer."""
        self._kept = 0
        self._parts: list[tuple[Buffer, int, Runs]] = []
        """What is kept, oldest first: where, from which byte on, which pages."""

    def __enter__(self) -> RamCopy:
        self._page_map = PageMap(self._mapping)
        return self

    def __exit__(self, *_: object) -> None:
        while self._buffers:
            self._buffers.pop().close()
        self._page_map.close()

    def copy_running(self) -> int:
        """One round while the guest runs; only for `Tracking.WRITTEN`. Returns bytes copied."""
        runs = self._take_written()
        self._make_room(min(bytes_of(runs), MOST_KEPT))
        self._keep(runs, MOST_KEPT)
        return bytes_of(runs)

    def expect(self, size: int) -> None:
        """Have memory ready for a last round of about that size."""
        if self._tracking is not Tracking.WRITTEN and self._everything:
            size = bytes_of(self._page_map.private()) * 9 // 8
        elif self._tracking is Tracking.SOFT_DIRTY:
            size = bytes_of(self._page_map.soft_dirty()) * 9 // 8
        self._make_room(min(max(size, _LEAST_ROOM), _affordable()))

    def copy_stopped(self) -> int:
        """The last round, while the guest stands still. Returns bytes copied."""
        match self._tracking:
            case Tracking.WRITTEN:
                runs = self._take_written()
            case Tracking.SOFT_DIRTY if not self._everything:
                runs = self._page_map.soft_dirty()
            case _:
                runs = self._page_map.private()
        self._keep(runs, self._kept + _affordable())
        if self._tracking is Tracking.SOFT_DIRTY:
            forget_soft_dirty(self._mapping.pid)
        return bytes_of(runs)

    def write(self) -> None:
        """Write what is kept.

        :raise NoSpaceError: NO_SPACE.
        """
        for first, data in self._newest():
            with data:
                self._writer.add(first, data)
        self._parts.clear()
        self._kept = self._used = 0
        while len(self._buffers) > 1:
            self._buffers.pop(0).close()

    def _take_written(self) -> Runs:
        runs = self._page_map.take_written()
        if self._everything:
            # Only now: a page written in between is here and in the next round, never in neither.
            self._everything = False
            runs = self._page_map.private()
        return runs

    def _keep(self, runs: Runs, most: int) -> None:
        """Copy pages into memory, and keep no more than `most` bytes there."""
        whole = self._kept + bytes_of(runs) <= most
        for portion in [runs] if whole and runs else pieces_of(runs, _PORTION):
            size = bytes_of(portion)
            if self._kept + size > most:
                self.write()
            buffer, offset = self._make_room(size)
            buffer.read(self._mapping, portion, offset)
            self._parts.append((buffer, offset, portion))
            self._used += size
            self._kept += size

    def _make_room(self, size: int) -> tuple[Buffer, int]:
        if not self._buffers or self._buffers[-1].size - self._used < size:
            self._buffers.append(Buffer(size + _LEAST_ROOM))
            self._used = 0
        return self._buffers[-1], self._used

    def _newest(self) -> Iterator[tuple[int, memoryview]]:
        """(first page, data) of each page as it was last, in order."""
        claimed = bytearray(self._mapping.size // PAGE)
        found: list[tuple[int, int, Buffer, int]] = []
        for buffer, start, runs in reversed(self._parts):
            offset = start
            for first, count in runs:
                position, end = first, first + count
                while (begin := claimed.find(0, position, end)) >= 0:
                    stop = claimed.find(1, begin, end)
                    position = end if stop < 0 else stop
                    claimed[begin:position] = b"\1" * (position - begin)
                    found.append((begin, position, buffer, offset + (begin - first) * PAGE))
                offset += count * PAGE
        for begin, end, buffer, offset in sorted(found, key=lambda each: each[0]):
            yield begin, buffer.view(offset, (end - begin) * PAGE)


def _affordable() -> int:
    """Bytes that may be taken at once: a quarter of what the host has left."""
    found = _AVAILABLE.search(Path("/proc/meminfo").read_text())
    return max(int(found[1]) * 1024 // 4 if found else 0, MOST_KEPT)
