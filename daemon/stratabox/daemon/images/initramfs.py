"""A small initramfs, not compressed: load a few modules, mount the root disk, go there.

Not compressed because a guest without KVM takes longer to unpack it than QEMU to load it.
"""

from __future__ import annotations

import lzma
import re
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

GUEST = Path(__file__).parent / "guest"

MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",
    "crc32c_intel",
    "ext4",
)
"""What the root disk and the agent's port need, in the order of loading."""

_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")
_APPLETS = ("insmod", "mount", "switch_root", "usleep")
_FILE = stat.S_IFREG
_FOLDERS = ("bin", "dev", "proc", "root", "sys", "modules")


def build(modules: Mapping[str, bytes], busybox: bytes) -> bytes:
    """Make the archive.

    :param modules: The kernel's modules: file name (with or without .xz, .gz) → content. What
        `MODULES` names and is not in here is taken to be built into the kernel.
    :param busybox: A static busybox.
    """
    order = numbered(modules, MODULES)
    files = [(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in _APPLETS]
    files += [(f"modules/{name}", _FILE | 0o644, content) for name, content in order]
    files.append(("bin/busybox", _FILE | 0o755, busybox))
    files.append(("init", _FILE | 0o755, (GUEST / "initramfs" / "init").read_bytes()))
    return cpio(_FOLDERS, files)


def numbered(
    modules: Mapping[str, bytes], wanted: Sequence[str], without: Sequence[str] = ()
) -> list[tuple[str, bytes]]:
    """The wanted modules and all that they need, named so that they sort in order of loading.

    :param without: Leave out these, and what they need, because they are loaded before.
    """
    before = dict(_in_order(modules, without))
    rest = [found for found in _in_order(modules, wanted) if found[0] not in before]
    return [(f"{index:02}-{name}.ko", content) for index, (name, content) in enumerate(rest)]


def _in_order(modules: Mapping[str, bytes], wanted: Iterable[str]) -> Iterable[tuple[str, bytes]]:
    """Each wanted module after all that it needs."""
    known = {_module_name(name): name for name in modules}
    done: set[str] = set()

    def visit(name: str) -> Iterable[tuple[str, bytes]]:
        if name in done or name not in known:
            return
        done.add(name)
        content = _plain(known[name], modules[known[name]])
        needs = _DEPENDS.search(content)
        for need in needs.group(1).decode().split(",") if needs else ():
            yield from visit(need.replace("-", "_"))
        yield name, content

    for name in wanted:
        yield from visit(name)


def _module_name(file: str) -> str:
    return PurePosixPath(file).name.partition(".ko")[0].replace("-", "_")


def _plain(name: str, content: bytes) -> bytes:
    if name.endswith(".xz"):
        return lzma.decompress(content)
    if name.endswith(".gz"):
        return zlib.decompress(content, wbits=31)
    return content


def cpio(folders: Iterable[str], files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive, all of it owned by root and without times.

    :param files: Path, mode with the file's type, content (of a link: what it points to).
    """
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += files
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4) + content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)
