"""The disks of new volumes: made and formatted on the host, so that no guest needs a tool for it.

```
work/ID.raw    sparse; mke2fs writes what an empty ext4 has, which is little
work/ID.qcow2  the same as qcow2, fsynced
layers/ID      renamed there: from now on a row may name it
```

What a killed daemon leaves in `work` or, without its row, among the layers is removed at the next
start. All functions block and belong in a thread.
"""

from __future__ import annotations

import os
import subprocess

from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import DeniedError, FailedError, NoSpaceError
from stratabox.storage.model.ids import LayerId
from stratabox.storage.qcow2 import qemu_img

FORMATTED_MAX = 8 << 40
"""Bytes. A larger file system is grown at its first mount: raw files of that size are more than
some of the hosts' file systems take."""

_EXT4 = (
    "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256", "-i", "16384",
    # All said here, so that the host's mke2fs.conf does not matter, nor how new its mke2fs is.
    "-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,"
    "sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
    # Nothing is written that reads as zeros anyway; the guest's kernel is told not to, either.
    "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
)  # fmt: skip


def make_disk(layout: Layout, layer: LayerId, size: int) -> int:
    """Make a formatted disk as the file of an active layer, durably; its row comes after it.

    :param size: virtual size, bytes: whole sectors, 1 MiB at least. Below 8 MiB the file system
        has no journal: it would not fit.
    :return: what its file system has, bytes.
    :raise DeniedError: TOOL_MISSING, without mke2fs or qemu-img.
    :raise NoSpaceError: NO_SPACE; nothing is left then.
    :raise FailedError: MKFS_FAILED, QEMU_IMG_FAILED; likewise.
    """
    formatted = min(size, FORMATTED_MAX)
    raw, disk = layout.work / f"{layer}.raw", layout.work / f"{layer}.qcow2"
    try:
        with durable.naming_a_full_disk():
            with raw.open("xb") as file:
                file.truncate(formatted)
            _format(str(raw.absolute()))
            qemu_img.convert(raw, disk, source_format="raw")
            if size > formatted:
                qemu_img.resize(disk, size)
            disk.chmod(0o600)
            durable.sync_file(disk)
            hit("volume.formatted")
            disk.rename(layout.layer(layer))
            durable.sync_folder(layout.layers)
    finally:
        raw.unlink(missing_ok=True)
        disk.unlink(missing_ok=True)
    return formatted


def grow(layout: Layout, layer: LayerId, size: int) -> None:
    """Grow the file of an active layer that nobody has open, durably. As large already: nothing.

    :raise NoSpaceError: NO_SPACE.
    :raise CorruptError: LAYER_CORRUPT.
    :raise FailedError: QEMU_IMG_FAILED.
    """
    path = layout.layer(layer)
    if qemu_img.virtual_size(path) < size:
        qemu_img.resize(path, size)
    durable.sync_file(path)


def real_size(layout: Layout, layer: LayerId) -> int:
    """Virtual size of a layer by its own header, bytes. QEMU writes it as soon as it changes.

    :raise CorruptError: LAYER_CORRUPT.
    """
    return qemu_img.virtual_size(layout.layer(layer))


def _format(raw: str) -> None:
    try:
        done = subprocess.run(
            ["mke2fs", *_EXT4, raw],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            env={
                **os.environ,
                "LC_ALL": "C",
                "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            },
        )
    except FileNotFoundError:
        raise DeniedError(
            "mke2fs is missing: install the package e2fsprogs.",
            reason="TOOL_MISSING",
            tool="mke2fs",
            package="e2fsprogs",
        ) from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-500:]
        if "No space left" in words:
            raise NoSpaceError(f"no space left to make a volume: {words}")
        raise FailedError(f"the volume could not be formatted: {words}", reason="MKFS_FAILED")
