"""Take a disk image that somebody brings, trusting nothing in it.

The header is read by us first and everything that is not one plain, complete disk is refused. Then
qemu-img copies the content into a fresh qcow2, with the format named and never guessed, confined:
no privileges (as root: another uid, which can write nothing but the one file that it is handed as
a descriptor), a bound on time, memory, file size and processor time, and no core dump.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path

from stratabox.daemon.images import process
from stratabox.daemon.images.artifact import BuiltImage
from stratabox.daemon.images.disk import GIB, round_up
from stratabox.storage.model.errors import (
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
    StrataboxError,
)
from stratabox.storage.qcow2 import header, qemu_img

FORMATS = ("qcow2", "raw")
NOBODY = 65534
_SECONDS = 3600.0
_MEMORY = 4 << 30
_CPU_SECONDS = 3600
_SECTOR = 512
_MAGICS = (
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
    (b"QED\0", "QED"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
)


async def import_disk(source: Path, declared: str, work: Path, *, max_bytes: int) -> BuiltImage:
    """Copy the disk in `source` into a qcow2 of ours in the folder `work`.

    The source's bytes are never changed (as root its mode is, for the while). The new disk's size
    is rounded up to a whole GiB. The guest boots by itself, so there is no kernel.

    :param declared: "qcow2" or "raw"; nothing else is tried.
    :param max_bytes: The most that the disk may hold, bytes.
    :raise InvalidArgumentError: INVALID_ARGUMENT for another format, INVALID_IMAGE for a file that
        is not what was declared; the message names what is wrong.
    :raise NoSpaceError: NO_SPACE.
    :raise DeniedError: TOOL_MISSING.
    :raise FailedError: IMAGE_BUILD_FAILED, when the copy took too long.
    """
    if declared not in FORMATS:
        raise InvalidArgumentError(f"Disk format {declared[:40]!r}; qcow2 and raw can be imported.")
    process.require("qemu-img", "prlimit", "setpriv")
    target = work / "disk.qcow2"
    with contextlib.ExitStack() as stack:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, read)
        size = await asyncio.to_thread(_inspect, read, declared, max_bytes)
        await asyncio.to_thread(qemu_img.create_disk, target, round_up(size))
        write = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, write)
        await _convert(read, write, declared, size)
    return BuiltImage(disk=target, kernel=None, initrd=None, command_line="", origin="import")


def _inspect(fd: int, declared: str, max_bytes: int) -> int:
    """The size of the disk in a file, once all that we can see of it is in order."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _invalid("it is not a regular file")
    head = os.pread(fd, header.HEAD_BYTES, 0)
    if declared == "qcow2":
        found = header.parse(head)
        header.refuse_unsafe(found, file_size=status.st_size, max_virtual_size=max_bytes)
        return found.virtual_size
    for magic, name in _MAGICS:
        if head.startswith(magic):
            raise _invalid(f"it is declared as raw, and is {name}")
    if status.st_size == 0 or status.st_size % _SECTOR:
        raise _invalid(f"a raw disk of {status.st_size} bytes is not whole sectors of {_SECTOR}")
    limit = min(max_bytes, header.MAX_VIRTUAL_SIZE)
    if status.st_size > limit:
        raise _invalid(f"its disk has {status.st_size} bytes, {limit} are allowed")
    return status.st_size


def _invalid(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"Not a usable disk image: {what}.", reason="INVALID_IMAGE")


async def _convert(read: int, write: int, declared: str, size: int) -> None:
    """Let a confined qemu-img copy from one descriptor to the other."""
    limits = [
        f"--cpu={_CPU_SECONDS}",
        f"--as={_MEMORY}",
        f"--fsize={size + size // 64 + GIB}",
        "--core=0",
        "--nofile=64",
    ]
    confine = ["--no-new-privs", "--pdeathsig=KILL"]
    mode = stat.S_IMODE(os.fstat(read).st_mode)
    root = os.geteuid() == 0
    if root:
        confine += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        confine += ["--bounding-set=-all", "--inh-caps=-all"]
        # qemu-img opens /proc/self/fd/N anew, which asks for the file's mode and for nothing else:
        # no folder is entered, and nobody else has the descriptors.
        os.fchmod(read, mode | stat.S_IROTH)
        os.fchmod(write, 0o666)
    source, target = f"/proc/self/fd/{read}", f"/proc/self/fd/{write}"
    confined = ["prlimit", *limits, "setpriv", *confine]
    copy = qemu_img.convert_command(source, target, source_format=declared, into_existing=True)
    try:
        if declared == "qcow2":
            # Reading beyond the end of a truncated file gives zeros and no error: look before.
            await process.run(
                [*confined, *qemu_img.check_command(source)],
                what="Checking the disk",
                pass_fds=[read],
                seconds=_SECONDS,
                good=(0, qemu_img.LEAKS_ONLY),
            )
        await process.run(
            [*confined, *copy], what="Copying the disk", pass_fds=[read, write], seconds=_SECONDS
        )
    except FailedError as error:
        raise _explain(error) from error
    finally:
        if root:
            os.fchmod(read, mode)
            os.fchmod(write, 0o600)


def _explain(error: FailedError) -> StrataboxError:
    text = error.message.partition("\n")[2]
    if "File too large" in text:
        return NoSpaceError("The disk grew beyond what its size allows.", reason="NO_SPACE")
    if not text:
        return error
    if error.message.startswith("Checking"):
        return _invalid("its tables are wrong or point beyond its end; it is corrupt or truncated")
    return _invalid(f"it cannot be read to its end: {text.splitlines()[-1][-500:]}")
