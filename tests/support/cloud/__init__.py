"""A cloud image: Debian with cloud-init, on a partitioned disk that boots by GRUB.

Made of Debian's packages, as the images that clouds use: no password, no SSH host key, no user of
anybody's, and none of our own files. Built once and kept under ~/.cache/stratabox.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stratabox.daemon.images.bootstrap import Recipe, bootstrap
from support.daemon import CACHE

USER = "debian"
"""Whom cloud-init makes."""
SIZE = 2 << 30

_FINISH = Path(__file__).with_name("finish")
_BEGIN = 1 << 20
_SECTOR = 512
_PACKAGES = (
    "cloud-guest-utils",  # growpart
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "grub-common",
    "grub-pc-bin",
    "initramfs-tools",
    "iproute2",
    "linux-image-cloud-amd64",
    "netplan.io",  # what those images have, and heeds that a card is optional
    "openssh-server",
    "qemu-guest-agent",
    "sudo",
    "systemd-sysv",
    "udev",
)


def cloud_disk() -> Path:
    """Give the raw disk; built where the cache has none, which takes minutes."""
    sources = [Path(__file__), _FINISH]
    digest = hashlib.sha256(b"\0".join(map(Path.read_bytes, sources))).hexdigest()[:32]
    disk = CACHE / f"cloud-{digest}.raw"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"cloud-{digest}.lock"):
        if not disk.exists():
            with tempfile.TemporaryDirectory(prefix=".cloud-", dir=CACHE) as work:
                made = asyncio.run(_build(Path(work)))
                made.rename(disk)
    return disk


async def _build(work: Path) -> Path:
    disk, loader = work / "disk.raw", work / "loader.tar"
    recipe = Recipe(
        release="bookworm",
        variant="apt",
        script=_FINISH,
        include=_PACKAGES,
        dpkg_options=["force-unsafe-io"],
        env=[("INITRD", "No")],
        arguments=[
            *(str(_BEGIN), str((SIZE - _BEGIN) >> 10)),
            *("-q", "-F", "-t", "ext4", "-L", "root"),
        ],
    )
    await bootstrap(recipe, reads=[], writes=[disk, loader], on_line=lambda line: None)
    _make_bootable(disk, loader)
    return disk


def _make_bootable(disk: Path, loader: Path) -> None:
    """Write GRUB before the partition, and the table that names that."""
    with tarfile.open(loader) as archive:
        parts = {
            Path(entry.name).name: file.read()
            for entry in archive
            if (file := archive.extractfile(entry)) is not None
        }
    boot, core = parts["boot.img"], parts["core.img"]
    assert len(core) <= _BEGIN - _SECTOR
    partition = struct.pack(
        "<B3sB3sII",
        *(0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff"),
        *(_BEGIN // _SECTOR, (SIZE - _BEGIN) // _SECTOR),
    )
    # GRUB's first sector loads its second from where we put it.
    head = boot[:440] + b"\x53\x42\x43\x49\0\0" + partition + bytes(48) + b"\x55\xaa"
    with disk.open("r+b") as file:
        file.truncate(SIZE)
        file.write(head + core)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
