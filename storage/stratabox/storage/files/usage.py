"""What the state folder takes on the disk: all of it, looked at; and what counts, cheaply."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.ids import LayerId

BLOCK = 512
"""Bytes of what st_blocks counts, whatever the file system's own blocks are (stat(2))."""

PARTS = (
    "images", "snapshots", "sandboxes", "volumes", "volume_snapshots", "memory", "boot_files",
    "garbage", "work", "backups", "quarantine", "catalog", "reserve", "folders",
    "other",
)  # fmt: skip
"""Kinds of what is kept, in the order in which they are told."""

_FOLDERS = {
    "blobs": "boot_files",
    "firmware": "boot_files",
    "ram": "memory",
    "sandboxes": "sandboxes",
    "work": "work",
    "backups": "backups",
    "quarantine": "quarantine",
}


@dataclass
class Part:
    """One kind of what is kept."""

    bytes: int = 0
    files: int = 0

    def add(self, found: os.stat_result) -> None:
        """Count one file."""
        self.bytes += found.st_blocks * BLOCK
        self.files += 1


@dataclass(frozen=True)
class FileSystem:
    """What a state folder lies on."""

    bytes: int
    """What the daemon could use of it, were it empty."""
    free: int
    """Bytes that the daemon can still use."""

    @property
    def percent(self) -> float:
        """How full it is, as df(1) says it."""
        return 100 * (1 - self.free / self.bytes) if self.bytes else 100.0


def file_system(layout: Layout) -> FileSystem:
    """What the state folder lies on, and how full that is."""
    found = os.statvfs(layout.root)
    free = found.f_bavail * found.f_frsize
    return FileSystem(bytes=(found.f_blocks - found.f_bfree) * found.f_frsize + free, free=free)


def counted(tx: Transaction, layout: Layout) -> int:
    """Bytes that count against the budget now, at the price of a look at what still grows.

    Sealed layers and saved memory are summed up by the catalog as they come and go. Builds and
    imports count once they are stored, and folders of running guests not at all.
    """
    row = tx.row("SELECT bytes FROM store")
    assert row is not None
    total = int(row["bytes"])
    # The first condition is that of the index.
    for active in tx.rows("SELECT id FROM layers WHERE state != 'sealed' AND state = 'active'"):
        total += durable.allocated_bytes(layout.layer(LayerId(active["id"])))
    for name in ("blobs", "backups", "quarantine"):
        total += sum(found.st_blocks * BLOCK for _, found in _files(layout.root / name))
    return total + sum(durable.allocated_bytes(path) for path in layout.root.glob("catalog.db*"))


def growth(tx: Transaction, layout: Layout) -> int:
    """Bytes that all disks and volumes together can still grow by, were they written full."""
    return sum(
        max(0, int(row["size"]) - durable.allocated_bytes(layout.layer(LayerId(row["id"]))))
        for row in tx.rows(
            "SELECT id, size FROM layers WHERE state != 'sealed' AND state = 'active'"
        )
    )


def survey(layout: Layout, kind_of: Mapping[str, str]) -> dict[str, Part]:
    """Look at every file; each counts once, however many names it has. Blocks for long.

    What comes or goes meanwhile is counted or not.

    :param kind_of: of each layer, by its id (``space.kinds``).
    """
    parts = {name: Part() for name in PARTS}
    seen: set[tuple[int, int]] = set()
    for path, found in _files(layout.root, parts["folders"].add):
        if found.st_nlink > 1:
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
        parts[_part_of(path, layout, kind_of)].add(found)
    return parts


def _part_of(path: Path, layout: Layout, kind_of: Mapping[str, str]) -> str:
    first, *rest = path.relative_to(layout.root).parts
    if not rest:
        if first == layout.reserve.name:
            return "reserve"
        return "catalog" if first.startswith("catalog.db") else "other"
    if first == "layers":
        return kind_of.get(path.stem, "garbage") if path.suffix == ".qcow2" else "garbage"
    return _FOLDERS.get(first, "other")


def _files(
    root: Path, on_folder: Callable[[os.stat_result], None] = lambda found: None
) -> Iterator[tuple[Path, os.stat_result]]:
    """All that is below a folder but folders, as it is now; symbolic links are not followed."""
    try:
        on_folder(root.stat())
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), on_folder)
            else:
                yield Path(entry.path), entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
