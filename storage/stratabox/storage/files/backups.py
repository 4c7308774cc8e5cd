"""Copies of the catalog, made by themselves while it is used, and the way back to one of them.

```
backups/catalog-TIME.db             of the running daemon, when something has changed
backups/catalog-TIME.schema-N.db    before the schema N was changed by a newer Stratabox
backups/catalog-TIME.merged.db      before layers go that a job has replaced: the newest alone
```

Older ones know layers that were replaced since and are gone: what needs those is lost with them. So
it is the newest good one that is put back.

A copy is what the catalog was at one instant. It gets its name when it is whole, was read through
by SQLite and is on the disk: whatever has that name was good when it was made.

`restore` puts one in the place of a catalog that is damaged or gone. That one is moved to the
quarantine with its log, and never removed. What was made after the backup is in no record then: the
next daemon moves those files to the quarantine, too (`files.quarantine`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stratabox.storage.catalog.database import RESTORED, Catalog
from stratabox.storage.failpoints import hit
from stratabox.storage.files import durable
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.quarantine import new_folder
from stratabox.storage.model.errors import (
    CorruptError,
    FailedError,
    NotFoundError,
    StrataboxError,
)

log = logging.getLogger(__name__)

MERGED = "merged"

_NAME = re.compile(r"catalog-(?P<time>[0-9]{8}T[0-9]{12})Z(\.(?P<kind>merged|schema-[0-9]+))?\.db")
_TIME = "%Y%m%dT%H%M%S%f"
_PART = ".part"
_PORTION = 1 << 20
_COUNTERS = (slice(24, 28), slice(92, 100))
"""Bytes of a database's header that change without its content (sqlite.org/fileformat2.html)."""
_BESIDE = ("-wal", "-shm", "-journal")


@dataclass(frozen=True, kw_only=True)
class Backup:
    """One copy of the catalog."""

    path: Path
    taken_at: datetime
    bytes: int
    kind: str = ""
    """"schema-N": before that was changed; "merged": before replaced layers went."""


def listed(layout: Layout) -> list[Backup]:
    """All of them, newest first. :raise OSError: when the folder cannot be read."""
    found = []
    for path in layout.backups.iterdir() if layout.backups.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append(
                Backup(
                    path=path,
                    taken_at=datetime.strptime(match["time"], _TIME).replace(tzinfo=UTC),
                    bytes=path.stat().st_size,
                    kind=match["kind"] or "",
                )
            )
    return sorted(found, key=lambda backup: backup.taken_at, reverse=True)


def make(layout: Layout, kind: str = "") -> Backup | None:
    """Copy the catalog as it is now, durably. Whoever writes it meanwhile is not held up.

    One at a time.

    :param kind: as in `Backup`.
    :return: None when it is the same as the newest one there is.
    :raise NoSpaceError: NO_SPACE; nothing is left then.
    :raise CorruptError: CATALOG_CORRUPT, when the catalog is damaged; nothing is left then.
    """
    before = [backup for backup in listed(layout) if backup.kind == kind]
    for left in layout.backups.glob(f"*{_PART}"):
        left.unlink()
    now = datetime.now(UTC)
    end = f".{kind}.db" if kind else ".db"
    target = layout.backups / f"catalog-{now.strftime(_TIME)}Z{end}"
    part = target.with_name(target.name + _PART)
    try:
        with durable.naming_a_full_disk():
            part.touch(mode=0o600, exist_ok=False)
            _copy(layout.catalog, part)
            _require_sound(part)
            durable.sync_file(part)
            if before and _same(before[0].path, part):
                return None
            hit("backup.written")
            part.rename(target)
            durable.sync_folder(layout.backups)
    finally:
        part.unlink(missing_ok=True)
    hit("backup.placed")
    return Backup(path=target, taken_at=now, bytes=target.stat().st_size, kind=kind)


def prune(layout: Layout, keep: int) -> None:
    """Remove the oldest but `keep`; of those before a migration likewise, of the others but one."""
    found = listed(layout)
    for those, most in (
        ([each for each in found if not each.kind], keep),
        ([each for each in found if each.kind.startswith("schema-")], keep),
        ([each for each in found if each.kind == MERGED], 1),
    ):
        for backup in those[most:]:
            backup.path.unlink(missing_ok=True)


def is_sound(path: Path) -> bool:
    """Whether SQLite reads all of it."""
    try:
        _require_sound(path)
    except (StrataboxError, OSError):
        return False
    return True


def newest_sound(layout: Layout) -> Backup | None:
    """The last one that is good now."""
    return next((backup for backup in listed(layout) if is_sound(backup.path)), None)


def open_catalog(layout: Layout) -> Catalog:
    """Open the catalog; one of an older schema is backed up first.

    :raise CorruptError: CATALOG_CORRUPT or CATALOG_LOST, naming the last good backup and the way
        back to it.
    :raise StrataboxError: as `Catalog` and `make`.
    """
    try:
        if not layout.catalog.exists():
            require_new(layout)  # before a file is made

        def backup(schema: int) -> None:
            if schema == 0:
                return require_new(layout)
            made = make(layout, f"schema-{schema}")
            log.info("the catalog of schema %d is kept: %s", schema, made.path if made else "")
            return None

        return Catalog(layout.catalog, before_migration=backup)
    except CorruptError as error:
        raise with_way_back(error, layout) from error


def require_new(layout: Layout) -> None:
    """Make no new catalog where there must be an old one.

    :raise CorruptError: CATALOG_LOST.
    """
    layers = sum(1 for _ in layout.layers.iterdir())
    if layers:
        raise CorruptError(
            f"the catalog {layout.catalog} is gone or empty, but {layout.layers} holds {layers}"
            " files",
            reason="CATALOG_LOST",
        )


def with_way_back(error: CorruptError, layout: Layout) -> CorruptError:
    """The same error, saying what can be done about it."""
    if error.reason not in ("CATALOG_CORRUPT", "CATALOG_LOST"):
        return error
    backup = newest_sound(layout)
    if backup is None:
        way = (
            "there is no good backup of it: put back one of your own, or move the state folder"
            f" {layout.root} away to begin anew"
        )
    else:
        way = (
            f"its last good backup is of {backup.taken_at:%Y-%m-%d %H:%M:%S} UTC"
            f" ({backup.path.name}): 'strataboxd catalog restore' puts it back, and keeps what is"
            " there now aside"
        )
    return CorruptError(f"{error.message}; {way}", reason=error.reason, **error.metadata)


def choose(layout: Layout, name: str | None) -> Backup:
    """The backup of that name; None: the newest that is good.

    :raise NotFoundError: BACKUP_NOT_FOUND, naming those that there are.
    """
    if name is None:
        found = newest_sound(layout)
        if found is None:
            raise NotFoundError(
                f"there is no good backup of the catalog in {layout.backups}",
                reason="BACKUP_NOT_FOUND",
            )
        return found
    every = listed(layout)
    for backup in every:
        if name in (backup.path.name, str(backup.path)):
            return backup
    raise NotFoundError(
        f"there is no backup {name!r} in {layout.backups};"
        f" there are: {', '.join(each.path.name for each in every) or 'none'}",
        reason="BACKUP_NOT_FOUND",
    )


def restore(layout: Layout, backup: Backup) -> Path | None:
    """Put a backup in the catalog's place; the caller holds the state folder's lock.

    Killed in the middle, there may be no catalog: a daemon refuses that, and the same again helps.

    :return: where the catalog that was there is kept now; None: there was none.
    :raise CorruptError: CATALOG_CORRUPT, when the backup is damaged; nothing was changed.
    :raise NoSpaceError: NO_SPACE; nothing was changed.
    """
    _require_sound(backup.path)
    staged = layout.catalog.with_name("catalog.db.restoring")
    with durable.naming_a_full_disk():
        try:
            shutil.copyfile(backup.path, staged)
            staged.chmod(0o600)
            with _opened(staged, "mode=rw") as writing:
                writing.execute(f"PRAGMA application_id = {RESTORED}")
            durable.sync_file(staged)
        except (OSError, StrataboxError):
            staged.unlink(missing_ok=True)
            raise
        # The log goes with the database that it belongs to, and first: with another one it would be
        # taken for that one's.
        names = [*(f"{layout.catalog.name}{end}" for end in _BESIDE), layout.catalog.name]
        there = [name for name in names if (layout.root / name).exists()]
        aside = new_folder(layout) if there else None
        for name in there:
            assert aside is not None
            (layout.root / name).rename(aside / name)
        if aside is not None:
            durable.sync_folder(aside)
        hit("restore-catalog.moved")
        durable.sync_folder(layout.root)
        staged.rename(layout.catalog)
        durable.sync_folder(layout.root)
    hit("restore-catalog.placed")
    return aside


def _copy(source: Path, target: Path) -> None:
    with _opened(source, "mode=ro") as reading, _opened(target, "mode=rw") as writing:
        reading.backup(writing)
        # A file that stands for itself, without a log beside it.
        writing.execute("PRAGMA journal_mode = DELETE")


def _require_sound(path: Path) -> None:
    """:raise CorruptError: CATALOG_CORRUPT."""
    # Immutable: nothing is made beside it.
    with _opened(path, "immutable=1") as reading:
        (verdict,) = reading.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict == "ok":
            (count,) = reading.execute("SELECT count(*) FROM store").fetchone()
            verdict = "ok" if count == 1 else "it does not say whose it is"
    if verdict != "ok":
        raise CorruptError(f"{path} is damaged ({verdict})", reason="CATALOG_CORRUPT")


@contextlib.contextmanager
def _opened(path: Path, options: str) -> Iterator[sqlite3.Connection]:
    """A connection of its own; SQLite's errors leave as ours."""
    try:
        name = f"{path.absolute().as_uri()}?{options}"
        connection = sqlite3.connect(name, uri=True, isolation_level=None, timeout=10)
        with contextlib.closing(connection):
            yield connection
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise FailedError(f"{path}: {error}", reason="BACKUP_FAILED") from error
    except sqlite3.DatabaseError as error:
        raise CorruptError(f"{path} is damaged ({error})", reason="CATALOG_CORRUPT") from error


def _same(one: Path, other: Path) -> bool:
    """Whether two databases hold the same pages."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        beginnings = bytearray(first.read(100)), bytearray(second.read(100))
        for beginning in beginnings:
            for counter in _COUNTERS:
                beginning[counter] = bytes(counter.stop - counter.start)
        if beginnings[0] != beginnings[1]:
            return False
        while portion := first.read(_PORTION):
            if portion != second.read(_PORTION):
                return False
    return True
