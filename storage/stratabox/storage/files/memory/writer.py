"""Makes a file of RAM in one pass: data as it comes, tables and header at the end.

```
 add: pages ──▶ chunk, until it is full ──▶ packed by some threads ──▶ written in order
```
"""

from __future__ import annotations

import os
import sys
from array import array
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from stratabox.storage.files import durable
from stratabox.storage.files.memory import packing
from stratabox.storage.files.memory.format import CHUNK, PAGE, ZEROS, RamFile, header

_MOST_PACKING = 8
"""Chunks that are packed, or wait to be written, at a time."""
_ZERO_PAGE = bytes(PAGE)


class RamWriter:
    """A file that is being written; a context manager that removes it unless `finish` was called.

    :param path: it must not be there yet.
    :raise OSError: as open does.
    """

    def __init__(self, path: Path, *, id: str, parent: str | None, ram_bytes: int) -> None:
        self._path = path
        self._id, self._parent, self._ram_bytes = id, parent, ram_bytes
        self._table = array("Q")
        self._data_pages = 0
        self._stored = array("I")
        self._sums: list[bytes] = []
        self._chunk = bytearray(CHUNK)
        self._filled = 0
        self._spare: list[bytearray] = []
        self._packing: deque[tuple[bytearray, Future[packing.Packed]]] = deque()
        self._finished = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)
        os.lseek(self._descriptor, PAGE, os.SEEK_SET)
        self._pool = packing.threads("pack")  # has no thread before there is something to pack

    def __enter__(self) -> RamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def add(self, first: int, data: memoryview) -> None:
        """Add whole pages from page `first` on; they count more than what was added before.

        :raise NoSpaceError: NO_SPACE.
        """
        pages = len(data) // PAGE
        begin, zeros = 0, False
        for page in range(pages + 1):
            # The first byte tells most pages apart; the rest is a copy of 4 KiB and a comparison
            # in C, a quarter of a microsecond.
            at = page * PAGE
            is_zero = page < pages and not data[at] and bytes(data[at : at + PAGE]) == _ZERO_PAGE
            if page == pages or (page > begin and is_zero != zeros):
                if page > begin:
                    self._put(first + begin, data[begin * PAGE : page * PAGE], zeros)
                begin = page
            zeros = is_zero

    def add_zeros(self, first: int, count: int) -> None:
        """Add pages of zeros."""
        table = self._table
        if table and table[-1] & ZEROS and table[-2] + (table[-1] ^ ZEROS) == first:
            table[-1] += count
        else:
            table.extend((first, count | ZEROS))

    def finish(self) -> RamFile:
        """Make it durable and read-only. Its folder's entry is durable too.

        :raise NoSpaceError: NO_SPACE.
        """
        with durable.naming_a_full_disk():
            if self._filled:
                self._pack()
            while self._packing:
                self._write_one()
        sums = b"".join(self._sums)
        tables = _content(self._table) + _content(self._stored) + sums
        with durable.naming_a_full_disk():
            _write_all(self._descriptor, memoryview(tables))
            first_page = header(
                id=self._id,
                parent=self._parent,
                ram_bytes=self._ram_bytes,
                runs=len(self._table) // 2,
                data_pages=self._data_pages,
                stored_bytes=sum(self._stored),
                tables=tables,
            )
            os.pwrite(self._descriptor, first_page, 0)
            os.fchmod(self._descriptor, 0o400)
            os.fsync(self._descriptor)
            durable.sync_folder(self._path.parent)
        self._finished = True
        return RamFile(
            path=self._path,
            id=self._id,
            parent=self._parent,
            ram_bytes=self._ram_bytes,
            data_pages=self._data_pages,
            table=self._table,
            chunk_bytes=CHUNK,
            stored=self._stored,
            sums=sums,
        )

    def _put(self, first: int, data: memoryview, zeros: bool) -> None:
        count = len(data) // PAGE
        if zeros:
            self.add_zeros(first, count)
            return
        table = self._table
        if table and not table[-1] & ZEROS and table[-2] + table[-1] == first:
            table[-1] += count
        else:
            table.extend((first, count))
        self._data_pages += count
        while data:
            part = data[: CHUNK - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == CHUNK:
                with durable.naming_a_full_disk():
                    self._pack()
            data = data[len(part) :]

    def _pack(self) -> None:
        """Hand the chunk to a thread, and write the oldest one when many are under way."""
        pages = memoryview(self._chunk)[: self._filled]
        self._packing.append((self._chunk, self._pool.submit(packing.pack, pages)))
        if len(self._packing) >= _MOST_PACKING:
            self._write_one()
        self._chunk = self._spare.pop() if self._spare else bytearray(CHUNK)
        self._filled = 0

    def _write_one(self) -> None:
        chunk, future = self._packing.popleft()
        packed = future.result()
        _write_all(self._descriptor, memoryview(packed.data))
        self._stored.append(len(packed.data))
        self._sums.append(packed.sum)
        self._spare.append(chunk)


def write(
    path: Path,
    pieces: Iterable[tuple[int, memoryview]],
    *,
    id: str,
    parent: str | None,
    ram_bytes: int,
) -> RamFile:
    """Write a file from (offset in RAM, whole pages); nothing is left of it when this raises.

    :raise NoSpaceError: NO_SPACE.
    """
    with RamWriter(path, id=id, parent=parent, ram_bytes=ram_bytes) as writer:
        for offset, data in pieces:
            writer.add(offset // PAGE, data)
        return writer.finish()


def _content(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
