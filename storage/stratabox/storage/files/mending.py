"""What ``stratabox check --repair`` does about files: only what can lose nothing.

A right to write is taken away, and what nothing explains goes to the quarantine. Whatever else is
wrong with a file is the owner's to mend, and its finding says how.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from stratabox.storage.files import quarantine
from stratabox.storage.files.checking import Wrong
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.stock import Item, Kind
from stratabox.storage.model.ids import LayerId, Sha256


def mend(item: Item, wrong: Wrong, layout: Layout) -> str:
    """Do what is safe about one file; what was done, or "".

    :raise OSError: when it could not be done.
    """
    if wrong.reason != "NOT_SEALED":
        return ""
    path = _path(item, layout)
    mode = path.stat().st_mode & 0o777
    path.chmod(mode & ~0o222)
    return f"its mode was {mode:04o} and is {mode & ~0o222:04o} now"


def put_aside(names: Collection[str], layout: Layout) -> dict[str, str]:
    """Move strays of layers and saved memory to the quarantine; name → what was done.

    :raise OSError: when it could not be done.
    """
    files = [folder / name for name in sorted(names) for folder in (layout.layers, layout.ram)]
    moved = quarantine.move(layout, [path for path in files if path.exists()])
    return {
        path.name: f"it was moved to {target.relative_to(layout.root)}"
        for path, target in moved.items()
    }


def _path(item: Item, layout: Layout) -> Path:
    match item.kind:
        case Kind.LAYER:
            return layout.layer(LayerId(item.id))
        case Kind.RAM:
            return layout.ram_file(item.id)
        case Kind.STATE:
            return layout.state_file(item.id)
        case Kind.BLOB:
            return layout.blob(Sha256(item.id))
