"""Read the header of a qcow2 file, trusting nothing in it.

Pure: bytes in, `Header` out. Layout: QEMU's docs/interop/qcow2.txt. `parse` accepts whatever is
well formed, also what we would never use; `refuse_unsafe` then refuses all that could make another
program open a second file, spend absurd memory, or mean two things to two readers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from stratabox.storage.model.errors import InvalidArgumentError

MAGIC = b"QFI\xfb"
HEAD_BYTES = 1 << 16
"""Enough for any header whose extensions we accept: read so much of the file's start."""
MAX_VIRTUAL_SIZE = 64 << 40
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20

FIXED_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
FIXED_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

_EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
_EXT_FEATURE_NAMES = 0x6803F857
_EXT_BITMAPS = 0x23852875
_EXT_ENCRYPTION = 0x0537BE77
_EXT_DATA_FILE = 0x44415441

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
_KNOWN_INCOMPATIBLE = 0b11111

DEFLATE, ZSTD = 0, 1
"""Compressions of clusters."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a qcow2 file says of itself."""

    version: int
    backing_file: bytes | None
    """Its name as written in the file; None: no backing file."""
    cluster_bits: int
    virtual_size: int
    """Bytes."""
    encryption: int
    """0: none, 1: AES, 2: LUKS."""
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    """Internal snapshots."""
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = FIXED_V2.size
    compression: int = 0
    """0: deflate, 1: zstd."""
    extensions: tuple[tuple[int, bytes], ...] = ()
    """(type, data), in the file's order."""

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def data_file(self) -> bool:
        """Its data lies, or could lie, in another file."""
        return bool(self.incompatible & INCOMPATIBLE_DATA_FILE) or any(
            kind == _EXT_DATA_FILE for kind, _ in self.extensions
        )


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"Not a usable qcow2 image: {what}.", reason="INVALID_IMAGE")


def parse(head: bytes) -> Header:
    """Read a header from the first bytes of a file; `HEAD_BYTES` of them, or the whole file.

    :raise InvalidArgumentError: INVALID_IMAGE, for anything that is not a well-formed header of
        version 2 or 3. No other error, whatever the bytes are.
    """
    if head[:4] != MAGIC:
        raise _invalid("it does not start with qcow2's magic number")
    if len(head) < FIXED_V2.size:
        raise _invalid("the file ends within its header")
    fixed = FIXED_V2.unpack_from(head)
    _, version, backing_offset, backing_size, cluster_bits, size, encryption = fixed[:7]
    l1_entries, l1_offset, refcount_offset, refcount_clusters, snapshots, _ = fixed[7:]
    if version not in (2, 3):
        raise _invalid(f"version {version} is not known (2 and 3 are)")
    if not 9 <= cluster_bits <= 21:
        raise _invalid(f"cluster bits are {cluster_bits} (9 to 21 can be)")
    incompatible = compatible = autoclear = compression = 0
    refcount_order, length = 4, FIXED_V2.size
    if version == 3:
        if len(head) < FIXED_V2.size + FIXED_V3.size:
            raise _invalid("the file ends within its header")
        incompatible, compatible, autoclear, refcount_order, length = FIXED_V3.unpack_from(
            head, FIXED_V2.size
        )
        if refcount_order > 6:
            raise _invalid(f"refcount order is {refcount_order} (6 at most)")
        if length < FIXED_V2.size + FIXED_V3.size or length % 8 or length > 1 << cluster_bits:
            raise _invalid(f"header length is {length}")
        if length > len(head):
            raise _invalid("the file ends within its header")
        if length > 104:
            compression = head[104]
    end = min(1 << cluster_bits, len(head))
    backing_file = None
    if backing_offset:
        if backing_size > 1023 or backing_offset + backing_size > 1 << cluster_bits:
            raise _invalid("its backing file's name lies outside the header")
        if backing_offset + backing_size > len(head):
            raise _invalid("the file ends within its header")
        backing_file = head[backing_offset : backing_offset + backing_size]
        end = min(end, backing_offset)
    return Header(
        version=version,
        backing_file=backing_file,
        cluster_bits=cluster_bits,
        virtual_size=size,
        encryption=encryption,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_offset=refcount_offset,
        refcount_clusters=refcount_clusters,
        snapshots=snapshots,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        length=length,
        compression=compression,
        extensions=_extensions(head, length, end),
    )


def _extensions(head: bytes, start: int, end: int) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    while start < end:
        if start + _EXTENSION.size > end:
            raise _invalid("a header extension is cut off")
        kind, length = _EXTENSION.unpack_from(head, start)
        if kind == _EXT_END:
            break
        start += _EXTENSION.size
        if length > end - start:
            raise _invalid("a header extension is longer than the header")
        found.append((kind, head[start : start + length]))
        start += (length + 7) // 8 * 8
    return tuple(found)


def refuse_unsafe(header: Header, *, file_size: int, max_virtual_size: int) -> None:
    """Let a header pass that describes a plain, complete image of one file, or raise.

    :param file_size: Bytes in the file.
    :param max_virtual_size: Bytes that its disk may have; never more than `MAX_VIRTUAL_SIZE`.
    :raise InvalidArgumentError: INVALID_IMAGE; the message names what is wrong.
    """
    for wrong, text in _REFUSALS:
        if wrong(header):
            raise _invalid(text)
    limit = min(max_virtual_size, MAX_VIRTUAL_SIZE)
    if header.virtual_size > limit:
        raise _invalid(f"its disk has {header.virtual_size} bytes, {limit} are allowed")
    _check_tables(header, file_size)


_REFUSALS: tuple[tuple[Callable[[Header], bool], str], ...] = (
    (lambda h: h.backing_file is not None, "it has a backing file; flatten it first"),
    (lambda h: h.data_file, "its data is in an external data file"),
    (lambda h: h.encryption != 0, "it is encrypted"),
    (lambda h: any(kind == _EXT_ENCRYPTION for kind, _ in h.extensions), "it is encrypted"),
    (lambda h: h.snapshots != 0, "it has internal snapshots"),
    (
        lambda h: bool(h.incompatible & ~_KNOWN_INCOMPATIBLE),
        "it has incompatible features that are not known",
    ),
    (lambda h: bool(h.incompatible & INCOMPATIBLE_CORRUPT), "it is marked as corrupt"),
    (
        lambda h: bool(h.incompatible & INCOMPATIBLE_DIRTY),
        "it was not closed cleanly; repair it with qemu-img check -r all",
    ),
    (lambda h: h.compression > 1, "its compression is not known"),
    (lambda h: h.virtual_size == 0, "its disk is empty"),
    (
        lambda h: bool(h.incompatible & INCOMPATIBLE_EXTENDED_L2) and h.cluster_bits < 14,
        "its extended L2 entries do not fit its clusters",
    ),
)


def _check_tables(header: Header, file_size: int) -> None:
    """Refuse tables that are absurd, or are not wholly within the file."""
    entry = 16 if header.incompatible & INCOMPATIBLE_EXTENDED_L2 else 8
    per_l1 = header.cluster_size // entry * header.cluster_size
    l1_bytes = header.l1_entries * 8
    refcount_bytes = header.refcount_clusters * header.cluster_size
    if l1_bytes > MAX_L1_BYTES:
        raise _invalid(f"its L1 table has {l1_bytes} bytes, {MAX_L1_BYTES} are allowed")
    if header.l1_entries < -(-header.virtual_size // per_l1):
        raise _invalid("its L1 table is too small for its disk")
    if refcount_bytes == 0:
        raise _invalid("it has no refcount table")
    if refcount_bytes > MAX_REFCOUNT_TABLE_BYTES:
        raise _invalid(
            f"its refcount table has {refcount_bytes} bytes, {MAX_REFCOUNT_TABLE_BYTES} are allowed"
        )
    for name, offset, length in (
        ("L1", header.l1_offset, l1_bytes),
        ("refcount", header.refcount_offset, refcount_bytes),
    ):
        if offset == 0 or offset % header.cluster_size:
            raise _invalid(f"its {name} table lies at offset {offset}")
        if offset + length > file_size:
            raise _invalid(f"its {name} table ends after the file: the file is truncated")
