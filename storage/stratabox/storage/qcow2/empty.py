"""Make an empty qcow2: a disk that reads as its backing file, or as zeros.

```
cluster 0   header, backing format, name of the backing file
cluster 1   refcount table: one entry
cluster 2   refcount block: a one for each cluster here
cluster 3   L1 table: nothing but zeros, so no byte of it is written
```

Layout: QEMU's docs/interop/qcow2.txt, with the values that ``qemu-img create`` takes by itself. An
overlay is made for each disk of each snapshot and each restore, while somebody waits; to start
qemu-img for it would take ten times as long as the disk does.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.qcow2.header import (
    DEFLATE,
    EXT_BACKING_FORMAT,
    FIXED_V2,
    FIXED_V3,
    INCOMPATIBLE_COMPRESSION,
    MAGIC,
    MAX_VIRTUAL_SIZE,
)

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
SECTOR = 512
L1_ENTRY_COVERS = CLUSTER // 8 * CLUSTER
_REFCOUNT_ORDER = 4  # 16 bits for each cluster
_HEADER_BYTES = 112


def create(path: Path, size: int, backing_name: str | None) -> None:
    """Make the file, durably, mode 0600; its folder's entry is the caller's to make durable.

    :param size: virtual size, bytes; rounded up to whole sectors.
    :param backing_name: name of the backing file (a qcow2) relative to `path`'s folder; None: it
        stands alone. A hint for people and tools: we spell chains out and never follow it.
    :raise InvalidArgumentError: INVALID_RESOURCES, for a size above 64 TiB.
    :raise FileExistsError: when there is one already.
    :raise OSError: as writing does; nothing is left then.
    """
    if backing_name is not None and (Path(backing_name).is_absolute() or ":" in backing_name):
        raise ValueError(f"backing name {backing_name!r} is not a plain relative name")
    if size > MAX_VIRTUAL_SIZE:
        raise InvalidArgumentError(
            f"a disk of {size / (1 << 40):g} TiB is larger than the"
            f" {MAX_VIRTUAL_SIZE >> 40} TiB that one may have",
            reason="INVALID_RESOURCES",
        )
    size = -(-size // SECTOR) * SECTOR
    l1_entries = -(-size // L1_ENTRY_COVERS)
    clusters = 3 + -(-l1_entries * 8 // CLUSTER)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask is
        head = first_cluster(
            size,
            backing_name,
            l1=(3 * CLUSTER, l1_entries),
            refcounts=(CLUSTER, 1),
        )
        write_at(descriptor, head, 0)
        write_at(descriptor, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
        write_at(descriptor, struct.pack(">H", 1) * clusters, 2 * CLUSTER)
        os.ftruncate(descriptor, 3 * CLUSTER + l1_entries * 8)
        os.fsync(descriptor)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def first_cluster(
    size: int,
    backing_name: str | None,
    *,
    l1: tuple[int, int],
    refcounts: tuple[int, int],
    compression: int = DEFLATE,
) -> bytes:
    """The header, with the name of the backing file.

    :param size: virtual size, bytes; whole sectors.
    :param l1: offset of the L1 table and its entries.
    :param refcounts: offset of the refcount table and its clusters.
    :param compression: of the clusters that are compressed, if there are any.
    """
    name = os.fsencode(backing_name or "")
    extensions = b""
    if backing_name is not None:
        extensions += struct.pack(">II8s", EXT_BACKING_FORMAT, 5, b"qcow2")
    extensions += struct.pack(">II", 0, 0)
    name_at = _HEADER_BYTES + len(extensions) if name else 0
    fixed = FIXED_V2.pack(
        MAGIC,
        3,
        name_at,
        len(name),
        CLUSTER_BITS,
        size,
        0,  # not encrypted
        l1[1],
        l1[0],
        refcounts[0],
        refcounts[1],
        0,  # internal snapshots
        0,
    )
    # A reader that does not know the field for it must not take zstd for deflate.
    incompatible = 0 if compression == DEFLATE else INCOMPATIBLE_COMPRESSION
    more = FIXED_V3.pack(incompatible, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES)
    last = struct.pack(">B7x", compression)
    return fixed + more + last + extensions + name


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of it. :raise OSError: as writing does."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
