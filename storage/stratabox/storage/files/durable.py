"""Making bytes and names survive a power cut.

A file is durable when it was fsynced *and* its folder was: QEMU and qemu-img fsync the files they
make but never the folder, so after a power cut a new overlay could be missing although the
catalog names it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Put the file's bytes on the disk. :raise OSError: when the disk does not take them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Put the folder's entries on the disk. :raise OSError: when the disk does not take them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated_bytes(path: Path) -> int:
    """Bytes that the file takes on the disk; 0 when it is not there."""
    try:
        # st_blocks counts 512-byte units whatever the file system's block size (stat(2)).
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
