"""What lies in a store's folder."""

from __future__ import annotations

import stat
from pathlib import Path

from stratabox.storage.files.store import Store


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files(store: Store) -> set[str]:
    """Everything below the state folder but the catalog."""
    root = store.layout.root
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("catalog.db")
    }
