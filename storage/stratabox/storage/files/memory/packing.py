"""Packing chunks of pages with zstd where that pays, and unpacking them without trust."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import zstandard

_LEVEL = -1
"""Of a booted guest's pages half is left; level 1 leaves 4 % less, for a third more of the time
that every first restore takes to unpack them."""
_LEAST_GAIN = 32
"""A frame that is not smaller by this part of the pages is not worth unpacking at each restore."""
_MOST_THREADS = 4


@dataclass(frozen=True, slots=True)
class Packed:
    """One chunk as it is stored."""

    data: bytes | memoryview
    """A frame, or the very pages that were given."""
    sum: bytes
    """SHA-256 of `data`."""


class _Tools(threading.local):
    """zstd's contexts serve one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def pack(pages: memoryview) -> Packed:
    """Pack one chunk. Random data costs little: zstd sees soon that there is nothing to gain."""
    frame = _tools.compressor.compress(pages)
    data = frame if len(frame) <= len(pages) - len(pages) // _LEAST_GAIN else pages
    return Packed(data, hashlib.sha256(data).digest())


def unpack(frame: bytes, size: int) -> bytes | None:
    """The `size` bytes that were packed; None when it is no frame of exactly so many.

    Never takes more memory than that, whatever the frame says: its word is compared before.
    """
    try:
        if zstandard.frame_content_size(frame) != size:
            return None
        return _tools.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def threads(name: str) -> ThreadPoolExecutor:
    """Threads for packing or unpacking; zstd, SHA-256 and the disk let them run side by side."""
    count = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(count, thread_name_prefix=name)
