"""One file of RAM: the pages that one snapshot adds to its parent.

```
0               header, one page: magic, version, ids, sizes, its own SHA-256 in the last 32 bytes
4096            data: pages one after another, in the order of the runs; pages of zeros have none
tables          runs: first page, count (top bit: pages of zeros)     16 bytes each
                sums: SHA-256 of each MiB of data                     32 bytes each
```

All numbers are little-endian. A page may be in several runs: the last one counts, so that a page
that was copied while the guest ran can be written again. A page in no run is the parent's, and
without a parent it is zeros. The header is written last: a file that was not finished has none.

Reading a header checks it and the tables, and that all bounds hold, so that no file can lead a
reader astray; only `verify` reads the data.
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
from pathlib import Path

from stratabox.storage.model.errors import CorruptError

PAGE = 4096
CHUNK = 1 << 20
"""Bytes of data under one sum."""
ZEROS = 1 << 63
"""Set in the count of a run of zeros."""

_MAGIC = b"SBXRAM\r\n"
_VERSION = 1
_FIELDS = struct.Struct("<8sIIQ16s16sQQQ32s")
_SUM_AT = PAGE - 32
_NONE = bytes(16)
_MAX_PAGES = 1 << 34  # 64 TiB of RAM
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
    sums: bytes

    @property
    def own_bytes(self) -> int:
        """Bytes of data in it."""
        return self.data_pages * PAGE

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


def header(
    *, id: str, parent: str | None, ram_bytes: int, runs: int, data_pages: int, tables: bytes
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
    page = fields.ljust(_SUM_AT, b"\0")
    return page + hashlib.sha256(page).digest()


def read_header(path: Path) -> RamFile:
    """Read and check a file's header and tables.

    :raise CorruptError: RAM_CORRUPT, naming what is not as it must be.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise corrupt(path, "is missing") from None
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
        size = os.fstat(descriptor).st_size
        page = file.read(PAGE)
        if len(page) < PAGE or page[: len(_MAGIC)] != _MAGIC:
            raise corrupt(path, "has no header: it was not finished, or is something else")
        if hashlib.sha256(page[:_SUM_AT]).digest() != page[_SUM_AT:]:
            raise corrupt(path, "has a header whose SHA-256 differs")
        (
            _, version, page_size, ram_bytes, own, parent, runs, data_pages, tables_bytes, digest,
        ) = _FIELDS.unpack_from(page)  # fmt: skip
        if version != _VERSION or page_size != PAGE:
            raise corrupt(path, f"is of version {version} with pages of {page_size} bytes")
        ram_pages, rest = divmod(ram_bytes, PAGE)
        if rest or not 0 < ram_pages <= _MAX_PAGES:
            raise corrupt(path, f"is of a RAM of {ram_bytes} bytes")
        chunks = -(-data_pages * PAGE // CHUNK)
        if (
            runs > ram_pages * _RUNS_PER_PAGE
            or data_pages > ram_pages * _RUNS_PER_PAGE
            or tables_bytes != runs * 16 + chunks * 32
        ):
            raise corrupt(path, "has tables of an impossible size")
        expected = PAGE + data_pages * PAGE + tables_bytes
        if size != expected:
            raise corrupt(path, f"has {size} bytes instead of {expected}")
        file.seek(PAGE + data_pages * PAGE)
        tables = _read_all(file.fileno(), tables_bytes)
    if hashlib.sha256(tables).digest() != digest:
        raise corrupt(path, "has tables whose SHA-256 differs")
    table = array("Q", tables[: runs * 16])
    if sys.byteorder == "big":
        table.byteswap()
    _check_runs(path, table, ram_pages, data_pages)
    return RamFile(
        path=path,
        id=str(uuid.UUID(bytes=own)),
        parent=None if parent == _NONE else str(uuid.UUID(bytes=parent)),
        ram_bytes=ram_bytes,
        data_pages=data_pages,
        table=table,
        sums=tables[runs * 16 :],
    )


def verify(file: RamFile) -> None:
    """Read all data and compare it with the sums.

    :raise CorruptError: RAM_CORRUPT, with the offset of the first MiB that differs.
    """
    with file.path.open("rb", buffering=0) as stream:
        stream.seek(PAGE)
        left = file.own_bytes
        for number in range(len(file.sums) // 32):
            data = _read_all(stream.fileno(), min(CHUNK, left))
            left -= len(data)
            if hashlib.sha256(data).digest() != file.sums[number * 32 : number * 32 + 32]:
                offset = PAGE + number * CHUNK
                raise corrupt(file.path, f"has data at byte {offset} whose SHA-256 differs")


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


def _read_all(descriptor: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.read(descriptor, size)
        if not part:
            break  # it became shorter meanwhile: the sum will differ
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
