"""Write a layer anew: what several layers on top of each other hold together, as one file.

```
 sources   X ─▶ … ─▶ lowest ─▶ base        of each cluster the topmost that has it
 target    X' ────────────────▶ base       reads the same as X, on that base and on any other

 cluster 0   header; written last: a file that was not finished has none
 then        data as it is found, compressed clusters packed together, an L2 table behind its data
 at the end  L1 table, refcount blocks, refcount table
```

Clusters of zeros stay zeros, because below there may be something else. Data is copied by
copy_file_range(2): file systems that can share blocks do. Compressed clusters are taken over as
they are. The sources are sealed and are only read; the target is ours until it is `finish`\\ ed.
"""

from __future__ import annotations

import errno
import itertools
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import zstandard

from stratabox.storage.model.errors import DeniedError
from stratabox.storage.qcow2 import header
from stratabox.storage.qcow2.empty import CLUSTER, L1_ENTRY_COVERS, first_cluster, write_at
from stratabox.storage.qcow2.tables import (
    COMPRESSED,
    COPIED,
    ENTRIES,
    OFFSET,
    ZERO,
    Layer,
    Packed,
    swapped,
)

PORTION = 1 << 20
"""Bytes that are copied between two looks at whether to go on; never less than a cluster."""

_LEVEL = 3
_LEAST_GAIN = CLUSTER // 16
"""Bytes by which a cluster must get smaller, for its unpacking at every read."""
_PER_BLOCK = CLUSTER // 2
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

Found = dict[int, tuple[int, int]]
"""Of one L2 table: entry's number → (entry, number of the source), where there is something."""


class Rewrite:
    """A layer that is being written; a context manager that closes all, and removes the target
    unless `finish` was called.

    :param sources: the topmost first; closed with this.
    :param target: must not be there yet.
    :param backing_name: as for ``empty.create``.
    :param compress: compress what is not compressed yet.
    :raise DeniedError: LAYER_UNFIT, when the sources cannot be put together; then they are the
        caller's to close.
    :raise CorruptError: LAYER_CORRUPT; likewise.
    :raise FileExistsError: likewise.
    """

    def __init__(
        self,
        sources: Sequence[Layer],
        target: Path,
        *,
        backing_name: str | None,
        compress: bool = False,
    ) -> None:
        _check_sizes(sources)
        self._sources, self._target, self._backing = sources, target, backing_name
        self._compress = compress
        self._indices = sorted({index for source in sources for index in source.indices})
        self.total = sum(_bytes_of(self._resolve(index)) for index in self._indices)
        """Bytes of data to copy."""
        self.done = 0
        self.compressed = False
        """The target holds compressed clusters."""
        self._l1 = array("Q", bytes(8 * -(-sources[0].size // L1_ENTRY_COVERS)))
        self._end = 1
        """The next free cluster of the file."""
        self._packed_end = 0
        """The next free byte for a compressed cluster, if it lies within one that has some."""
        self._shared: dict[int, int] = {}
        """Cluster of the file → how many compressed ones it holds a part of."""
        self._steps = self._work()
        self._complete = self._finished = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(target, flags, 0o600)

    def __enter__(self) -> Rewrite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files; an unfinished target is removed. Idempotent."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        for source in self._sources:
            source.close()
        if not self._finished:
            self._target.unlink(missing_ok=True)

    def run(self, go_on: Callable[[int], bool]) -> bool:
        """Copy until all is copied, or until `go_on` says no; then call this again to go on.

        :param go_on: called with the bytes of each portion once it is copied.
        :return: whether all is copied.
        :raise CorruptError, DeniedError: as the constructor.
        :raise OSError: as reading and writing do.
        """
        for portion in self._steps:
            self.done += portion
            if not go_on(portion):
                return False
        return self._complete

    def finish(self) -> None:
        """Make it whole, durable and read-only; its folder's entry is the caller's.

        :raise OSError: as writing does.
        """
        assert self._complete
        l1_offset = self._put(swapped(self._l1[:]).tobytes())
        blocks, tables = _refcount_clusters(self._end)
        total = self._end + blocks + tables
        counts = array("H", (1 for _ in range(total)))
        for cluster, users in self._shared.items():
            counts[cluster] = users
        first = self._put(swapped(counts).tobytes(), clusters=blocks)
        offsets = array("Q", (first + number * CLUSTER for number in range(blocks)))
        refcount_offset = self._put(swapped(offsets).tobytes(), clusters=tables)
        os.ftruncate(self._descriptor, total * CLUSTER)
        head = first_cluster(
            self._sources[0].size,
            self._backing,
            l1=(l1_offset, len(self._l1)),
            refcounts=(refcount_offset, tables),
            compression=header.ZSTD if self.compressed else header.DEFLATE,
        )
        write_at(self._descriptor, head, 0)
        os.fchmod(self._descriptor, 0o400)
        os.fsync(self._descriptor)
        self._finished = True

    def _work(self) -> Iterator[int]:
        for index in self._indices:
            found = self._resolve(index)
            table = array("Q", bytes(CLUSTER))
            plain: list[tuple[int, int, int]] = []
            for number, (entry, source) in sorted(found.items()):
                if entry & COMPRESSED:
                    packed = Packed.of(entry)
                    blob = os.pread(self._sources[source].descriptor, packed.size, packed.offset)
                    table[number] = self._put_packed(blob).entry()
                    yield CLUSTER
                elif entry & ZERO:
                    table[number] = ZERO
                elif self._compress:
                    kept = self._pack(entry & OFFSET, source)
                    if kept is None:
                        plain.append((number, entry & OFFSET, source))
                    else:
                        table[number] = kept
                        yield CLUSTER
                else:
                    plain.append((number, entry & OFFSET, source))
            for first, count, offset, source in _runs(plain):
                yield from self._copy(offset, count, source)
                for step in range(count):
                    number = plain[first + step][0]
                    table[number] = (self._end + step) * CLUSTER | COPIED
                    self._clear_tail(index, number, source, self._end + step)
                self._end += count
            if any(table):
                self._l1[index] = self._put(swapped(table).tobytes()) | COPIED
        self._complete = True

    def _resolve(self, index: int) -> Found:
        """Of each cluster the topmost that has it.

        :raise CorruptError, DeniedError: as ``Layer.table``.
        """
        found: Found = {}
        for source in range(len(self._sources) - 1, -1, -1):
            layer = self._sources[source]
            table = layer.table(index)
            if table is None:
                continue
            # Above its own end a layer has nothing to say, whatever a table of it holds.
            end = -(-layer.size // CLUSTER) - index * ENTRIES
            found.update(
                (number, (entry, source))
                for number, entry in enumerate(table)
                if entry and number < end
            )
        if len(self._sources) > 1:
            self._refuse_packed_tail(index, found)
        return found

    def _refuse_packed_tail(self, index: int, found: Found) -> None:
        """:raise DeniedError: LAYER_UNFIT, for the one cluster that would have to be unpacked."""
        for number, (entry, source) in found.items():
            layer = self._sources[source]
            end = (index * ENTRIES + number + 1) * CLUSTER
            if entry & COMPRESSED and end > layer.size and layer.size < self._sources[0].size:
                raise DeniedError(
                    f"layer {layer.name} ends within a compressed cluster; it is left as it is",
                    reason="LAYER_UNFIT",
                    layer=layer.name,
                )

    def _copy(self, offset: int, count: int, source: int) -> Iterator[int]:
        """Copy clusters that lie in a row, to the end of the file. What is missing is zeros."""
        reader, to = self._sources[source].descriptor, self._end * CLUSTER
        left = count * CLUSTER
        while left:
            wanted = min(left, PORTION)
            copied = 0
            while copied < wanted:
                done = _copy_range(
                    reader, self._descriptor, wanted - copied, offset + copied, to + copied
                )
                if not done:
                    break
                copied += done
            offset, to, left = offset + wanted, to + wanted, left - wanted
            yield wanted

    def _clear_tail(self, index: int, number: int, source: int, cluster: int) -> None:
        """What a lower layer's last cluster holds behind the end of its disk is nobody's."""
        layer = self._sources[source]
        begin = (index * ENTRIES + number) * CLUSTER
        inside = layer.size - begin
        if source and inside < CLUSTER and layer.size < self._sources[0].size:
            write_at(self._descriptor, bytes(CLUSTER - inside), cluster * CLUSTER + inside)

    def _pack(self, offset: int, source: int) -> int | None:
        """The entry of a cluster that is compressed or found to be zeros; None: it is not worth it.

        :raise CorruptError: LAYER_CORRUPT, when there is nothing at all.
        """
        data = os.pread(self._sources[source].descriptor, CLUSTER, offset).ljust(CLUSTER, b"\0")
        if not data[0] and not any(data):
            return ZERO
        blob = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        if len(blob) > CLUSTER - _LEAST_GAIN:
            return None
        return self._put_packed(blob).entry()

    def _put_packed(self, blob: bytes) -> Packed:
        """Write a compressed cluster behind the one before it."""
        last = self._packed_end // CLUSTER
        if self._packed_end % CLUSTER == 0 or (
            self._packed_end + len(blob) > (last + 1) * CLUSTER and self._end != last + 1
        ):
            self._packed_end = self._end * CLUSTER
        packed = Packed(self._packed_end, len(blob))
        write_at(self._descriptor, blob, packed.offset)
        self._packed_end += len(blob)
        for cluster in range(packed.offset // CLUSTER, (self._packed_end - 1) // CLUSTER + 1):
            self._shared[cluster] = self._shared.get(cluster, 0) + 1
            self._end = max(self._end, cluster + 1)
        self.compressed = True
        return packed

    def _put(self, data: bytes, *, clusters: int | None = None) -> int:
        """Write a table at the end of the file; returns where."""
        offset = self._end * CLUSTER
        write_at(self._descriptor, data, offset)
        self._end += -(-len(data) // CLUSTER) if clusters is None else clusters
        return offset


def open_all(layers: Sequence[tuple[Path, int]]) -> list[Layer]:
    """Open layers, the topmost first: (file, virtual size in bytes); all, or none.

    :raise CorruptError: LAYER_MISSING, LAYER_CORRUPT.
    :raise DeniedError: LAYER_UNFIT.
    """
    opened: list[Layer] = []
    try:
        for path, size in layers:
            opened.append(Layer(path, size))
    except BaseException:
        for layer in opened:
            layer.close()
        raise
    return opened


def _check_sizes(sources: Sequence[Layer]) -> None:
    """:raise DeniedError: LAYER_UNFIT, when one is smaller than what it stands on."""
    for above, below in itertools.pairwise(sources):
        if above.size < below.size:
            raise DeniedError(
                f"layer {above.name} is smaller than the layer {below.name} below it; both are"
                " left as they are",
                reason="LAYER_UNFIT",
                layer=above.name,
            )


def _bytes_of(found: Found) -> int:
    return CLUSTER * sum(1 for entry, _ in found.values() if entry & COMPRESSED or not entry & ZERO)


def _runs(plain: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Clusters that lie in a row in one source: (first, count, offset there, source)."""
    first = 0
    for position in range(1, len(plain) + 1):
        if position < len(plain):
            _, offset, source = plain[position]
            _, before, same = plain[position - 1]
            if source == same and offset == before + CLUSTER:
                continue
        _, offset, source = plain[first]
        yield first, position - first, offset, source
        first = position


def _copy_range(reader: int, writer: int, size: int, offset: int, to: int) -> int:
    try:
        return os.copy_file_range(reader, writer, size, offset, to)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    data = os.pread(reader, size, offset)
    write_at(writer, data, to)
    return len(data)


def _refcount_clusters(clusters: int) -> tuple[int, int]:
    """Refcount blocks, and clusters of their table, for a file that gets those as well."""
    blocks = tables = 0
    while True:
        needed = -(-(clusters + blocks + tables) // _PER_BLOCK)
        wanted = needed, -(-needed * 8 // CLUSTER)
        if wanted == (blocks, tables):
            return wanted
        blocks, tables = wanted
