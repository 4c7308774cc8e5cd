"""Build a guest of a few MB, for tests and quick starts.

A real root disk (ext4, on /dev/vda; /tmp is on it), Debian's kernel, busybox, the guest agent with
freeze and thaw, OpenSSH's server, resize2fs, dash, and a real dd. Process 1 is a shell script,
``guest/tiny/root/sbin/init``. Nothing of it is installed: the files are taken out of Debian's
packages, so any host can build it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from stratabox.daemon.images import initramfs, kernel, overlay, process
from stratabox.daemon.images.artifact import BuiltImage, Progress
from stratabox.daemon.images.bootstrap import Recipe, bootstrap, check_host
from stratabox.daemon.images.disk import EXT4, GIB, to_qcow2
from stratabox.storage.model.errors import FailedError

COMMAND_LINE = "root=/dev/vda rw console=ttyS0 quiet"
RELEASE = "bookworm"
SIZE_GIB = 1
LATE_MODULES = ("virtio_rng", "virtio_net", "pvpanic", "pvpanic_pci", "sd_mod", "virtio_scsi")
_PROGRAMS = (
    "usr/sbin/qemu-ga", "usr/sbin/resize2fs", "usr/bin/dash", "usr/bin/dd", "usr/sbin/sshd",
    "usr/lib/openssh/sftp-server",
)  # fmt: skip
"""Real ones. /bin/sh is dash, since busybox's shell would use its own dd, which lacks oflag."""
_FOLDERS = (
    "dev", "etc/qemu/fsfreeze-hook.d", "mnt", "proc", "root", "run", "sys", "tmp", "usr/bin",
    "usr/sbin", "usr/lib/stratabox/modules", "usr/local/bin", "usr/local/sbin", "var/lib/stratabox",
    "var/log", "var/tmp",
)  # fmt: skip


async def build_tiny(work: Path, *, progress: Progress) -> BuiltImage:
    """Build the tiny guest in the empty folder `work`.

    The disk's virtual size is 1 GiB; the root file system grows to the disk's size at each boot.
    Cancelling it ends all tools.

    :raise DeniedError: TOOL_MISSING.
    :raise NoSpaceError: NO_SPACE.
    :raise FailedError: IMAGE_BUILD_FAILED, with the last words of the tool that failed.
    """
    check_host()
    archive, taken, root = work / "taken.tar", work / "taken", work / "root"
    raw, built = work / "disk.raw", _artifact(work)
    progress("Downloading packages", 0.05)
    recipe = Recipe(
        release=RELEASE, variant="custom", script=initramfs.GUEST / "tiny" / "fetch"
    )  # fmt: skip
    await bootstrap(recipe, reads=[], writes=[archive], on_line=lambda line: None)
    progress("Making the guest's files", 0.7)
    await asyncio.to_thread(_extract, archive, taken)
    libraries = await asyncio.to_thread(_libraries, taken)
    await asyncio.to_thread(_make_root, taken, root, libraries)
    await asyncio.to_thread(_make_boot_files, taken, work / "kernel", work / "initrd")
    progress("Writing the disk", 0.8)
    command = ["mke2fs", *EXT4, "-J", "size=16", "-d", str(root), str(raw), f"{SIZE_GIB}G"]
    if os.geteuid() != 0:  # or all files would be ours
        command = ["unshare", "--map-root-user", *command]
    await process.run(command, what="Making the file system")
    await to_qcow2(raw, built.disk)
    archive.unlink()
    await asyncio.to_thread(_remove, taken, root)
    progress("Done", 1.0)
    return built


def _artifact(work: Path) -> BuiltImage:
    return BuiltImage(
        disk=work / "disk.qcow2",
        kernel=work / "kernel",
        initrd=work / "initrd",
        command_line=COMMAND_LINE,
        origin="tiny",
    )


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _extract(archive: Path, target: Path) -> None:
    """Unpack what `fetch` took, with usr merged: bin, sbin and lib are usr's."""
    with tarfile.open(archive) as tar:
        for entry in tar:
            name = entry.name.removeprefix("./")
            if name.split("/")[0] in ("bin", "sbin", "lib", "lib64"):
                name = f"usr/{name}"
            path = target / name
            # By hand: Debian 12's Python has no filters for tar.extract yet.
            if entry.issym():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(entry.linkname)
            elif entry.isfile() and (file := tar.extractfile(entry)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
                path.chmod(0o755)


def _libraries(taken: Path) -> dict[str, Path]:
    """What the programs load: path in the guest → file. Asked of their own ld.so."""
    folders = sorted({str(path.parent) for path in (taken / "usr" / "lib").rglob("*.so*")})
    loader = taken / "usr" / "lib64" / "ld-linux-x86-64.so.2"
    real = taken / "usr" / "lib" / "x86_64-linux-gnu" / "ld-linux-x86-64.so.2"
    found = {"usr/lib64/ld-linux-x86-64.so.2": real}
    for program in _PROGRAMS:
        done = subprocess.run(
            [real, "--list", "--library-path", ":".join(folders), taken / program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or "not found" in done.stdout:
            raise FailedError(
                f"{program} lacks a library: {done.stdout}{done.stderr} ({loader})",
                reason="IMAGE_BUILD_FAILED",
            )
        for line in done.stdout.splitlines():
            name, arrow, rest = line.strip().partition(" => ")
            if arrow and name.startswith("lib"):
                found[f"usr/lib/x86_64-linux-gnu/{name}"] = Path(rest.split(" (")[0])
    return found


def _make_root(taken: Path, root: Path, libraries: dict[str, Path]) -> None:
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    (root / "root").chmod(0o700)
    _copy(taken / "usr" / "bin" / "busybox", root / "usr" / "bin" / "busybox", 0o755)
    applets = subprocess.run(
        [root / "usr" / "bin" / "busybox", "--list"], capture_output=True, text=True, check=True
    )
    for applet in applets.stdout.split():
        if not (root / "usr" / "bin" / applet).exists():
            (root / "usr" / "bin" / applet).symlink_to("busybox")
    for name in ("init", "linuxrc", "dpkg", "dpkg-deb", "rpm", "dd"):
        (root / "usr" / "bin" / name).unlink(missing_ok=True)
    (root / "usr" / "bin" / "sh").unlink(missing_ok=True)
    (root / "usr" / "bin" / "sh").symlink_to("dash")
    (root / "usr" / "sbin" / "hwclock").symlink_to("../bin/busybox")  # the agent wants it there
    for program in _PROGRAMS:
        _copy(taken / program, root / program, 0o755)
    for name, library in libraries.items():
        _copy(library, root / name, 0o755)
    for tree in (initramfs.GUEST / "common", initramfs.GUEST / "tiny" / "root"):
        for path in tree.rglob("*"):
            if path.is_file():
                target = root / path.relative_to(tree)
                _copy(path, target, overlay.mode_of(path.read_bytes()))
    for name, content in initramfs.numbered(_modules(taken), LATE_MODULES, initramfs.MODULES):
        (root / "usr" / "lib" / "stratabox" / "modules" / name).write_bytes(content)
    sectors = SIZE_GIB * GIB // 512
    (root / "var" / "lib" / "stratabox" / "root-sectors").write_text(f"{sectors}\n")


def _copy(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _modules(taken: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (taken / "usr" / "lib").rglob("*.ko*")}


def _make_boot_files(taken: Path, kernel_file: Path, initrd_file: Path) -> None:
    kernels = sorted((taken / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise FailedError(
            f"The packages brought {len(kernels)} kernels, and one is needed.",
            reason="IMAGE_BUILD_FAILED",
        )
    busybox = (taken / "usr" / "bin" / "busybox").read_bytes()
    kernel_file.write_bytes(kernel.unpack(kernels[0].read_bytes()))
    initrd_file.write_bytes(initramfs.build(_modules(taken), busybox))
