"""The outer guest's disk: Debian with its generic kernel, QEMU, and the Python packages we need.

Built once and kept under ~/.cache/stratabox, by the same code as sandboxes' images; its name there
is a hash of that code, of what makes it here, and of the packages' versions.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

from stratabox.daemon.images import overlay
from stratabox.daemon.images.artifact import BuiltImage, Progress
from stratabox.daemon.images.bootstrap import Recipe, bootstrap, check_host
from stratabox.daemon.images.cache import cached
from stratabox.daemon.images.debian import write_boot_files
from stratabox.daemon.images.disk import EXT4, to_qcow2
from support.daemon import CACHE

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
"""Debian releases that the outer guest can be, and their Python."""
COMMAND_LINE = "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off"

_ROOT = Path(__file__).resolve().parents[2]
_GUEST = Path(__file__).with_name("guest")
_LOCK = _ROOT / "requirements.lock"
_PACKAGES = (
    "busybox-static",
    "e2fsprogs",
    "kmod",
    "linux-image-amd64",  # the cloud kernel has no KVM
    "mount",
    "python3",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
)
_LEFT_OUT = ("drivers/gpu", "drivers/media", "drivers/net", "drivers/staging", "sound")
_TEST_PACKAGES = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_SIZE_GIB = 8


async def outer_image(release: str, work: Path, progress: Progress) -> BuiltImage:
    """Give the image in the empty folder `work`; built there where the cache has none.

    Raises as `stratabox.daemon.images.debian.build_debian`, and CalledProcessError when pip failed
    and has said why.

    :param release: one of `PYTHONS`.
    """
    requirements = _requirements()
    sources = [_LOCK, Path(__file__), *sorted(filter(Path.is_file, _GUEST.rglob("*")))]
    digest = hashlib.sha256(b"\0".join(map(Path.read_bytes, sources))).hexdigest()
    return await cached(
        CACHE,
        work,
        recipe="kvm",
        arguments={"release": release, "requirements": requirements, "sources": digest},
        build=lambda: _build(release, requirements, work, progress),
        progress=progress,
    )


def _requirements() -> list[str]:
    """What the daemon, the client and the tests import."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    daemon = project["optional-dependencies"]["daemon"]
    return [*project["dependencies"], *daemon, *_TEST_PACKAGES]


async def _build(
    release: str, requirements: list[str], work: Path, progress: Progress
) -> BuiltImage:
    check_host()
    files, raw, boot = work / "files.tar", work / "disk.raw", work / "boot.tar"
    progress("Downloading Python packages", None)
    await asyncio.to_thread(_pack, PYTHONS[release], requirements, work / "root", files)
    progress(f"Installing Debian {release} and QEMU", None)
    recipe = Recipe(
        release=release,
        variant="apt",
        script=_GUEST / "finish",
        include=_PACKAGES,
        dpkg_options=[
            "force-unsafe-io",
            *(f"path-exclude=*/lib/modules/*/kernel/{part}/*" for part in _LEFT_OUT),
        ],
        # The kernel's package would make an initramfs that nobody needs.
        env=[("INITRD", "No")],
        arguments=[str(_SIZE_GIB), *EXT4],
    )
    await bootstrap(recipe, reads=[files], writes=[raw, boot], on_line=lambda line: None)
    built = BuiltImage(
        disk=work / "disk.qcow2",
        kernel=work / "kernel",
        initrd=work / "initrd",
        command_line=COMMAND_LINE,
        origin=f"kvm {release}",
    )
    await asyncio.to_thread(write_boot_files, boot, work / "kernel", work / "initrd")
    await to_qcow2(raw, built.disk)
    return built


def _pack(python: str, requirements: list[str], root: Path, files: Path) -> None:
    """Our own files and the Python packages, as an archive for the guest's root.

    The packages are those for the guest's Python, whichever this one is.
    """
    target = root / "usr" / "local" / "lib" / f"python{python}" / "dist-packages"
    platforms = [f"--platform={platform}" for platform in _PLATFORMS]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"),
            *("--target", str(target), "--only-binary=:all:"),
            *(f"--python-version={python}", "--implementation=cp", *platforms),
            *("--constraint", str(_LOCK), *requirements),
        ],
        stdin=subprocess.DEVNULL,
        check=True,
    )
    overlay.pack(files, [root, _GUEST / "root"])
