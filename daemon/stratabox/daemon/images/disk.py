"""From a raw disk to the qcow2 that becomes an image."""

from __future__ import annotations

import asyncio
from pathlib import Path

from stratabox.daemon.images import process
from stratabox.storage.qcow2 import qemu_img

GIB = 1 << 30
EXT4 = (
    "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-b", "4096", "-I", "256", "-i", "16384",
    # All said here, so that the host's mke2fs.conf does not matter, nor how new its mke2fs is.
    "-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,"
    "sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
    # Nothing is left for the guest's kernel to fill in.
    "-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
)  # fmt: skip
"""Options of mke2fs for root disks: feature set, no reliance on the host's defaults."""


def round_up(size: int) -> int:
    """The least whole number of GiB, in bytes, that holds `size`."""
    return -(-size // GIB) * GIB


async def to_qcow2(raw: Path, target: Path) -> None:
    """Convert a raw disk of ours and remove it. Raises as `process.run`."""
    await asyncio.to_thread(_pad, raw)
    await process.run(
        qemu_img.convert_command(str(raw), str(target), source_format="raw"),
        what="Writing the disk",
    )
    await asyncio.to_thread(raw.unlink)


def _pad(raw: Path) -> None:
    size = raw.stat().st_size
    if size != round_up(size):
        with raw.open("r+b") as file:
            file.truncate(round_up(size))
