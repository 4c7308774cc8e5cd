"""One save's copy of a guest's RAM: in rounds while it runs, a last one while it stands still.

What each round brings is kept in memory, as much as is allowed; what exceeds that goes to the file
at once. A page that was copied in several rounds is written once, as it was last.

All methods block and belong in a thread, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping
from stratabox.daemon.hypervisor.memory.pages import PageMap, Runs, bytes_of, pieces_of
from stratabox.daemon.hypervisor.memory.reader import Buffer
from stratabox.daemon.hypervisor.memory.tracking import Tracking, forget_soft_dirty
from stratabox.storage.files.memory.writer import RamWriter

MOST_KEPT = 256 << 20
"""Bytes of a guest that are kept in the daemon's memory at most, but for the last round's."""

_LEAST_ROOM = 8 << 20
_PORTION = 8 << 20


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
        self._stack = ExitStack()
        self._buffers: list[Buffer] = []
        self._used = 0
        """Of the last buffer."""
        self._kept = 0
        self._parts: list[tuple[Buffer, int, Runs]] = []
        """What was copied into memory, oldest first."""

    def __enter__(self) -> RamCopy:
        self._page_map = self._stack.enter_context(PageMap(self._mapping))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copy_running(self) -> int:
        """One round while the guest runs; only for `Tracking.WRITTEN`. Returns bytes copied."""
        runs = self._take_written()
        size = bytes_of(runs)
        self._make_room(min(size, MOST_KEPT))
        for portion in pieces_of(runs, _PORTION):
            if self._kept + bytes_of(portion) <= MOST_KEPT:
                self._keep(portion)
            else:
                self._spill(portion)
        return size

    def expect(self, size: int) -> None:
        """Have memory ready for a last round of about that size."""
        if self._tracking is Tracking.NONE or self._everything:
            size = bytes_of(self._page_map.private()) * 9 // 8
        self._make_room(max(size, _LEAST_ROOM))

    def copy_stopped(self) -> int:
        """The last round, while the guest stands still. Returns bytes copied."""
        match self._tracking:
            case Tracking.WRITTEN:
                runs = self._take_written()
            case Tracking.SOFT_DIRTY if not self._everything:
                runs = self._page_map.soft_dirty()
            case _:
                runs = self._page_map.private()
        self._keep(runs)
        if self._tracking is Tracking.SOFT_DIRTY:
            forget_soft_dirty(self._mapping.pid)
        return bytes_of(runs)

    def write(self) -> None:
        """Write what was kept.

        :raise NoSpaceError: NO_SPACE.
        """
        for first, data in self._newest():
            with data:
                self._writer.add(first, data)

    def _take_written(self) -> Runs:
        runs = self._page_map.take_written()
        if self._everything:
            # Only now: a page written in between is here and in the next round, never in neither.
            self._everything = False
            runs = self._page_map.private()
        return runs

    def _keep(self, runs: Runs) -> None:
        size = bytes_of(runs)
        if not runs:
            return
        buffer, offset = self._make_room(size)
        buffer.read(self._mapping, runs, offset)
        self._parts.append((buffer, offset, runs))
        self._used += size
        self._kept += size

    def _spill(self, runs: Runs) -> None:
        """Straight into the file, where anything kept comes after it and so counts more."""
        with Buffer(bytes_of(runs)) as buffer:
            buffer.read(self._mapping, runs, 0)
            done = 0
            for first, count in runs:
                with buffer.view(done, count * PAGE) as view:
                    self._writer.add(first, view)
                done += count * PAGE

    def _make_room(self, size: int) -> tuple[Buffer, int]:
        if not self._buffers or self._buffers[-1].size - self._used < size:
            self._buffers.append(self._stack.enter_context(Buffer(size + _LEAST_ROOM)))
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
