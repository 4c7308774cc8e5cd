"""Where the clusters of one of our own layers lie in its file.

For layers that QEMU has written into files of `empty`, and for those of `rewrite`: version 3,
clusters of 64 KiB, one refcount of 16 bits each, no feature but zstd. Whatever is otherwise is
refused, so that nobody rewrites what he does not understand. Layers from outside come in by
``stratabox.daemon.images.importer`` and are at the bottom of chains, where nothing reads them by
this module.
"""

from __future__ import annotations

import os
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.model.errors import CorruptError, DeniedError, InvalidArgumentError
from stratabox.storage.qcow2 import header
from stratabox.storage.qcow2.empty import CLUSTER, CLUSTER_BITS

ENTRIES = CLUSTER // 8
"""Entries of an L2 table."""
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FF_FFFF_FFFF_FE00

_RESERVED = 0x3F00_0000_0000_01FE
_COMPRESSED_OFFSET_BITS = 62 - (CLUSTER_BITS - 8)
_SECTOR = 512
_MOST_COMPRESSED = CLUSTER + _SECTOR


@dataclass(frozen=True)
class Packed:
    """Where a compressed cluster lies: `size` bytes from byte `offset` on, up to a sector's end."""

    offset: int
    size: int

    @classmethod
    def of(cls, entry: int) -> Packed:
        """What an entry of an L2 table says."""
        offset = entry & ((1 << _COMPRESSED_OFFSET_BITS) - 1)
        sectors = (entry & ~(COMPRESSED | COPIED)) >> _COMPRESSED_OFFSET_BITS
        return cls(offset, (sectors + 1) * _SECTOR - offset % _SECTOR)

    def entry(self) -> int:
        """An entry of an L2 table that says so."""
        sectors = ((self.offset + self.size - 1) // _SECTOR) - self.offset // _SECTOR
        return COMPRESSED | sectors << _COMPRESSED_OFFSET_BITS | self.offset


class Layer:
    """An open layer; a context manager that closes it. Sealed: it stays what it is.

    :param size: virtual size, bytes, as the catalog has it.
    :raise CorruptError: LAYER_MISSING, LAYER_CORRUPT.
    :raise DeniedError: LAYER_UNFIT, when it is not as our layers are.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.name, self.size = path.stem, size
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise CorruptError(
                f"the file of layer {self.name} is missing", reason="LAYER_MISSING", layer=self.name
            ) from None
        try:
            self._file_size = os.fstat(self.descriptor).st_size
            self._l1 = self._read_l1()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)

    @property
    def indices(self) -> list[int]:
        """Numbers of the L2 tables that there are."""
        return [index for index, offset in enumerate(self._l1) if offset]

    def table(self, index: int) -> array[int] | None:
        """One L2 table, checked; None where there is none.

        :raise CorruptError: LAYER_CORRUPT, when it lies outside the file.
        :raise DeniedError: LAYER_UNFIT, for entries that ours do not have.
        """
        offset = self._l1[index] if index < len(self._l1) else 0
        if not offset:
            return None
        table = self._numbers(offset, ENTRIES, "L2 table")
        for entry in table:
            if entry and not self._is_sound(entry):
                raise self._unfit(f"an entry of its L2 table {index} is {entry:#x}")
        return table

    def _is_sound(self, entry: int) -> bool:
        if entry & COMPRESSED:
            packed = Packed.of(entry)
            return self.zstd and packed.size <= _MOST_COMPRESSED and self._is_inside(packed.offset)
        if entry & _RESERVED or (entry & OFFSET) % CLUSTER:
            return False
        return bool(entry & ZERO) or self._is_inside(entry & OFFSET)

    def _is_inside(self, offset: int) -> bool:
        # The last cluster may not be there to its end: what is missing of it reads as zeros.
        return 0 < offset < self._file_size

    def _read_l1(self) -> array[int]:
        try:
            found = header.parse(os.pread(self.descriptor, header.HEAD_BYTES, 0))
        except InvalidArgumentError as error:
            raise CorruptError(
                f"layer {self.name}: {error.message}", reason="LAYER_CORRUPT", layer=self.name
            ) from error
        self.zstd = found.compression == header.ZSTD
        for wrong, what in (
            (found.version != 3, f"version {found.version}"),
            (found.cluster_bits != CLUSTER_BITS, f"clusters of {found.cluster_size} bytes"),
            (found.incompatible & ~header.INCOMPATIBLE_COMPRESSION, "features of others"),
            (found.data_file, "its data in another file"),
            (found.encryption, "encryption"),
            (found.snapshots, "internal snapshots"),
            (found.refcount_order != 4, "other refcounts"),
            (found.virtual_size != self.size, f"{found.virtual_size} bytes, not {self.size}"),
            (found.l1_entries * 8 > header.MAX_L1_BYTES, "an absurd L1 table"),
        ):
            if wrong:
                raise self._unfit(f"it has {what}")
        table = self._numbers(found.l1_offset, found.l1_entries, "L1 table")
        return array("Q", (entry & OFFSET for entry in table))

    def _numbers(self, offset: int, count: int, what: str) -> array[int]:
        data = os.pread(self.descriptor, count * 8, offset)
        if len(data) != count * 8:
            raise CorruptError(
                f"layer {self.name} ends within its {what}",
                reason="LAYER_CORRUPT",
                layer=self.name,
            )
        return swapped(array("Q", data))

    def _unfit(self, what: str) -> DeniedError:
        return DeniedError(
            f"layer {self.name} is not as Stratabox makes them ({what}); it is left as it is",
            reason="LAYER_UNFIT",
            layer=self.name,
        )


def swapped(numbers: array[int]) -> array[int]:
    """From this host's order of bytes to the file's, or back."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers
