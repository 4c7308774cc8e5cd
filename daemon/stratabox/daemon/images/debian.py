"""Build a Debian guest: systemd, the guest agent, sshd, Python.

The disk is one ext4 without a partition table; kernel and initramfs are loaded by QEMU. What is
masked below keeps the guest quiet: an idle sandbox should not write, and without KVM every unit
costs a tenth of a second of its boot.
"""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from stratabox.daemon.images import initramfs, kernel, overlay
from stratabox.daemon.images.artifact import BuiltImage, Progress
from stratabox.daemon.images.bootstrap import (
    Recipe,
    bootstrap,
    check_host,
    check_packages,
    check_release,
)
from stratabox.daemon.images.disk import EXT4, to_qcow2
from stratabox.storage.model.errors import FailedError

COMMAND_LINE = "root=/dev/vda rw console=ttyS0 quiet"
SIZE_GIB = 4
PACKAGES = (
    "busybox-static",
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "linux-image-amd64",
    "netbase",
    "openssh-server",
    "procps",
    "python3",
    "qemu-guest-agent",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "util-linux-extra",  # hwclock, which the agent's guest-set-time needs
)
MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "kmod-static-nodes.service",
    "logrotate.timer",
    "man-db.timer",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "serial-getty@ttyS0.service",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-network-generator.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
)
MASKED_GENERATORS = (
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-veritysetup-generator",
)
_DRIVERS_LEFT_OUT = (
    "drivers/gpu",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/staging",
    "sound",
)
"""Modules for hardware that no sandbox has: half of the kernel package."""

_STEPS = (
    ("I: running apt-get update", "Reading Debian's package lists", 0.02),
    ("I: downloading packages", "Downloading packages", 0.05),
    ("I: extracting archives", "Unpacking the base system", 0.2),
    ("I: installing essential", "Installing the base system", 0.3),
    ("I: installing remaining", "Installing packages", 0.4),
    ("I: running --customize-hook", "Making the file system", 0.8),
)


async def build_debian(
    work: Path,
    *,
    release: str = "bookworm",
    include: Sequence[str] = (),
    progress: Progress,
) -> BuiltImage:
    """Build a Debian guest in the empty folder `work`.

    The disk's virtual size is 4 GiB, or more where the content needs it; the root file system
    grows to the disk's size at each boot. There are no passwords, SSH host keys or machine id in
    it. Cancelling it ends all tools.

    :param release: Debian's code name; bookworm or newer.
    :param include: More packages.
    :raise InvalidArgumentError: INVALID_ARGUMENT, for names that cannot be right.
    :raise DeniedError: TOOL_MISSING.
    :raise NoSpaceError: NO_SPACE.
    :raise FailedError: IMAGE_BUILD_FAILED, with the last words of the tool that failed.
    """
    check_release(release)
    packages = check_packages([*PACKAGES, *include])
    check_host()
    files, raw, boot = work / "files.tar", work / "disk.raw", work / "boot.tar"
    guest = initramfs.GUEST
    overlay.pack(
        files,
        [guest / "common", guest / "debian" / "root"],
        links={f"etc/systemd/system/{unit}": "/dev/null" for unit in MASKED}
        | {f"etc/systemd/system-generators/{name}": "/dev/null" for name in MASKED_GENERATORS},
    )
    recipe = Recipe(
        release=release,
        variant="apt",
        script=guest / "debian" / "finish",
        include=packages,
        dpkg_options=[
            "force-unsafe-io",
            *(f"path-exclude=*/lib/modules/*/kernel/{part}/*" for part in _DRIVERS_LEFT_OUT),
        ],
        # The kernel's package would make an initramfs that nobody needs.
        env=[("INITRD", "No")],
        arguments=[str(SIZE_GIB), *EXT4],
    )
    await bootstrap(recipe, reads=[files], writes=[raw, boot], on_line=_teller(progress))
    progress("Making the initramfs", 0.85)
    built = BuiltImage(
        disk=work / "disk.qcow2",
        kernel=work / "kernel",
        initrd=work / "initrd",
        command_line=COMMAND_LINE,
        origin=f"debian {release}",
    )
    await asyncio.to_thread(write_boot_files, boot, work / "kernel", work / "initrd")
    progress("Writing the disk", 0.88)
    await to_qcow2(raw, built.disk)
    for path in (files, boot):
        path.unlink()
    progress("Done", 1.0)
    return built


def _teller(progress: Progress) -> Callable[[str], None]:
    def tell(line: str) -> None:
        for start, step, fraction in _STEPS:
            if line.startswith(start):
                progress(step, fraction)

    return tell


def write_boot_files(boot: Path, kernel_file: Path, initrd_file: Path) -> None:
    """Make the kernel and initramfs from what a `finish` script took out of a root file system.

    :raise FailedError: IMAGE_BUILD_FAILED, when there is not exactly one kernel.
    """
    modules: dict[str, bytes] = {}
    kernels: list[bytes] = []
    busybox = b""
    with tarfile.open(boot) as archive:
        for entry in archive:
            file = archive.extractfile(entry) if entry.isfile() else None
            if file is None:
                continue
            name = PurePosixPath(entry.name).name
            if name.startswith("vmlinuz-"):
                kernels.append(file.read())
            elif name == "busybox":
                busybox = file.read()
            else:
                modules[name] = file.read()
    if len(kernels) != 1 or not busybox:
        raise FailedError(
            f"The packages brought {len(kernels)} kernels, and one is needed.",
            reason="IMAGE_BUILD_FAILED",
        )
    kernel_file.write_bytes(kernel.unpack(kernels[0]))
    initrd_file.write_bytes(initramfs.build(modules, busybox))
