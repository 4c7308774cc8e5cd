"""Write a qcow2 from clusters that come in their order, in one pass.

```
cluster 0     header, name of the backing file
from 1        L1 table
then          clusters with data as they come; an L2 table behind the last cluster that it names
at the end    refcount blocks (a one for each cluster of the file), refcount table
```

Every number in it is made here: whatever the clusters hold, the file is sound. The header is
written last, so that a file that was not finished has none.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from stratabox.storage.qcow2.clusters import DATA, ZERO
from stratabox.storage.qcow2.empty import CLUSTER, L1_ENTRY_COVERS, first_cluster

_COPIED = 1 << 63
_ZERO_FLAG = 1
_PER_TABLE = CLUSTER // 8
_PER_BLOCK = CLUSTER // 2


class FreshDisk:
    """A file that is being written; a context manager that removes it unless `finish` was called.

    :param path: must not be there yet.
    :param size: virtual size, bytes, whole sectors.
    :param backing_name: as for `empty.create`.
    :raise OSError: as open does.
    """

    def __init__(self, path: Path, size: int, backing_name: str | None) -> None:
        self._path, self._size, self._backing = path, size, backing_name
        self._l1 = array("Q", bytes(8 * -(-size // L1_ENTRY_COVERS)))
        self._l2 = array("Q", bytes(CLUSTER))
        self._table = 0
        self._end = 1 + -(-len(self._l1) * 8 // CLUSTER)
        """The next free cluster of the file."""
        self._finished = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)

    def __enter__(self) -> Self:
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

    def add(
        self, first: int, states: bytes | bytearray | memoryview, data: bytes | memoryview
    ) -> None:
        """Add clusters from number `first` on, which lie above all that were added before.

        They must not cross the reach of an L2 table.

        :param states: one byte for each: ABSENT, ZERO or DATA.
        :param data: the bytes of those with data, whole clusters.
        :raise OSError: as writing does.
        """
        table, at = divmod(first, _PER_TABLE)
        if table != self._table:
            self._put_table()
            self._table = table
        for number, state in enumerate(states, at):
            if state == DATA:
                self._l2[number] = self._end * CLUSTER | _COPIED
                self._end += 1
            elif state == ZERO:
                self._l2[number] = _ZERO_FLAG
        if data:
            self._write(data, self._end * CLUSTER - len(data))

    def finish(self) -> None:
        """Make it whole, durable and read-only; its folder's entry is the caller's.

        :raise OSError: as writing does.
        """
        self._put_table()
        self._write(_big_endian(self._l1), CLUSTER)
        blocks, tables = _refcounts(self._end)
        at = self._end
        counts = struct.pack(">H", 1) * (at + blocks + tables)
        self._write(counts, at * CLUSTER)
        offsets = array("Q", ((at + number) * CLUSTER for number in range(blocks)))
        self._write(_big_endian(offsets), (at + blocks) * CLUSTER)
        os.ftruncate(self._descriptor, (at + blocks + tables) * CLUSTER)
        head = first_cluster(
            self._size,
            self._backing,
            l1=(CLUSTER, len(self._l1)),
            refcounts=((at + blocks) * CLUSTER, tables),
        )
        self._write(head, 0)
        os.fchmod(self._descriptor, 0o400)
        os.fsync(self._descriptor)
        self._finished = True

    def _put_table(self) -> None:
        """Write the L2 table, if it names anything, and begin an empty one."""
        if any(self._l2):
            self._write(_big_endian(self._l2), self._end * CLUSTER)
            self._l1[self._table] = self._end * CLUSTER | _COPIED
            self._end += 1
            self._l2 = array("Q", bytes(CLUSTER))

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        while data:
            done = os.pwrite(self._descriptor, data, offset)
            data, offset = data[done:], offset + done


def _refcounts(clusters: int) -> tuple[int, int]:
    """Refcount blocks, and clusters of their table, for a file that gets those as well."""
    blocks = tables = 0
    while True:
        needed = -(-(clusters + blocks + tables) // _PER_BLOCK)
        wanted = needed, -(-needed * 8 // CLUSTER)
        if wanted == (blocks, tables):
            return wanted
        blocks, tables = wanted


def _big_endian(numbers: array[int]) -> bytes:
    if sys.byteorder == "little":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()
