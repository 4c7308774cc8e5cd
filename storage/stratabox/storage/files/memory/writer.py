"""Makes a file of RAM in one pass: data as it comes, tables and header at the end."""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from stratabox.storage.files import durable
from stratabox.storage.files.memory.format import CHUNK, PAGE, ZEROS, RamFile, header

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
        self._sums: list[bytes] = []
        self._sum = hashlib.sha256()
        self._summed = 0
        self._data_pages = 0
        self._finished = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)
        os.lseek(self._descriptor, PAGE, os.SEEK_SET)

    def __enter__(self) -> RamWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            # A copy of 4 KiB and a comparison in C take a quarter of a microsecond.
            is_zero = page < pages and bytes(data[page * PAGE : (page + 1) * PAGE]) == _ZERO_PAGE
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
        if self._summed:
            self._end_sum()
        if sys.byteorder == "big":
            self._table.byteswap()
        sums = b"".join(self._sums)
        tables = self._table.tobytes() + sums
        with durable.naming_a_full_disk():
            _write_all(self._descriptor, memoryview(tables))
            first_page = header(
                id=self._id,
                parent=self._parent,
                ram_bytes=self._ram_bytes,
                runs=len(self._table) // 2,
                data_pages=self._data_pages,
                tables=tables,
            )
            os.pwrite(self._descriptor, first_page, 0)
            os.fchmod(self._descriptor, 0o400)
            os.fsync(self._descriptor)
            durable.sync_folder(self._path.parent)
        self._finished = True
        if sys.byteorder == "big":
            self._table.byteswap()
        return RamFile(
            path=self._path,
            id=self._id,
            parent=self._parent,
            ram_bytes=self._ram_bytes,
            data_pages=self._data_pages,
            table=self._table,
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
        with durable.naming_a_full_disk():
            _write_all(self._descriptor, data)
        while data:
            part = data[: CHUNK - self._summed]
            self._sum.update(part)
            self._summed += len(part)
            if self._summed == CHUNK:
                self._end_sum()
            data = data[len(part) :]

    def _end_sum(self) -> None:
        self._sums.append(self._sum.digest())
        self._sum = hashlib.sha256()
        self._summed = 0


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


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
