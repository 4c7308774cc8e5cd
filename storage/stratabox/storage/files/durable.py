"""Making bytes and names survive a power cut.

A file is durable when it was fsynced *and* its folder was: QEMU and qemu-img fsync the files they
make but never the folder, so after a power cut a new overlay could be missing although the
catalog names it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stratabox.storage.model.errors import FailedError, NoSpaceError, StrataboxError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming_a_full_disk() -> Iterator[None]:
    """Let ENOSPC and EDQUOT leave as what they mean. :raise NoSpaceError: NO_SPACE."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise host_error(error) from error


def host_error(error: OSError) -> StrataboxError:
    """What a failure of the host means to a caller: NO_SPACE or HOST_DISK_FAILED."""
    if error.errno in _FULL:
        return NoSpaceError(f"no space left on the host's disk: {error}")
    return FailedError(
        f"the host's disk failed: {error.strerror or error}", reason="HOST_DISK_FAILED"
    )


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
