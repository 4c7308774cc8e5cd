"""The layout of an archive, and its blocks.

```
0        preamble   magic, version, bytes of the manifest, SHA-256 of the manifest     48 bytes
48       manifest   JSON
then     members, in the manifest's order; each is
           blocks   header (56 bytes) and what is stored, in the order of their numbers
           end      a header without content: how many blocks, SHA-256 over their sums
at last  trailer    a header without content: how many blocks in all, SHA-256 over everything
```

All numbers are little-endian. A block stands for `BLOCK` bytes of its member; blocks without
content are left out. It is stored as one zstd frame, or as it is where that is not smaller. Its sum
is the SHA-256 of its number and its content, so that no two blocks can be taken for one another.

Where the member is a disk or RAM, the content of a block is one byte for each unit (a cluster, a
page): ABSENT, ZERO or DATA; then the units with data, one after another. The digest of a member
depends on nothing but its size and what is in it.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import zstandard

from stratabox.storage.files.memory.format import PAGE
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.qcow2.empty import CLUSTER

MAGIC = b"SBXARC\r\n"
VERSION = 1
BLOCK = 4 << 20
"""Bytes of a member that one block stands for."""
MAX_MANIFEST = 1 << 20
PREAMBLE = struct.Struct("<8sII32s")
HEADER = struct.Struct("<4sIQII32s")
"""Mark, member, number, bytes stored, bytes of content, sum."""
BLOCK_MARK, END_MARK, TRAILER_MARK = b"SBXB", b"SBXE", b"SBXZ"

_LEVEL = 2
"""Of a Debian disk this leaves 5 % more than zstd's default of 3, for two thirds of the time."""
_WINDOW_LOG = 23
"""No frame of ours looks back further than a block is long: what asks for more is not one."""


class Unit(IntEnum):
    """Bytes of content that have one state; a block of a FILE has none, and is all data."""

    FILE = 0
    DISK = CLUSTER
    RAM = PAGE

    @property
    def per_block(self) -> int:
        """States at the beginning of a block's content."""
        return BLOCK // self if self else 0

    @property
    def largest(self) -> int:
        """Bytes that a block's content can have."""
        return BLOCK + self.per_block


@dataclass(frozen=True, slots=True)
class Block:
    """One block as it is stored, or the end of a member (`stored` is empty then)."""

    mark: bytes
    member: int
    number: int
    raw: int
    """Bytes of content."""
    sum: bytes
    stored: bytes = b""

    def pack(self) -> bytes:
        """Its header."""
        return HEADER.pack(
            self.mark, self.member, self.number, len(self.stored), self.raw, self.sum
        )


class _Tools(threading.local):
    """zstd's contexts serve one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)


_tools = _Tools()


def pack_preamble(manifest: bytes) -> bytes:
    """What an archive begins with, the manifest included."""
    digest = hashlib.sha256(manifest).digest()
    return PREAMBLE.pack(MAGIC, VERSION, len(manifest), digest) + manifest


def parse_preamble(head: bytes) -> tuple[int, bytes]:
    """Bytes of the manifest, and its SHA-256.

    :raise InvalidArgumentError: INVALID_ARCHIVE.
    """
    magic, version, size, digest = PREAMBLE.unpack(head)
    if magic != MAGIC:
        raise invalid("it does not begin as an archive does")
    if version != VERSION:
        raise invalid(f"it is of version {version}; this Stratabox knows {VERSION}")
    if not 0 < size <= MAX_MANIFEST:
        raise invalid(f"its manifest has {size} bytes, {MAX_MANIFEST} are allowed")
    return size, digest


def sum_of(number: int, content: bytes) -> bytes:
    """The sum of a block."""
    digest = hashlib.sha256(number.to_bytes(8, "little"))
    digest.update(content)
    return digest.digest()


def pack_block(member: int, number: int, content: bytes) -> Block:
    """Pack the content of one block; from any thread."""
    frame = _tools.compressor.compress(content)
    return Block(
        mark=BLOCK_MARK,
        member=member,
        number=number,
        raw=len(content),
        sum=sum_of(number, content),
        stored=frame if len(frame) < len(content) else content,
    )


def open_block(header: Block, stored: bytes, where: str) -> bytes:
    """The content of a block, verified.

    Never takes more memory than the header says, which the caller has found to be bounded.

    :raise InvalidArgumentError: INVALID_ARCHIVE.
    """
    content: bytes | None = stored
    if len(stored) != header.raw:
        try:
            content = None
            if zstandard.frame_content_size(stored) == header.raw:
                content = _tools.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError:
            content = None
    if content is None:
        raise invalid(f"{where} cannot be unpacked to {header.raw} bytes")
    if sum_of(header.number, content) != header.sum:
        raise invalid(f"{where} is damaged: its SHA-256 differs")
    return content


class Digest:
    """Sums of a member's blocks, as they come, into its digest.

    :param size: bytes of the member.
    """

    def __init__(self, unit: Unit, size: int) -> None:
        self._hash = hashlib.sha256(struct.pack("<8sIQ", b"SBXMEM\r\n", unit, size))
        self.blocks = 0

    def add(self, sum_: bytes) -> None:
        """The next block's."""
        self._hash.update(sum_)
        self.blocks += 1

    def end(self, member: int) -> Block:
        """The end of the member."""
        return Block(
            mark=END_MARK, member=member, number=self.blocks, raw=0, sum=self._hash.digest()
        )

    @property
    def text(self) -> Sha256:
        """In hexadecimal."""
        return Sha256(self._hash.hexdigest())


def trailer(manifest: bytes, ends: Iterable[Block]) -> Block:
    """The end of an archive.

    :param manifest: its SHA-256.
    :param ends: those of all members.
    """
    digest, blocks, members = hashlib.sha256(manifest), 0, 0
    for end in ends:
        digest.update(end.sum)
        blocks += end.number
        members += 1
    return Block(mark=TRAILER_MARK, member=members, number=blocks, raw=0, sum=digest.digest())


def invalid(what: str) -> InvalidArgumentError:
    """The error for an archive that is not one of ours, or not any more."""
    return InvalidArgumentError(f"Not a usable archive: {what}.", reason="INVALID_ARCHIVE")
