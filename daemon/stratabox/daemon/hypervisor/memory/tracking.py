"""Who notes which pages a guest has written since they were last saved.

- ``written``: userfaultfd in asynchronous write-protect mode (Linux 6.7), registered inside QEMU by
  a small preloaded library, read from outside by `pages.PageMap.take_written`;
- ``soft_dirty``: the kernel's soft-dirty bits, where it was built with them. It forgets all of a
  process's at once, so this works only while the guest is paused;
- ``none``: every private page is copied each time.

Both are believed only after a page of our own was written and told: kernels without soft-dirty
bits accept the order to clear them all the same.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from stratabox.daemon.hypervisor.memory.mapping import PAGE, RamMapping
from stratabox.daemon.hypervisor.memory.pages import PageMap, Runs

LIBRARY = Path(__file__).with_name("libdirtytrack.so.1")
FRESH = "/dev/zero"
"""What a fresh guest's RAM is a private mapping of."""

_SYS_USERFAULTFD = 323  # x86-64
_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_WP_ASYNC, _WP_UNPOPULATED = 1 << 15, 1 << 13
_MODE_WP = 2


class Tracking(StrEnum):
    """How written pages are told."""

    WRITTEN = "written"
    SOFT_DIRTY = "soft_dirty"
    NONE = "none"


def environment(library: str, path: str, *, own_user: bool) -> dict[str, str]:
    """What QEMU's environment needs so that its RAM is tracked, and may be read by us.

    :param library: the library by a name that QEMU can open.
    :param path: the file that its RAM is a mapping of.
    :param own_user: it runs under the daemon's own uid, which is not root's.
    """
    status = os.stat(path)  # noqa: PTH116 (often a descriptor under /proc)
    wanted = {"LD_PRELOAD": library}
    if has_write_tracking():
        wanted["STRATABOX_RAM"] = f"{status.st_dev}:{status.st_ino}"
    if own_user:
        wanted["STRATABOX_PTRACER"] = "any"
    return wanted


def of(mapping: RamMapping) -> Tracking:
    """How the pages of that process are tracked. Blocks for a moment."""
    with PageMap(mapping) as page_map:
        if page_map.is_tracked():
            return Tracking.WRITTEN
    return Tracking.SOFT_DIRTY if has_soft_dirty() else Tracking.NONE


def forget_soft_dirty(pid: int) -> None:
    """Clear all soft-dirty bits of a process (Documentation/admin-guide/mm/soft-dirty.rst)."""
    Path(f"/proc/{pid}/clear_refs").write_text("4")


@functools.cache
def has_write_tracking() -> bool:
    """Whether this kernel tells written pages by userfaultfd: tried on a page of our own."""
    with mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE) as page:
        mapping = _own(page)
        descriptor = ctypes.CDLL(None).syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | _USER_MODE_ONLY)
        if descriptor < 0:
            return False
        try:
            fcntl.ioctl(
                descriptor,
                _UFFDIO_API,
                bytearray(struct.pack("<3Q", 0xAA, _WP_ASYNC | _WP_UNPOPULATED, 0)),
            )
            fcntl.ioctl(
                descriptor,
                _UFFDIO_REGISTER,
                bytearray(struct.pack("<4Q", mapping.start, mapping.size, _MODE_WP, 0)),
            )
            with PageMap(mapping) as page_map:
                return _tells(page, page_map.take_written)
        except OSError:
            return False
        finally:
            os.close(descriptor)


@functools.cache
def has_soft_dirty() -> bool:
    """Whether this kernel keeps soft-dirty bits: tried on a page of our own."""
    with mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE) as page, PageMap(_own(page)) as page_map:

        def take() -> Runs:
            runs = page_map.soft_dirty()
            forget_soft_dirty(os.getpid())
            return runs

        try:
            return _tells(page, take)
        except OSError:
            return False


def _tells(page: mmap.mmap, take: Callable[[], Runs]) -> bool:
    """Write here and there, and see whether just that is told."""
    page[0] = page[2 * PAGE] = 1
    first = take()
    second = take()
    page[2 * PAGE] = 2
    return (first, second, take()) == ([(0, 1), (2, 1)], [], [(2, 1)])


def _own(page: mmap.mmap) -> RamMapping:
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return RamMapping(pid=os.getpid(), start=start, size=len(page))
