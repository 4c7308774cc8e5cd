"""Another process's pages into a buffer, by process_vm_readv(2).

The buffer is filled with real pages before the guest is paused: reading into fresh memory takes
four times as long, most of it in page faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from array import array

from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping, denied
from stratabox.daemon.hypervisor.memory.pages import Runs, bytes_of
from stratabox.storage.model.errors import UnavailableError

_VECTORS = 1024  # IOV_MAX
_MADV_POPULATE_WRITE = 23  # Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


class Buffer:
    """Memory to read into, filled with real pages; a context manager."""

    def __init__(self, size: int) -> None:
        """Make room for `size` bytes; takes 0.3 ms for each MiB."""
        self._map = mmap.mmap(-1, max(-(-size // PAGE) * PAGE, PAGE), mmap.MAP_PRIVATE)
        # A child of the daemon needs none of it; and what is in it are a guest's secrets.
        self._map.madvise(mmap.MADV_DONTFORK)
        self._map.madvise(mmap.MADV_DONTDUMP)
        try:
            self._map.madvise(_MADV_POPULATE_WRITE)
        except OSError:
            for offset in range(0, len(self._map), PAGE):
                self._map[offset] = 0
        self._pin = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._pin)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back."""
        del self._pin
        with contextlib.suppress(BufferError):
            self._map.close()
            return
        # An error that is on its way out holds a view, by its traceback: with that the memory goes.
        del self._map

    @property
    def size(self) -> int:
        """Bytes that fit into it."""
        return len(self._map)

    def view(self, offset: int, size: int) -> memoryview:
        """A part of it; to be released before the buffer is closed."""
        return memoryview(self._map)[offset : offset + size]

    def read(self, mapping: RamMapping, runs: Runs, offset: int = 0) -> int:
        """Read pages of a guest's RAM, one after another, to `offset` in the buffer.

        :return: bytes read.
        :raise DeniedError: MEMORY_UNREADABLE.
        :raise UnavailableError: MEMORY_UNREADABLE, when the process is gone.
        """
        assert offset + bytes_of(runs) <= self.size
        done = 0
        for begin in range(0, len(runs), _VECTORS):
            part = runs[begin : begin + _VECTORS]
            done += self._read_vectors(mapping, part, offset + done)
        return done

    def _read_vectors(self, mapping: RamMapping, runs: Runs, offset: int) -> int:
        size = bytes_of(runs)
        done = 0
        while done < size:
            remote = array("Q")
            skip = done
            for first, count in runs:
                length = count * PAGE
                if skip < length:
                    remote.extend((mapping.start + first * PAGE + skip, length - skip))
                    skip = 0
                else:
                    skip -= length
            local = array("Q", (self._address + offset + done, size - done))
            # At most 2 GiB in one call: the kernel then reads less, and the loop goes on.
            got: int = _readv(
                mapping.pid,
                local.buffer_info()[0],
                1,
                remote.buffer_info()[0],
                len(remote) // 2,
                0,
            )
            if got <= 0:
                number = ctypes.get_errno()
                if number == errno.EPERM:
                    raise denied(mapping.pid)
                raise UnavailableError(
                    f"the memory of QEMU (process {mapping.pid}) is gone: {os.strerror(number)}",
                    reason="MEMORY_UNREADABLE",
                )
            done += got
        return size


def check_readable(mapping: RamMapping) -> None:
    """Read one page, to see that it is allowed.

    :raise DeniedError, UnavailableError: as `Buffer.read`.
    """
    with Buffer(PAGE) as buffer:
        buffer.read(mapping, [(0, 1)])
