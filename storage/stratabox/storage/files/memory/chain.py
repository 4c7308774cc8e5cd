"""Chains of RAM files: which page comes from which file, and how files leave a chain.

A chain is named newest first, as disk chains are.

A merge changes which files a chain has while others may be about to read it. So opening a chain
and renaming a merged file exclude one another, by flock(2) on the files' folder: whoever has opened
a chain has all of its files as they fit each other, and reads them to the end by their descriptors,
whatever is renamed or removed meanwhile.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.files import durable
from stratabox.storage.files.memory.format import (
    CHUNK,
    PAGE,
    RamFile,
    corrupt,
    open_file,
    read_open,
)
from stratabox.storage.files.memory.writer import RamWriter

_KEPT_CHUNKS = (16 << 20) // CHUNK


@dataclass(frozen=True, order=True, slots=True)
class Piece:
    """Neighbouring pages of RAM that lie together in one file; `file` is -1 for zeros."""

    first: int
    count: int
    file: int
    """Index in the chain."""
    data: int
    """Page of data within the file."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one chunk of one file holds of a piece."""

    file: int
    chunk: int
    offset: int
    """Bytes within the chunk."""
    first: int
    """Page of RAM."""
    count: int


class OpenChain:
    """A whole chain, from `id` down to the one without a parent, open for reading: a context.

    :param path_of: the file of an id; all lie in one folder.
    :raise CorruptError: RAM_CORRUPT, when a file is missing, its header damaged, or it is not what
        the one above it stands on.
    """

    def __init__(self, id: str, path_of: Callable[[str], Path], ram_bytes: int) -> None:
        self._id, self._path_of, self._ram_bytes = id, path_of, ram_bytes
        self._descriptors: list[int] = []
        self.files: list[RamFile] = []
        """Newest first."""

    def __enter__(self) -> OpenChain:
        with ExitStack() as stack:
            stack.callback(self.__exit__)
            with _locked(self._path_of(self._id).parent, fcntl.LOCK_SH):
                self._open_all()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def read(self, file: int, chunk: int, *, verify: bool) -> bytes:
        """The pages of one chunk; from any thread.

        :param verify: compare what is stored with its sum.
        :raise CorruptError: RAM_CORRUPT, when they are not what was written.
        """
        return self.files[file].read_chunk(self._descriptors[file], chunk, verify=verify)

    def read_part(self, part: Part) -> bytes | None:
        """As `RamFile.read_pages`; from any thread."""
        return self.files[part.file].read_pages(
            self._descriptors[part.file], part.chunk, part.offset, part.count
        )

    def _open_all(self) -> None:
        wanted: str | None = self._id
        seen: set[str] = set()
        while wanted is not None:
            path = self._path_of(wanted)
            self._descriptors.append(open_file(path))
            file = read_open(path, self._descriptors[-1])
            if file.id != wanted:
                raise corrupt(path, f"says that it is {file.id}")
            if file.ram_bytes != self._ram_bytes:
                raise corrupt(path, f"is of a RAM of {file.ram_bytes} bytes, not {self._ram_bytes}")
            if wanted in seen:
                raise corrupt(path, "is its own ancestor")
            seen.add(wanted)
            self.files.append(file)
            wanted = file.parent


def read_chain(id: str, path_of: Callable[[str], Path], ram_bytes: int) -> list[RamFile]:
    """Read the headers of a whole chain. :raise CorruptError: as `OpenChain`."""
    with OpenChain(id, path_of, ram_bytes) as chain:
        return chain.files


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


def parts_of(piece: Piece, file: RamFile) -> Iterator[Part]:
    """A piece that is not zeros, chunk by chunk."""
    first, data, left = piece.first, piece.data, piece.count
    while left:
        chunk, offset = divmod(data, file.chunk_pages)
        count = min(left, file.chunk_pages - offset)
        yield Part(piece.file, chunk, offset * PAGE, first, count)
        first, data, left = first + count, data + count, left - count


def merge(
    chain: OpenChain, target: Path, *, until: str | None, go_on: Callable[[], bool] = lambda: True
) -> RamFile | None:
    """Write a new file that does for the chain's newest what it does with those below it.

    It has the newest's id, so what stands on that stands as well, and `until` for its parent. With
    `put_in_place` it takes all files in between out of this chain, at one instant.

    :param until: the first file that stays below; None: none does.
    :param go_on: asked again and again; once it says no, nothing is left of the target.
    :return: the file; None when it was not to go on.
    :raise CorruptError: RAM_CORRUPT, when the chain has no such file, or damaged ones.
    :raise NoSpaceError: NO_SPACE; nothing is left of the target then.
    """
    newest = chain.files[0]
    ids = [file.id for file in chain.files]
    if until is not None and until not in ids[1:]:
        raise corrupt(newest.path, f"does not stand on {until}")
    merged = chain.files[: ids.index(until) if until else None]
    kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
    with RamWriter(target, id=newest.id, parent=until, ram_bytes=newest.ram_bytes) as writer:
        for piece in resolve(merged):
            if piece.file < 0:
                writer.add_zeros(piece.first, piece.count)
                continue
            for part in parts_of(piece, merged[piece.file]):
                if not go_on():
                    return None
                key = (part.file, part.chunk)
                if key not in kept:
                    kept[key] = chain.read(*key, verify=True)
                    if len(kept) > _KEPT_CHUNKS:
                        kept.popitem(last=False)
                kept.move_to_end(key)
                with memoryview(kept[key]) as pages:
                    writer.add(part.first, pages[part.offset : part.offset + part.count * PAGE])
        return writer.finish()


def put_in_place(merged: Path, target: Path) -> None:
    """Rename a merged file over the one that it stands for, durably.

    Whoever opens a chain does so wholly before this or wholly after it.
    """
    with _locked(target.parent, fcntl.LOCK_EX):
        merged.rename(target)
    durable.sync_folder(target.parent)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


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
