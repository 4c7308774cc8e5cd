"""``strataboxd catalog``: the catalog's backups, and the way back to one, with no daemon running.

Prints, and returns an exit code; what there is and how it is put back is ``storage.files.backups``.
"""

from __future__ import annotations

import json
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.locking import locked
from stratabox.storage.files import backups
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.errors import InvalidArgumentError


def list_backups(config: Config, *, as_json: bool) -> int:
    """Print all backups, newest first, and whether each is good. Also while a daemon runs."""
    found = backups.listed(Layout(config.state_dir))
    rows = [
        {
            "name": backup.path.name,
            "taken_at": backup.taken_at.isoformat().replace("+00:00", "Z"),
            "bytes": backup.bytes,
            "kind": backup.kind,
            "sound": backups.is_sound(backup.path),
        }
        for backup in found
    ]
    if as_json:
        print(json.dumps({"backups": rows}, indent=2))
        return 0
    for row, backup in zip(rows, found, strict=True):
        verdict = "sound" if row["sound"] else "DAMAGED"
        print(f"{row['name']}  {backup.taken_at:%Y-%m-%d %H:%M:%S} UTC  {backup.bytes}  {verdict}")
    if not rows:
        print(f"no backups in {config.state_dir}")
    return 0


def restore(config: Config, name: str | None, *, as_json: bool) -> int:
    """Put a backup in the catalog's place, and say what became of the other one.

    :param name: of the backup; None: the newest that is good.
    :raise InvalidArgumentError: when there is no state folder.
    :raise DeniedError: STATE_DIR_IN_USE, while a daemon runs.
    :raise StrataboxError: as ``backups.choose`` and ``backups.restore``.
    """
    layout = Layout(config.state_dir)
    if not layout.root.is_dir():
        raise InvalidArgumentError(f"there is no state folder {layout.root}")
    with locked(layout):
        backup = backups.choose(layout, name)
        aside: Path | None = backups.restore(layout, backup)
    if as_json:
        kept = str(aside) if aside else None
        print(json.dumps({"restored": backup.path.name, "kept_aside": kept}, indent=2))
        return 0
    print(f"the catalog is that of {backup.taken_at:%Y-%m-%d %H:%M:%S} UTC now")
    if aside:
        print(f"the one that was there is kept in {aside}")
    print(
        "what was made since has no record any more: the next daemon keeps its files in"
        f" {layout.quarantine}"
    )
    print("API keys that were revoked since are good again: see stratabox key list")
    return 0
