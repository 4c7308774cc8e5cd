"""Runs the outer guest: one emulated CPU that has SVM, and two disks.

It says all through one virtio-serial port and tells its exit code through another; the serial
console has what its kernel says, which is shown when no exit code came.

With a one-shot timer in its kernel it stood still for good, twice, with QEMU 7.2: no timer of its
was armed any more. By QEMU's source an interrupt can be lost there: VMRUN marks a virtual one as
pending without the lock under which the main thread marks the timer's; one mark may undo the other.
So the kernel's timer is a periodic one: its next tick makes up for a lost one. Silence is still
taken for a standstill, and is a failure.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from stratabox.daemon.images.artifact import BuiltImage

_MIB = 4096
_PERIODIC_TIMER = "nohz=off highres=off"
_SILENT_SECONDS = 1000.0
"""More than any test is given: pytest would have said something."""
_TAIL = 4000


class OuterGuestError(Exception):
    """The outer guest ended, or was ended, before it told an exit code."""


def command(image: BuiltImage, payload: Path, work: Path) -> list[str]:
    """QEMU's command line; the output port is its standard output."""
    disk = "cache=unsafe,aio=threads,if=virtio"
    return [
        # Whatever ends us ends it.
        *("setpriv", "--pdeathsig", "KILL"),
        "qemu-system-x86_64",
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-machine", "q35,usb=off,sata=off,graphics=off,vmport=off"),
        # With more CPUs, or threads, a guest in it stands still sooner or later.
        *("-accel", "tcg,thread=single"),
        *("-smp", "1"),
        *("-cpu", "EPYC-Rome,+svm,+npt"),
        *("-m", f"{_MIB}M"),
        *("-kernel", str(image.kernel)),
        *("-initrd", str(image.initrd)),
        *("-append", f"{image.command_line} {_PERIODIC_TIMER}"),
        *("-drive", f"file={image.disk},format=qcow2,{disk}"),
        *("-drive", f"file={payload},format=raw,{disk}"),
        *("-device", "virtio-rng-pci"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", "file,id=output,path=/dev/stdout"),
        *("-device", "virtserialport,chardev=output,name=output"),
        *("-chardev", f"file,id=result,path={work}/result"),
        *("-device", "virtserialport,chardev=result,name=result"),
        *("-chardev", f"file,id=console,path={work}/console"),
        *("-serial", "chardev:console"),
    ]


def run(
    image: BuiltImage, payload: Path, work: Path, seconds: float, show: Callable[[bytes], None]
) -> int:
    """Run the guest to its end and return the exit code that it tells. No process is left.

    :param work: a folder for its words.
    :param show: called with what it says, as it comes.
    :raise OuterGuestError: with the last words of its kernel and of QEMU.
    """
    deadline = time.monotonic() + seconds
    with (
        (work / "errors").open("wb") as errors,
        subprocess.Popen(
            command(image, payload, work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as qemu,
    ):
        assert qemu.stdout is not None
        try:
            late = _pass_on(qemu.stdout.fileno(), deadline, show)
        finally:
            qemu.kill()
    result = _read(work / "result").strip()
    if result.isdecimal():
        return int(result)
    what = "said nothing more, or took too long" if late else "ended without a result"
    words = f"{_read(work / 'console')[-_TAIL:]}{_read(work / 'errors')[-_TAIL:]}"
    raise OuterGuestError(f"The outer guest {what}. Its kernel and QEMU said:\n{words}")


def _pass_on(descriptor: int, deadline: float, show: Callable[[bytes], None]) -> bool:
    """Pass on until the other side closes; whether silence or the deadline came first."""

    def left() -> float:
        return max(min(deadline - time.monotonic(), _SILENT_SECONDS), 0)

    while select.select([descriptor], [], [], left())[0]:
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return False
        show(piece)
    return True


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
