"""Read what one qcow2 of ours holds itself: its own clusters, without its backing file.

For sealed layers, which nothing changes: so any number of threads may read one descriptor. A file
from outside is never read by this; see `header`.
"""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import zstandard

from stratabox.storage.model.errors import CorruptError, InvalidArgumentError
from stratabox.storage.qcow2 import header
from stratabox.storage.qcow2.empty import CLUSTER, CLUSTER_BITS, L1_ENTRY_COVERS

ABSENT, ZERO, DATA = 0, 1, 2
"""A cluster that is the backing file's, one of zeros, one with data of its own."""

_COMPRESSED = 1 << 62
_ZERO_FLAG = 1
_OFFSET = ((1 << 56) - 1) & ~((1 << 9) - 1)
_SECTORS_AT = 62 - (CLUSTER_BITS - 8)
_PER_TABLE = CLUSTER // 8
_DEFLATE_WINDOW = -12  # QEMU's: raw, of 4 KiB
_ZEROS = bytes(CLUSTER)
_ZSTD = 1


class Clusters:
    """An open layer; a context manager that closes it.

    :raise CorruptError: LAYER_MISSING, LAYER_CORRUPT, when it is not there or not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise CorruptError(
                f"the file of layer {path.stem} is missing", reason="LAYER_MISSING", layer=path.stem
            ) from None
        try:
            self._read_header()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def runs(self, count: int) -> Iterator[tuple[int, int]]:
        """Where there is something: (number, clusters with data) for each run of `count` clusters.

        :param count: a power of two, at most the entries of an L2 table.
        """
        for index, offset in enumerate(self._l1):
            if not offset & _OFFSET:
                continue
            table = self._table(offset & _OFFSET, 0, _PER_TABLE)
            for first in range(0, _PER_TABLE, count):
                entries = table[first : first + count]
                number = (index * _PER_TABLE + first) // count
                if any(entries) and number * count * CLUSTER < self.size:
                    yield number, sum(map(_has_data, entries))

    def read(self, first: int, count: int) -> tuple[bytearray, list[bytes]]:
        """The states of some clusters, and the bytes of those with data, in their order.

        Data that is nothing but zeros is ZERO, so that the answer depends on the content alone.

        :param first: a multiple of `count`, which is as for `runs`.
        :raise CorruptError: LAYER_CORRUPT, when the file does not hold what its tables say.
        """
        states = bytearray(count)
        offset = self._l1[first // _PER_TABLE] & _OFFSET
        if not offset:
            return states, []
        entries = self._table(offset, first % _PER_TABLE, count)
        data: list[bytes] = []
        at = 0
        while at < count:
            entry = entries[at]
            length = 1
            if entry & _COMPRESSED:
                self._put(states, data, at, self._unpack(entry))
            elif entry & _ZERO_FLAG:
                states[at] = ZERO
            elif host := entry & _OFFSET:
                while at + length < count and entries[at + length] & ~(1 << 63) == (
                    host + length * CLUSTER
                ):
                    length += 1
                self._put(states, data, at, self._bytes(host, length * CLUSTER))
            at += length
        return states, data

    def _put(self, states: bytearray, data: list[bytes], at: int, content: bytes) -> None:
        """Add clusters in a row, telling zeros from data."""
        begin = 0
        for number in range(len(content) // CLUSTER):
            here = number * CLUSTER
            # The first byte tells most apart; comparing the rest copies the cluster.
            if not content[here] and content[here : here + CLUSTER] == _ZEROS:
                states[at + number] = ZERO
                if begin < here:
                    data.append(content[begin:here])
                begin = here + CLUSTER
            else:
                states[at + number] = DATA
        if begin < len(content):
            data.append(content[begin:] if begin else content)

    def _read_header(self) -> None:
        try:
            found = header.parse(os.pread(self._descriptor, header.HEAD_BYTES, 0))
        except InvalidArgumentError as error:
            raise self._corrupt(error.message) from error
        if found.cluster_bits != CLUSTER_BITS or (
            found.incompatible & ~header.INCOMPATIBLE_COMPRESSION
        ):
            raise self._corrupt("it is not as our layers are")
        self.size = found.virtual_size
        """Of the disk, bytes."""
        self._zstd = found.compression == _ZSTD
        entries = -(-self.size // L1_ENTRY_COVERS)  # it may have more, of a disk that was larger
        self._l1 = self._table(found.l1_offset, 0, entries)

    def _table(self, offset: int, first: int, count: int) -> array[int]:
        table = array("Q", self._bytes(offset + first * 8, count * 8))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def _bytes(self, offset: int, size: int) -> bytes:
        """Bytes of the file; what is missing of its last cluster is zeros, as QEMU has it."""
        found = os.pread(self._descriptor, size, offset)
        while len(found) < size:
            more = os.pread(self._descriptor, size - len(found), offset + len(found))
            if not more:
                break
            found += more
        if size - len(found) >= min(CLUSTER, size):
            raise self._corrupt(f"it ends before byte {offset}")
        return found.ljust(size, b"\0")

    def _unpack(self, entry: int) -> bytes:
        offset = entry & ((1 << _SECTORS_AT) - 1)
        sectors = (entry >> _SECTORS_AT) & ((1 << (62 - _SECTORS_AT)) - 1)
        packed = os.pread(self._descriptor, (sectors + 1) * 512 - offset % 512, offset)
        try:
            if self._zstd:
                reader = zstandard.ZstdDecompressor().stream_reader(packed)
                content = reader.read(CLUSTER)
            else:
                content = zlib.decompressobj(_DEFLATE_WINDOW).decompress(packed, CLUSTER)
        except (zlib.error, zstandard.ZstdError) as error:
            raise self._corrupt(f"its data at byte {offset} cannot be unpacked") from error
        if len(content) != CLUSTER:
            raise self._corrupt(f"its data at byte {offset} is cut off")
        return content

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"layer {self._name}: {what}", reason="LAYER_CORRUPT", file=self._name)


def _has_data(entry: int) -> bool:
    return bool(entry & _COMPRESSED) or bool(entry & _OFFSET and not entry & _ZERO_FLAG)
