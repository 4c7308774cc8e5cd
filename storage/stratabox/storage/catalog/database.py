"""The catalog: one SQLite database that is the truth about records.

WAL with ``synchronous=FULL``: a transaction that has returned survives a power cut. The schema
lies in ``migrations/NNNN_*.sql``; each file is one transaction and its number becomes the
database's ``user_version``. Functions on single tables live in modules of their own
(``sandboxes``, ``snapshots``, …) and take the open :class:`Transaction`, so that they compose.

One connection, used by one thread at a time: the daemon gives every transaction to one worker
thread, so that no fsync holds its event loop.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from stratabox.storage.failpoints import hit
from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    NoSpaceError,
    UnavailableError,
)
from stratabox.storage.model.ids import mint
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE

Row = sqlite3.Row

RESTORED = 0x7265_7374
"""The database's application_id from when it was restored until a daemon has settled that."""


@dataclass(frozen=True)
class Transaction:
    """An open transaction. `now` is its one timestamp."""

    connection: sqlite3.Connection
    now: datetime
    workspace: str | None = None
    """Whose things callers' words can find in it (`lookup`); None: everybody's."""
    noted: list[tuple[str, str, object]] = field(default_factory=list)
    """What became another, for whoever tells of it once that is durable: "created", "updated" or
    "deleted", whose it is, and the record after it, or before it when deleted."""

    def sees(self, workspace: str) -> bool:
        """Whether whom it is for may know of what is that workspace's."""
        return self.workspace in (None, workspace)

    @property
    def home(self) -> str:
        """The workspace that what is made in it belongs to, where that does not come of another
        thing.
        """
        return self.workspace or DEFAULT_WORKSPACE

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> None:
        """Run one statement whose result does not matter."""
        self.connection.execute(sql, parameters)

    def rows(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Row]:
        """Run one query and return all its rows."""
        return self.connection.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Row | None:
        """Run one query that has at most one row."""
        found = self.rows(sql, parameters)
        if len(found) > 1:
            raise CorruptError(
                f"{len(found)} rows where at most one can be", reason="CATALOG_CORRUPT"
            )
        return found[0] if found else None

    def insert(self, table: str, values: Mapping[str, Any]) -> None:
        """Insert one row; `table` and the keys are ours, never a caller's."""
        columns = ", ".join(values)
        marks = ", ".join(f":{key}" for key in values)
        self.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", values)

    def update(self, table: str, key: str, values: Mapping[str, Any]) -> None:
        """Change one row by its id; `table` and the keys are ours, never a caller's."""
        changes = ", ".join(f"{column} = :{column}" for column in values)
        self.execute(f"UPDATE {table} SET {changes} WHERE id = :_id", {**values, "_id": key})

    def next_generation(self) -> int:
        """A number higher than any record has."""
        self.execute("UPDATE store SET generation = generation + 1")
        row = self.row("SELECT generation FROM store")
        assert row is not None
        return int(row["generation"])


class Catalog:
    """The open database."""

    def __init__(
        self,
        path: Path,
        before_migration: Callable[[int], None] = lambda schema: None,
        *,
        joining: bool = False,
    ) -> None:
        """Open or make it, and bring its schema up to date.

        :param joining: a daemon may have it open: it must be there, of this schema, and is not
            examined.

        :param before_migration: called with the old schema's number before that is changed, 0 for a
            database that is empty; what it raises leaves the file as it was.
        :raise CorruptError: CATALOG_CORRUPT, when it is not a sound database.
        :raise DeniedError: CATALOG_TOO_NEW, when a newer Stratabox wrote it; CATALOG_TOO_OLD, when
            joining, of an older schema, or where there is none.
        :raise NoSpaceError: when the disk is full.
        """
        self._path = path
        self._joining = joining
        self._before_migration = before_migration
        with self._translated():
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'rw' if joining else 'rwc'}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=10,
            )
        try:
            self.store_id = self._open()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close it; the WAL is folded in."""
        self._connection.close()

    @property
    def changes(self) -> int:
        """How many rows were changed since it was opened. From any thread."""
        return self._connection.total_changes

    @property
    def was_restored(self) -> bool:
        """It is a backup that was put back, and nobody has settled what that means."""
        with self._translated():
            (mark,) = self._connection.execute("PRAGMA application_id").fetchone()
        return bool(mark == RESTORED)

    def note_settled(self) -> None:
        """What it meant that it was restored has been settled."""
        with self._translated():
            self._connection.execute("PRAGMA application_id = 0")

    def _open(self) -> str:
        with self._translated():
            self._connection.row_factory = sqlite3.Row
            self._path.chmod(0o600)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate()
            # Files that no row names are removed: a damaged row must not pass for a missing one.
            check = "SELECT 'ok'" if self._joining else "PRAGMA quick_check(1)"
            (verdict,) = self._connection.execute(check).fetchone()
        if verdict != "ok":
            raise CorruptError(
                f"the catalog {self._path} is damaged ({verdict.splitlines()[-1]})",
                reason="CATALOG_CORRUPT",
            )
        with self.transaction() as tx:
            row = tx.row("SELECT id FROM store")
        if row is None:
            raise CorruptError(
                f"the catalog {self._path} does not say whose it is", reason="CATALOG_CORRUPT"
            )
        return str(row["id"])

    @contextmanager
    def transaction(self, workspace: str | None = None) -> Iterator[Transaction]:
        """Open a transaction: committed and durable at the end, rolled back when it raises.

        :param workspace: of ``Transaction``.
        """
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            before = self._connection.total_changes
            try:
                yield Transaction(self._connection, datetime.now(UTC), workspace)
                changed = self._connection.total_changes != before
                if changed:
                    self._about_to_commit()
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        if changed:
            hit("catalog.committed")

    @contextmanager
    def looking(self) -> Iterator[Transaction]:
        """Look at all as it is now, without holding up who writes: for what takes long.

        On a connection of its own, from any thread. Nothing can be changed through it.
        """
        with self._translated():
            address = f"{self._path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(address, uri=True, isolation_level=None, timeout=10)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("BEGIN")
                yield Transaction(connection, datetime.now(UTC))
            finally:
                connection.close()

    def _about_to_commit(self) -> None:
        """What a test wants of it, told as SQLite's own failure would be."""
        try:
            hit("catalog.commit")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise NoSpaceError(f"no space left for the catalog {self._path}") from error
            raise UnavailableError(
                f"the catalog {self._path} cannot be used: {error}", reason="CATALOG_UNAVAILABLE"
            ) from error

    def _migrate(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        files = sorted(
            (entry for entry in resources.files(__package__).joinpath("migrations").iterdir()
             if entry.name.endswith(".sql")),
            key=lambda entry: entry.name,
        )  # fmt: skip
        newest = int(files[-1].name[:4])
        if version > newest:
            raise DeniedError(
                f"{self._path} was written by a newer Stratabox (schema {version}, this one knows"
                f" {newest}): install that version again",
                reason="CATALOG_TOO_NEW",
            )
        if version < newest and self._joining:
            raise DeniedError(
                f"{self._path} was written by an older Stratabox (schema {version}, this one has"
                f" {newest})",
                reason="CATALOG_TOO_OLD",
            )
        if version < newest:
            self._before_migration(version)
        for entry in files:
            number = int(entry.name[:4])
            if number <= version:
                continue
            script = entry.read_text("utf-8")
            extra = (
                f"INSERT INTO store (id, boot_id, generation) VALUES ('{mint()}', '', 0);"
                if number == 1
                else ""
            )
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{script}{extra}PRAGMA user_version = {number};COMMIT;"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE):
                raise NoSpaceError(f"no space left for the catalog {self._path}") from error
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise UnavailableError(
                    f"the catalog {self._path} is locked by another program", reason="CATALOG_BUSY"
                ) from error
            raise UnavailableError(
                f"the catalog {self._path} cannot be used: {error}", reason="CATALOG_UNAVAILABLE"
            ) from error
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            raise CorruptError(
                f"the catalog {self._path} is damaged ({error})", reason="CATALOG_CORRUPT"
            ) from error


def text_of(time: datetime | None) -> str | None:
    """A time as the catalog keeps it: fixed width, so that text order is time order."""
    return None if time is None else time.astimezone(UTC).isoformat(timespec="microseconds")


def time_of(text: str | None) -> datetime | None:
    """A time that may be missing."""
    return None if text is None else datetime.fromisoformat(text)


def json_of(value: Any) -> str:
    """A value as the catalog keeps it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
