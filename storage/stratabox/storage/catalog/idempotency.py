"""Rows of idempotency keys: the same key again gives the same thing.

Keys are of the workspace that the transaction is for: another's are not known.
"""

from __future__ import annotations

import json
from datetime import timedelta

from stratabox.storage.catalog.database import Transaction, json_of, text_of
from stratabox.storage.model.errors import InvalidArgumentError


def recall(tx: Transaction, key: str, method: str, request: str) -> dict[str, str] | None:
    """What the key made before, or None for a new key.

    :raise InvalidArgumentError: IDEMPOTENCY_MISMATCH, when it was used for another request.
    """
    row = tx.row("SELECT * FROM idempotency WHERE workspace = ? AND key = ?", (tx.home, key))
    if row is None:
        return None
    if (row["method"], row["request"]) != (method, request):
        raise InvalidArgumentError(
            f"idempotency key {key!r} was used for another request ({row['method']}):"
            " use a new key for a new request",
            reason="IDEMPOTENCY_MISMATCH",
            idempotency_key=key,
        )
    outcome: dict[str, str] = json.loads(row["outcome"])
    return outcome


def remember(tx: Transaction, key: str, method: str, request: str, outcome: dict[str, str]) -> None:
    """Bind the key to what it makes; in the transaction that makes it."""
    tx.insert(
        "idempotency",
        {
            "workspace": tx.home,
            "key": key,
            "method": method,
            "request": request,
            "outcome": json_of(outcome),
            "created_at": text_of(tx.now),
        },
    )


def forget(tx: Transaction, key: str) -> None:
    """Free the key: what it was to make was not made."""
    tx.execute("DELETE FROM idempotency WHERE workspace = ? AND key = ?", (tx.home, key))


def forget_outcome(tx: Transaction, kind: str, made: str) -> None:
    """Free the keys whose making of `made` was undone."""
    tx.execute("DELETE FROM idempotency WHERE json_extract(outcome, '$.' || ?) = ?", (kind, made))


def expire(tx: Transaction, age: timedelta) -> None:
    """Free the keys that are older than `age`."""
    tx.execute("DELETE FROM idempotency WHERE created_at < ?", (text_of(tx.now - age),))
