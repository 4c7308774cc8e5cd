"""The catalog: one SQLite database that is the truth about records.

WAL with ``synchronous=FULL``: a transaction that has returned survives a power cut. The schema
lies in ``migrations/NNNN_*.sql``; each file is one transaction and its number becomes the
database's ``user_version``. Functions on single tables live in modules of their own
(``sandboxes``, ``snapshots``, …) and take the open :class:`Transaction`, so that they compose.

One connection, used by one thread at a time: the daemon gives every transaction to one worker
thread, so that no fsync holds its event loop.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    NoSpaceError,
    UnavailableError,
)
from stratabox.storage.model.ids import mint

Row = sqlite3.Row


@dataclass(frozen=True)
class Transaction:
    """An open transaction. `now` is its one timestamp."""

    connection: sqlite3.Connection
    now: datetime

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

    def __init__(self, path: Path) -> None:
        """Open or make it, and bring its schema up to date.

        :raise CorruptError: CATALOG_CORRUPT, when it is not a sound database.
        :raise DeniedError: CATALOG_TOO_NEW, when a newer Stratabox wrote it.
        :raise NoSpaceError: when the disk is full.
        """
        self._path = path
        with self._translated():
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
        try:
            self.store_id = self._open()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close it; the WAL is folded in."""
        self._connection.close()

    def _open(self) -> str:
        with self._translated():
            self._connection.row_factory = sqlite3.Row
            self._path.chmod(0o600)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._migrate()
            # Files that no row names are removed: a damaged row must not pass for a missing one.
            (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
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
    def transaction(self) -> Iterator[Transaction]:
        """Open a transaction: committed and durable at the end, rolled back when it raises."""
        with self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(self._connection, datetime.now(UTC))
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

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
                raise DeniedError(
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
