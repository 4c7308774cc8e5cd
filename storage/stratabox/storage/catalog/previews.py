"""Rows of the previews.

Those that were made by exposing a port are gone with what they lead to; the others lose it when
their sandbox is over (`release`). What time has ended is removed by whoever looks next (`sweep`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from stratabox.storage.catalog.database import Row, Transaction, text_of, time_of
from stratabox.storage.model.errors import AlreadyExistsError, NotFoundError
from stratabox.storage.model.ids import PreviewId, SandboxId
from stratabox.storage.model.previews import Preview


def insert(tx: Transaction, preview: Preview) -> None:
    """Add one. :raise AlreadyExistsError: PREVIEW_ALREADY_EXISTS, for its slug."""
    if find_slug(tx, preview.slug) is not None:
        raise AlreadyExistsError(
            # Not the slug itself: Tenki's clients look for words in this.
            "another preview has that slug: choose another one",
            reason="PREVIEW_ALREADY_EXISTS",
            slug=preview.slug,
        )
    tx.insert(
        "previews",
        {
            "id": preview.id,
            "workspace": preview.workspace,
            "slug": preview.slug,
            "token": preview.token,
            "exposed": preview.exposed,
            "sandbox": preview.sandbox,
            "port": preview.port,
            "expires_at": text_of(preview.expires_at),
            "created_at": text_of(preview.created_at),
            "updated_at": text_of(preview.updated_at),
            "accessed_at": text_of(preview.accessed_at),
        },
    )


def get(tx: Transaction, preview: str) -> Preview:
    """One that the caller may see. :raise NotFoundError: PREVIEW_NOT_FOUND."""
    row = tx.row("SELECT * FROM previews WHERE id = ?", (preview,))
    if row is None or not tx.sees(row["workspace"]):
        raise missing(preview)
    return _preview(row)


def find_slug(tx: Transaction, slug: str) -> Preview | None:
    """The one with that name in the caller's workspace, if there is one."""
    row = tx.row("SELECT * FROM previews WHERE workspace = ? AND slug = ?", (tx.home, slug))
    return None if row is None else _preview(row)


def find_token(tx: Transaction, token: str) -> Preview | None:
    """The one with that token, of whatever workspace, if there is one."""
    row = tx.row("SELECT * FROM previews WHERE token = ?", (token,))
    return None if row is None else _preview(row)


def of_sandbox(tx: Transaction, sandbox: SandboxId) -> list[Preview]:
    """Those that are bound to a sandbox, by port and age."""
    rows = tx.rows(
        "SELECT * FROM previews WHERE sandbox = ? ORDER BY port, created_at, id", (sandbox,)
    )
    return [_preview(row) for row in rows]


def page(
    tx: Transaction,
    *,
    size: int,
    after: tuple[str, str] | None = None,
    sandbox: SandboxId | None = None,
) -> list[Preview]:
    """Some that the caller may see, newest first.

    :param after: age and id of the last one of the page before.
    :param sandbox: only those that are bound to it.
    """
    age, last = after or ("", "")
    rows = tx.rows(
        "SELECT * FROM previews WHERE (:workspace IS NULL OR workspace = :workspace)"
        " AND (:age = '' OR (created_at, id) < (:age, :last))"
        " AND (:sandbox IS NULL OR sandbox = :sandbox)"
        " ORDER BY created_at DESC, id DESC LIMIT :size",
        {"workspace": tx.workspace, "age": age, "last": last, "sandbox": sandbox, "size": size},
    )
    return [_preview(row) for row in rows]


def count(tx: Transaction) -> int:
    """How many the caller's workspace has."""
    row = tx.row("SELECT count(*) AS n FROM previews WHERE workspace = ?", (tx.home,))
    assert row is not None
    return int(row["n"])


def change(tx: Transaction, preview: Preview, **changes: Any) -> Preview:
    """Change one; sandbox, port and expires_at can be."""
    columns = {
        key: text_of(value) if isinstance(value, datetime) else value
        for key, value in changes.items()
    }
    tx.update("previews", preview.id, {**columns, "updated_at": text_of(tx.now)})
    return get(tx, preview.id)


def note_access(tx: Transaction, preview: PreviewId) -> None:
    """Write down that somebody looks at it."""
    tx.update("previews", preview, {"accessed_at": text_of(tx.now)})


def delete(tx: Transaction, preview: PreviewId) -> None:
    """Remove one."""
    tx.execute("DELETE FROM previews WHERE id = ?", (preview,))


def release(tx: Transaction, sandbox: SandboxId) -> None:
    """A sandbox is over: nothing leads to it any more."""
    tx.execute("DELETE FROM previews WHERE sandbox = ? AND exposed", (sandbox,))
    tx.execute("UPDATE previews SET sandbox = NULL, port = NULL WHERE sandbox = ?", (sandbox,))


def sweep(tx: Transaction) -> None:
    """Remove what was exposed and is over."""
    tx.execute(
        "DELETE FROM previews WHERE exposed AND (sandbox IS NULL OR expires_at <= ?)",
        (text_of(tx.now),),
    )


def missing(preview: str) -> NotFoundError:
    """The error of one that is not there."""
    return NotFoundError(
        "there is no such preview: list them", reason="PREVIEW_NOT_FOUND", preview=preview
    )


def _preview(row: Row) -> Preview:
    return Preview(
        id=PreviewId(row["id"]),
        workspace=row["workspace"],
        slug=row["slug"],
        token=row["token"],
        exposed=bool(row["exposed"]),
        sandbox=None if row["sandbox"] is None else SandboxId(row["sandbox"]),
        port=row["port"],
        expires_at=time_of(row["expires_at"]),
        created_at=datetime.fromisoformat(row["created_at"]),
        updated_at=datetime.fromisoformat(row["updated_at"]),
        accessed_at=time_of(row["accessed_at"]),
    )
