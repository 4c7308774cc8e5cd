"""The catalog's API keys and workspaces, as a running daemon sees them: what was revoked a moment
ago is.

A connection of its own reads them, in the event loop's thread: SQLite tells by a counter in shared
memory (`data_version`) whether anybody, in this process or another, has committed anything since.
If not, a key that is known is not looked up again; else that is one row by its primary key. Readers
of a WAL never wait for writers.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

from stratabox.storage.catalog import keys, workspaces
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.access import ApiKey
from stratabox.storage.model.errors import StrataboxError, UnavailableError

_PATIENCE = 0.02
"""Seconds, at most, for what SQLite must do alone: almost never."""


class Keyring:
    """Keys by their ids. Close it."""

    def __init__(self, catalog: Path) -> None:
        """Open the catalog, which is there and of this schema.

        :raise UnavailableError: KEYS_UNAVAILABLE.
        """
        try:
            self._connection = sqlite3.connect(
                f"{catalog.absolute().as_uri()}?mode=ro",
                uri=True,
                isolation_level=None,
                timeout=_PATIENCE,
                check_same_thread=False,
            )
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        self._connection.row_factory = sqlite3.Row
        self._version: int | None = None
        self._known: dict[str, ApiKey] = {}
        self._workspaces: frozenset[str] | None = None

    def find(self, key: str) -> ApiKey | None:
        """The key with that id as it is now, revoked or not.

        :raise UnavailableError: KEYS_UNAVAILABLE, when the catalog cannot be read.
        """
        try:
            self._look()
            if (known := self._known.get(key)) is None:
                known = keys.find(self._now(), key)
                if known is not None:  # who guesses ids fills no memory
                    self._known[key] = known
        except (sqlite3.Error, StrataboxError) as error:
            raise _unavailable(error) from error
        return known

    def has_workspace(self, name: str) -> bool:
        """Whether there is a workspace with that name now.

        :raise UnavailableError: KEYS_UNAVAILABLE, when the catalog cannot be read.
        """
        try:
            self._look()
            if self._workspaces is None:
                everything = workspaces.everything(self._now())
                self._workspaces = frozenset(each.name for each in everything)
        except (sqlite3.Error, StrataboxError) as error:
            raise _unavailable(error) from error
        return name in self._workspaces

    def workspace_of(self, sandbox: str) -> str | None:
        """Whose a sandbox is; None where there is none.

        :raise UnavailableError: KEYS_UNAVAILABLE, when the catalog cannot be read.
        """
        query = "SELECT workspace FROM sandboxes WHERE id = ?"
        try:
            row = self._connection.execute(query, (sandbox,)).fetchone()
        except sqlite3.Error as error:
            raise _unavailable(error) from error
        return None if row is None else str(row["workspace"])

    def has_good(self) -> bool:
        """Whether there is any key that opens something.

        :raise UnavailableError: KEYS_UNAVAILABLE.
        """
        try:
            tx = self._now()
            return any(key.is_good(tx.now) for key in keys.everything(tx))
        except sqlite3.Error as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Let go of the catalog."""
        self._connection.close()

    def _look(self) -> None:
        """Forget what is known, if anybody has committed anything since."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._known.clear()
            self._workspaces = None
            self._version = version

    def _now(self) -> Transaction:
        return Transaction(self._connection, datetime.now(UTC))


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"API keys cannot be read: {error}; nobody is let in by one", reason="KEYS_UNAVAILABLE"
    )
