"""One file of RAM: the pages that one snapshot adds to its parent.

```
0               header, one page: magic, version, ids, sizes, its own SHA-256 in the last 32 bytes
4096            data: the pages one after another, in the order of the runs, cut into chunks; each
                chunk is stored as it is, or as one zstd frame where that is smaller
tables          runs:   first page, count (top bit: pages of zeros)    16 bytes each
                chunks: bytes stored                                    4 bytes each
                sums:   SHA-256 of what is stored of each chunk        32 bytes each
```

All numbers are little-endian. A page may be in several runs: the last one counts, so that a page
that was copied while the guest ran can be written again. Pages of zeros have no data. A page in no
run is the parent's, and without a parent it is zeros. The header is written last: a file that was
not finished has none.

The sums are of what is stored: so all that can happen to a file is found without unpacking it. Each
frame has a checksum of its pages besides (zstd's XXH64), which is compared whenever it is unpacked;
what is stored as it is has none, and is compared with its sum only by who asks for that.

Version 1, of earlier builds, had chunks of 1 MiB and stored all of them as they are; such files are
read, alone and in chains with newer ones.

Reading a header checks it and the tables, and that all bounds hold, so that no file can lead a
reader astray.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import uuid
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from stratabox.storage.files.memory.packing import unpack
from stratabox.storage.model.errors import CorruptError

PAGE = 4096
CHUNK = 256 << 10
"""Bytes of pages in one chunk; the last one of a file may have fewer."""
ZEROS = 1 << 63
"""Set in the count of a run of zeros."""

_MAGIC = b"SBXRAM\r\n"
_VERSION = 2
_FIELDS = struct.Struct("<8sIIQ16s16sQQQ32s")
_ADDED = struct.Struct("<QI")  # by version 2, right after these: bytes stored, bytes of a chunk
_CHUNK_1 = 1 << 20
_SUM_AT = PAGE - 32
_NONE = bytes(16)
_MAX_PAGES = 1 << 34  # 64 TiB of RAM
_MAX_CHUNK = 4 << 20
_RUNS_PER_PAGE = 4  # more runs than this for each page of RAM: not a file of ours


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring pages. `data` is the number of its first page of data; None for zeros."""

    first: int
    count: int
    data: int | None


@dataclass(frozen=True, kw_only=True)
class RamFile:
    """A file whose header and tables were checked."""

    path: Path
    id: str
    parent: str | None
    ram_bytes: int
    """Size of the guest's whole RAM."""
    data_pages: int
    table: array[int]
    """First page and count of each run, as in the file."""
    chunk_bytes: int
    stored: array[int]
    """Bytes stored of each chunk."""
    sums: bytes

    @property
    def own_bytes(self) -> int:
        """Bytes that its pages take in the file."""
        return self._ends[-1] if self._ends else 0

    def runs(self) -> Iterator[Run]:
        """Its runs, in the order in which they were written."""
        data = 0
        numbers = iter(self.table)
        for first, count in zip(numbers, numbers, strict=True):
            if count & ZEROS:
                yield Run(first=first, count=count ^ ZEROS, data=None)
            else:
                yield Run(first=first, count=count, data=data)
                data += count

    def read_chunk(self, descriptor: int, number: int, *, verify: bool) -> bytes:
        """The pages of one chunk, from the open file.

        :param verify: compare what is stored with its sum.
        :raise CorruptError: RAM_CORRUPT, with the offset of what differs or is missing.
        :raise OSError: when the disk does not give them.
        """
        size = self.stored[number]
        offset = PAGE + self._ends[number] - size
        data = _read_all(descriptor, size, offset)
        if len(data) < size:
            raise corrupt(self.path, f"ends before byte {offset + size}")
        if verify and hashlib.sha256(data).digest() != self.sums[number * 32 : number * 32 + 32]:
            raise corrupt(self.path, f"has data at byte {offset} whose SHA-256 differs")
        if size == self.pages_in(number) * PAGE:
            return data
        unpacked = unpack(data, self.pages_in(number) * PAGE)
        if unpacked is None:
            raise corrupt(self.path, f"has data at byte {offset} that cannot be unpacked")
        return unpacked

    def read_pages(self, descriptor: int, chunk: int, offset: int, count: int) -> bytes | None:
        """Some pages of a chunk that is stored as it is, unverified; None: it is packed.

        :param offset: bytes within the chunk.
        :raise CorruptError: RAM_CORRUPT, when the file became shorter.
        :raise OSError: when the disk does not give them.
        """
        size = self.stored[chunk]
        if size != self.pages_in(chunk) * PAGE:
            return None
        begin = PAGE + self._ends[chunk] - size + offset
        data = _read_all(descriptor, count * PAGE, begin)
        if len(data) < count * PAGE:
            raise corrupt(self.path, f"ends before byte {begin + count * PAGE}")
        return data

    @cached_property
    def _ends(self) -> list[int]:
        """Where each chunk ends, from the first one's beginning on."""
        return list(accumulate(self.stored))

    @property
    def chunk_pages(self) -> int:
        """Pages in each chunk but the last."""
        return self.chunk_bytes // PAGE

    def pages_in(self, number: int) -> int:
        """Pages in one chunk."""
        return min(self.chunk_pages, self.data_pages - number * self.chunk_pages)


def header(
    *,
    id: str,
    parent: str | None,
    ram_bytes: int,
    runs: int,
    data_pages: int,
    stored_bytes: int,
    tables: bytes,
    chunk_bytes: int = CHUNK,
) -> bytes:
    """The first page of a file."""
    fields = _FIELDS.pack(
        _MAGIC,
        _VERSION,
        PAGE,
        ram_bytes,
        uuid.UUID(id).bytes,
        uuid.UUID(parent).bytes if parent else _NONE,
        runs,
        data_pages,
        len(tables),
        hashlib.sha256(tables).digest(),
    )
    page = (fields + _ADDED.pack(stored_bytes, chunk_bytes)).ljust(_SUM_AT, b"\0")
    return page + hashlib.sha256(page).digest()


def read_header(path: Path) -> RamFile:
    """Read and check a file's header and tables.

    :raise CorruptError: RAM_CORRUPT, naming what is not as it must be.
    """
    descriptor = open_file(path)
    try:
        return read_open(path, descriptor)
    finally:
        os.close(descriptor)


def open_file(path: Path) -> int:
    """A descriptor of a file, which the caller closes.

    :raise CorruptError: RAM_CORRUPT, when it is missing.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise corrupt(path, "is missing") from None


def read_open(path: Path, descriptor: int) -> RamFile:
    """As `read_header`, of a file that is open already."""
    size = os.fstat(descriptor).st_size
    page = _read_all(descriptor, PAGE, 0)
    if len(page) < PAGE or page[: len(_MAGIC)] != _MAGIC:
        raise corrupt(path, "has no header: it was not finished, or is something else")
    if hashlib.sha256(page[:_SUM_AT]).digest() != page[_SUM_AT:]:
        raise corrupt(path, "has a header whose SHA-256 differs")
    (
        _, version, page_size, ram_bytes, own, parent, runs, data_pages, tables_bytes, digest,
    ) = _FIELDS.unpack_from(page)  # fmt: skip
    if version not in (1, _VERSION) or page_size != PAGE:
        raise corrupt(
            path,
            f"is of version {version} with pages of {page_size} bytes: a newer Stratabox wrote it",
        )
    stored_bytes, chunk_bytes = data_pages * PAGE, _CHUNK_1
    if version > 1:
        stored_bytes, chunk_bytes = _ADDED.unpack_from(page, _FIELDS.size)
    if chunk_bytes % PAGE or not 0 < chunk_bytes <= _MAX_CHUNK:
        raise corrupt(path, f"has chunks of {chunk_bytes} bytes")
    ram_pages, rest = divmod(ram_bytes, PAGE)
    if rest or not 0 < ram_pages <= _MAX_PAGES:
        raise corrupt(path, f"is of a RAM of {ram_bytes} bytes")
    chunks = -(-data_pages * PAGE // chunk_bytes)
    if (
        runs > ram_pages * _RUNS_PER_PAGE
        or data_pages > ram_pages * _RUNS_PER_PAGE
        or stored_bytes > data_pages * PAGE
        or tables_bytes != runs * 16 + chunks * (32 if version == 1 else 36)
    ):
        raise corrupt(path, "has tables of an impossible size")
    expected = PAGE + stored_bytes + tables_bytes
    if size != expected:
        raise corrupt(path, f"has {size} bytes instead of {expected}")
    tables = _read_all(descriptor, tables_bytes, PAGE + stored_bytes)
    if hashlib.sha256(tables).digest() != digest:
        raise corrupt(path, "has tables whose SHA-256 differs")
    table = _numbers("Q", tables[: runs * 16])
    _check_runs(path, table, ram_pages, data_pages)
    sums_at = len(tables) - chunks * 32
    stored = _numbers("I", tables[runs * 16 : sums_at])
    if version == 1:
        stored = array("I", [chunk_bytes]) * chunks
        if chunks:
            stored[-1] -= chunks * chunk_bytes - data_pages * PAGE
    file = RamFile(
        path=path,
        id=str(uuid.UUID(bytes=own)),
        parent=None if parent == _NONE else str(uuid.UUID(bytes=parent)),
        ram_bytes=ram_bytes,
        data_pages=data_pages,
        table=table,
        chunk_bytes=chunk_bytes,
        stored=stored,
        sums=tables[sums_at:],
    )
    if file.own_bytes != stored_bytes or any(
        not 0 < size <= file.pages_in(number) * PAGE for number, size in enumerate(stored)
    ):
        raise corrupt(path, "has chunks of an impossible size")
    return file


def verify(file: RamFile) -> None:
    """Read all data and compare it with the sums.

    :raise CorruptError: RAM_CORRUPT, with the offset of the first chunk that differs.
    """
    descriptor = open_file(file.path)
    try:
        for number in range(len(file.stored)):
            file.read_chunk(descriptor, number, verify=True)
    finally:
        os.close(descriptor)


def corrupt(path: Path, what: str) -> CorruptError:
    """The error that says what is wrong with a file of RAM."""
    return CorruptError(f"saved memory {path.name} {what}", reason="RAM_CORRUPT", file=path.name)


def _check_runs(path: Path, table: array[int], ram_pages: int, data_pages: int) -> None:
    data = 0
    numbers = iter(table)
    for first, entry in zip(numbers, numbers, strict=True):
        count = entry & ~ZEROS
        if count == 0 or first >= ram_pages or count > ram_pages - first:
            raise corrupt(path, f"has a run of {count} pages at page {first} of {ram_pages}")
        if entry == count:
            data += count
    if data != data_pages:
        raise corrupt(path, f"has runs of {data} pages and {data_pages} pages of data")


def _numbers(kind: str, content: bytes) -> array[int]:
    numbers = array(kind, content)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _read_all(descriptor: int, size: int, offset: int) -> bytes:
    """Fewer bytes when the file is shorter: a sum or a length will differ then."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    while (rest := size - sum(map(len, parts))) and parts[-1]:
        parts.append(os.pread(descriptor, rest, offset + size - rest))
    return b"".join(parts)
