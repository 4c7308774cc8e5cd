"""Secrets of the daemon's own, by which it knows again what it gave out."""

from __future__ import annotations

import secrets as randomness

from stratabox.storage.catalog.database import Transaction

SESSIONS = "session credentials"
"""Signs the credentials of Tenki's data plane."""

_BYTES = 32


def get(tx: Transaction, name: str) -> bytes:
    """The secret of that name; made when it is asked for the first time."""
    row = tx.row("SELECT value FROM secrets WHERE name = ?", (name,))
    if row is not None:
        return bytes(row["value"])
    made = randomness.token_bytes(_BYTES)
    tx.insert("secrets", {"name": name, "value": made})
    return made
