"""Chains of RAM files: which page comes from which file, and how one file leaves a chain.

A chain is named newest first, as disk chains are.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.files.memory.format import PAGE, RamFile, corrupt, read_header
from stratabox.storage.files.memory.writer import RamWriter

_PART = 1 << 20
_POPULATED = 1 << 18
_MADV_POPULATE_READ = 22  # Linux 5.14 (madvise(2)); Python 3.11 has no name for it


@dataclass(frozen=True, order=True, slots=True)
class Piece:
    """Neighbouring pages of RAM that lie together in one file; `file` is -1 for zeros."""

    first: int
    count: int
    file: int
    """Index in the chain."""
    data: int
    """Page of data within the file."""


def read_chain(id: str, path_of: Callable[[str], Path], ram_bytes: int) -> list[RamFile]:
    """Read the headers of a whole chain, from `id` down to the one without a parent.

    :raise CorruptError: RAM_CORRUPT, when one is missing, damaged or not what the one above it
        stands on.
    """
    chain: list[RamFile] = []
    wanted: str | None = id
    seen: set[str] = set()
    while wanted is not None:
        file = read_header(path_of(wanted))
        if file.id != wanted:
            raise corrupt(file.path, f"says that it is {file.id}")
        if file.ram_bytes != ram_bytes:
            raise corrupt(file.path, f"is of a RAM of {file.ram_bytes} bytes, not {ram_bytes}")
        if wanted in seen:
            raise corrupt(file.path, "is its own ancestor")
        seen.add(wanted)
        chain.append(file)
        wanted = file.parent
    return chain


def resolve(chain: Sequence[RamFile]) -> list[Piece]:
    """Where each page that any of the files holds comes from, in the order of pages.

    The newest file wins, and within a file what was written last.
    """
    claimed = bytearray(chain[0].ram_bytes // PAGE)
    pieces: list[Piece] = []
    for index, file in enumerate(chain):
        for run in reversed(list(file.runs())):
            for first, count in _free(claimed, run.first, run.first + run.count):
                claimed[first : first + count] = b"\1" * count
                if run.data is None:
                    pieces.append(Piece(first, count, -1, 0))
                else:
                    pieces.append(Piece(first, count, index, run.data + first - run.first))
    pieces.sort()
    return pieces


def merge(newer: RamFile, older: RamFile, target: Path) -> RamFile:
    """Write a new file that does for `newer` what both do together.

    It has `newer`'s id, so what stands on that stands as well, and `older`'s parent. Renaming it
    over `newer` takes `older` out of this chain, at one instant.

    :raise CorruptError: RAM_CORRUPT, when the one is not the other's parent.
    :raise NoSpaceError: NO_SPACE; nothing is left of the target then.
    """
    if newer.parent != older.id or newer.ram_bytes != older.ram_bytes:
        raise corrupt(newer.path, f"does not stand on {older.id}")
    chain = (newer, older)
    with (
        RamWriter(target, id=newer.id, parent=older.parent, ram_bytes=newer.ram_bytes) as writer,
        OpenChain(chain) as opened,
    ):
        for piece in resolve(chain):
            if piece.file < 0:
                writer.add_zeros(piece.first, piece.count)
                continue
            for first, data in opened.read(piece):
                writer.add(first, data)
        return writer.finish()


class OpenChain:
    """The files of a chain, mapped for reading: a context manager.

    Copying from a mapping takes half the time of reading into a buffer and writing that. The files
    are sealed and their sizes were checked, so no page is missing under a mapping.
    """

    def __init__(self, chain: Sequence[RamFile]) -> None:
        self._chain = chain
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []

    def __enter__(self) -> OpenChain:
        try:
            for file in self._chain:
                with file.path.open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
                self._maps.append(mapped)
                self._views.append(memoryview(mapped))
                if len(mapped) < PAGE + file.own_bytes:
                    raise corrupt(file.path, "became shorter while it was read")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for view in self._views:
            view.release()
        for mapped in self._maps:
            mapped.close()

    def read(self, piece: Piece) -> Iterator[tuple[int, memoryview]]:
        """(first page, data) of a piece that is not zeros, in bounded parts."""
        begin, size = PAGE + piece.data * PAGE, piece.count * PAGE
        if size >= _POPULATED:
            self._maps[piece.file].madvise(_MADV_POPULATE_READ, begin, size)
        for done in range(0, size, _PART):
            with self._views[piece.file][begin + done : begin + min(done + _PART, size)] as view:
                yield piece.first + done // PAGE, view


def _free(claimed: bytearray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the pages in [begin, end) that nobody has claimed yet."""
    while begin < end:
        first = claimed.find(0, begin, end)
        if first < 0:
            return
        stop = claimed.find(1, first, end)
        stop = end if stop < 0 else stop
        yield first, stop - first
        begin = stop
