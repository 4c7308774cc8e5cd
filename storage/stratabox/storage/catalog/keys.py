"""Rows of API keys. The daemon reads them; the command `key` writes them, also beside a daemon."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from stratabox.storage.catalog.database import Row, Transaction, text_of, time_of
from stratabox.storage.model.access import ApiKey, Role
from stratabox.storage.model.errors import AlreadyExistsError, NotFoundError


def insert(tx: Transaction, key: ApiKey) -> None:
    """Add a key.

    :raise AlreadyExistsError: KEY_ALREADY_EXISTS, when one that is not revoked has its name.
    """
    taken = tx.row("SELECT id FROM api_keys WHERE name = ? AND revoked_at IS NULL", (key.name,))
    if taken:
        raise AlreadyExistsError(
            f"there is a key {key.name!r} already: choose another name, or revoke it first",
            reason="KEY_ALREADY_EXISTS",
            key=taken["id"],
        )
    tx.insert(
        "api_keys",
        {
            "id": key.id,
            "name": key.name,
            "role": key.role,
            "workspace": key.workspace,
            "hash": key.hash,
            "created_at": text_of(key.created_at),
            "expires_at": text_of(key.expires_at),
            "revoked_at": text_of(key.revoked_at),
            "last_used_at": text_of(key.last_used_at),
        },
    )


def find(tx: Transaction, key: str) -> ApiKey | None:
    """The key with that id, if there is one, revoked or not."""
    row = tx.row("SELECT * FROM api_keys WHERE id = ?", (key,))
    return None if row is None else _key(row)


def get(tx: Transaction, reference: str) -> ApiKey:
    """The key with that id, or the one that is not revoked with that name.

    :raise NotFoundError: KEY_NOT_FOUND.
    """
    row = tx.row("SELECT * FROM api_keys WHERE id = ?", (reference,)) or tx.row(
        "SELECT * FROM api_keys WHERE name = ? AND revoked_at IS NULL", (reference,)
    )
    if row is None:
        raise NotFoundError(
            f"there is no key {reference!r} that is not revoked already", reason="KEY_NOT_FOUND"
        )
    return _key(row)


def everything(tx: Transaction, *, revoked: bool = False) -> list[ApiKey]:
    """All keys, oldest first.

    :param revoked: those that are, too.
    """
    which = "" if revoked else "WHERE revoked_at IS NULL "
    return [_key(row) for row in tx.rows(f"SELECT * FROM api_keys {which}ORDER BY created_at, id")]


def revoke(tx: Transaction, reference: str) -> ApiKey:
    """Make a key open nothing any more; one that is revoked already stays as it is.

    :raise NotFoundError: KEY_NOT_FOUND.
    """
    key = get(tx, reference)
    if key.revoked_at is None:
        tx.update("api_keys", key.id, {"revoked_at": text_of(tx.now)})
    return get(tx, key.id)


def note_uses(tx: Transaction, uses: Mapping[str, datetime]) -> None:
    """Write down when keys were last used; what is there is never made older."""
    for key, at in uses.items():
        tx.execute(
            "UPDATE api_keys SET last_used_at = :at WHERE id = :id"
            " AND (last_used_at IS NULL OR last_used_at < :at)",
            {"id": key, "at": text_of(at)},
        )


def _key(row: Row) -> ApiKey:
    return ApiKey(
        id=row["id"],
        name=row["name"],
        role=Role(row["role"]),
        workspace=row["workspace"],
        hash=row["hash"],
        created_at=datetime.fromisoformat(row["created_at"]),
        expires_at=time_of(row["expires_at"]),
        revoked_at=time_of(row["revoked_at"]),
        last_used_at=time_of(row["last_used_at"]),
    )
