"""The program that libvirt runs as QEMU, put where QEMU's users can enter.

```
 FOLDER/<digest>/qemu-system-x86_64    emulator.c, compiled
                 qemu -> the QEMU of this host
```

libvirt executes it as the user that the guest's QEMU runs as, who may enter neither the state
folder nor, perhaps, where this package lies. libvirt keeps what it knows of a QEMU by its path, so
the path changes with the program and with the QEMU behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from stratabox.daemon.hypervisor.qemu_host import BINARY
from stratabox.storage.model.errors import DeniedError, FailedError

PROGRAM = Path(__file__).with_name("emulator.1")
_DIGITS = 16


def place(folder: Path, qemu: Path) -> Path:
    """Put it into `folder`, where it may lie already; returns its path. Blocks for a moment.

    :raise DeniedError: TOOL_MISSING, when it was not built.
    :raise FailedError: LIBVIRT_REFUSED, when nothing can be made there, or QEMU's users can't
        enter.
    """
    try:
        program = PROGRAM.read_bytes()
    except FileNotFoundError:
        raise DeniedError(
            "the program that libvirt is to run was not built with Stratabox: install gcc, and "
            "then Stratabox again.",
            reason="TOOL_MISSING",
            tool="cc",
        ) from None
    status = qemu.stat()
    seen = f"{qemu}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}".encode()
    home = folder / hashlib.sha256(program + seen).hexdigest()[:_DIGITS]
    emulator = home / BINARY
    try:
        _make_enterable(folder)
        if not _is_whole(home, program, qemu):
            _make(folder, home, program, qemu)
    except OSError as error:
        raise FailedError(
            f"{folder} cannot hold what libvirt is to run ({error.strerror}): set libvirt_folder.",
            reason="LIBVIRT_REFUSED",
        ) from error
    closed = closed_folder(home) if os.geteuid() == 0 else None
    if closed is not None:
        raise FailedError(
            f"QEMU's users cannot enter {closed}, and libvirt is to run {emulator} as them: set "
            "libvirt_folder to a folder that all may enter.",
            reason="LIBVIRT_REFUSED",
        )
    return emulator


def _make_enterable(folder: Path) -> None:
    """Make it and what is missing above it, open to all whatever the umask; others stay as is."""
    for each in reversed([folder, *folder.parents]):
        with contextlib.suppress(FileExistsError):
            each.mkdir()
            each.chmod(0o755)


def _is_whole(home: Path, program: bytes, qemu: Path) -> bool:
    emulator = home / BINARY
    try:
        own = all(each.stat().st_uid == os.geteuid() for each in (home, emulator))
        return own and emulator.read_bytes() == program and (home / "qemu").readlink() == qemu
    except FileNotFoundError:
        return False


def _make(folder: Path, home: Path, program: bytes, qemu: Path) -> None:
    # Aside and renamed: who finds it finds it whole.
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        (aside / BINARY).write_bytes(program)
        (aside / BINARY).chmod(0o755)
        (aside / "qemu").symlink_to(qemu)
        aside.chmod(0o755)
        if home.exists():  # half of one, or not ours
            shutil.rmtree(home)
        with contextlib.suppress(FileExistsError):  # another daemon was quicker
            aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def closed_folder(folder: Path) -> Path | None:
    """The folder, of this one and those above, that not all may enter; None: they may."""
    return next((each for each in (folder, *folder.parents) if not each.stat().st_mode & 1), None)
