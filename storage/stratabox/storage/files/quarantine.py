"""What lies in the store and nothing explains: moved out of the way, and never removed by us.

```
quarantine/TIME/layers/ID.qcow2, ram/ID.ram, …    as they were, by the folder that they lay in
quarantine/TIME/catalog.db                        a catalog that a backup was put in the place of
```

It is the owner's to look at these and to remove them. A file that is still open stays what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What is in the quarantine."""

    files: int
    bytes: int
    """On the host's disk."""


def new_folder(layout: Layout) -> Path:
    """Make a folder for what is moved now. :raise OSError: when that cannot be done."""
    folder = layout.quarantine / f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
    folder.mkdir(mode=0o700)
    durable.sync_folder(layout.quarantine)
    return folder


def move(layout: Layout, files: Iterable[Path]) -> dict[Path, Path]:
    """Move files of the store into the quarantine, durably; those that are gone are left out.

    Each keeps its folder's name and its own. Open files go on being read and written.

    :return: where each one was → where it is.
    :raise OSError: when the disk fails; what was moved stays moved.
    """
    moved: dict[Path, Path] = {}
    folder: Path | None = None
    for path in files:
        if folder is None:
            folder = new_folder(layout)
        beside = folder / path.parent.name
        if not beside.exists():
            beside.mkdir(mode=0o700)
            durable.sync_folder(folder)
        try:
            path.rename(beside / path.name)
        except FileNotFoundError:
            continue
        log.warning("no record explains %s: it is kept as %s", path, beside / path.name)
        moved[path] = beside / path.name
    # First where it has come to: after a power cut it may be in both places, but not in none.
    for place in {path.parent for path in moved.values()}:
        durable.sync_folder(place)
    hit("quarantine.moved")
    for place in {path.parent for path in moved}:
        durable.sync_folder(place)
    return moved


def held(layout: Layout) -> Held:
    """Count what is in there."""
    files = [path for path in layout.quarantine.rglob("*") if path.is_file()]
    return Held(files=len(files), bytes=sum(durable.allocated_bytes(path) for path in files))
