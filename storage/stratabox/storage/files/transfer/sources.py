"""What an export reads: each member's blocks, by number, from any thread.

Everything is opened before the first byte leaves. What is open can be read to its end, whoever
removes or replaces the files meanwhile: so an archive is of one instant, and nothing is held back
for it.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from stratabox.storage.files.memory.chain import OpenChain, parts_of, resolve
from stratabox.storage.files.memory.format import CHUNK, PAGE
from stratabox.storage.files.transfer.archive import BLOCK, Block, Unit
from stratabox.storage.files.transfer.manifest import Kind, Member
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.qcow2.clusters import ABSENT, DATA, ZERO, Clusters
from stratabox.storage.qcow2.empty import CLUSTER

_KEPT_CHUNKS = (16 << 20) // CHUNK
_WITHOUT_ZEROS = bytes.maketrans(bytes([ZERO]), bytes([ABSENT]))


class Source(Protocol):
    """One member that is open."""

    @property
    def member(self) -> Member:
        """What the manifest says of it."""

    @property
    def numbers(self) -> Sequence[int]:
        """The blocks that may have content, in their order."""

    def content(self, number: int) -> bytes | None:
        """One block's content; None: nothing is in it. From any thread.

        :raise CorruptError: LAYER_CORRUPT, RAM_CORRUPT or BLOB_MISSING, when it cannot be had.
        :raise OSError: when the disk does not give it.
        """

    def close(self) -> None:
        """Let go of the files."""


class LayerSource:
    """A sealed layer.

    :param clusters: open; closed with this.
    :param at: its place in the manifest.
    :param stands: on another layer. Zeros are nothing where there is nothing below.
    :raise CorruptError: LAYER_CORRUPT.
    """

    def __init__(self, clusters: Clusters, at: int, *, stands: bool) -> None:
        self._stands = stands
        self._clusters = clusters
        runs = list(clusters.runs(Unit.DISK.per_block))
        self.numbers = [number for number, _ in runs]
        size = clusters.size
        data = sum(count for _, count in runs) * CLUSTER
        self.member = Member(kind=Kind.LAYER, size=size, data=data, layer=at)

    def content(self, number: int) -> bytes | None:
        """As `Source` says."""
        read, data = self._clusters.read(number * Unit.DISK.per_block, Unit.DISK.per_block)
        states = read[: units_in(self.member, number)]
        if not self._stands:
            states = states.translate(_WITHOUT_ZEROS)
        return b"".join([states, *data]) if any(states) else None

    def close(self) -> None:
        """As `Source` says."""
        self._clusters.close()


class FileSource:
    """A whole file: a blob, or the devices' state.

    :raise CorruptError: BLOB_MISSING or STATE_CORRUPT, when it is not there or is empty.
    """

    def __init__(self, path: Path, kind: Kind, sha256: Sha256) -> None:
        self._name = path.name
        self._reason = "STATE_CORRUPT" if kind is Kind.STATE else "BLOB_MISSING"
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise CorruptError(f"{path.name} is missing", reason=self._reason) from None
        size = os.fstat(self._descriptor).st_size
        if not size:
            os.close(self._descriptor)
            raise CorruptError(f"{path.name} is empty", reason=self._reason)
        self.numbers = range(-(-size // BLOCK))
        self.member = Member(kind=kind, size=size, data=size, sha256=sha256)

    def content(self, number: int) -> bytes | None:
        """As `Source` says."""
        size = min(BLOCK, self.member.size - number * BLOCK)
        found = os.pread(self._descriptor, size, number * BLOCK)
        if len(found) < size:
            raise CorruptError(f"{self._name} became shorter", reason=self._reason)
        return found

    def close(self) -> None:
        """As `Source` says."""
        os.close(self._descriptor)


class RamSource:
    """The RAM that a chain of files describes, verified as it is read.

    :param chain: open; closed with this.
    """

    def __init__(self, chain: OpenChain) -> None:
        self._chain = chain
        self._pieces = [piece for piece in resolve(chain.files) if piece.file >= 0]
        self._firsts = [piece.first for piece in self._pieces]
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        per_block = Unit.RAM.per_block
        numbers: set[int] = set()
        for piece in self._pieces:
            last = (piece.first + piece.count - 1) // per_block
            numbers.update(range(piece.first // per_block, last + 1))
        self.numbers = sorted(numbers)
        data = PAGE * sum(piece.count for piece in self._pieces)
        self.member = Member(kind=Kind.RAM, size=self._chain.files[0].ram_bytes, data=data)

    def content(self, number: int) -> bytes | None:
        """As `Source` says."""
        per_block = Unit.RAM.per_block
        begin = number * per_block
        states = bytearray(units_in(self.member, number))
        end = begin + len(states)
        data: list[bytes] = []
        at = max(bisect_right(self._firsts, begin) - 1, 0)
        while at < len(self._pieces) and self._pieces[at].first < end:
            piece = self._pieces[at]
            at += 1
            for part in parts_of(piece, self._chain.files[piece.file]):
                first, last = max(part.first, begin), min(part.first + part.count, end)
                if first < last:
                    states[first - begin : last - begin] = bytes([DATA]) * (last - first)
                    offset = part.offset + (first - part.first) * PAGE
                    pages = self._read(part.file, part.chunk)
                    data.append(pages[offset : offset + (last - first) * PAGE])
        return b"".join([states, *data]) if data else None

    def close(self) -> None:
        """As `Source` says."""
        self._chain.__exit__()

    def _read(self, file: int, chunk: int) -> bytes:
        """A chunk, verified once and kept for the next pages that lie in it."""
        with self._lock:
            key = (file, chunk)
            if key not in self._kept:
                self._kept[key] = self._chain.read(file, chunk, verify=True)
                if len(self._kept) > _KEPT_CHUNKS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def data_in(member: Member, block: Block) -> int:
    """Bytes of a block's content without its states."""
    return block.raw - (units_in(member, block.number) if member.kind.unit else 0)


def units_in(member: Member, number: int) -> int:
    """How many units one block of a disk or of RAM has; the last one may have fewer."""
    unit = member.kind.unit
    return min(unit.per_block, -(-member.size // unit) - number * unit.per_block)
