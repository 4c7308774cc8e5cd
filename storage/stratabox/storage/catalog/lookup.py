"""Finding records: by id, name or start of an id; and page by page.

The one place where what callers say becomes records. In a transaction that is for one workspace
(``Transaction.workspace``), what is another's is not there: the same statements run, and find
nothing. Whoever already has an id of ours reads by it alone.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stratabox.storage.catalog.database import Row, Transaction
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, NotFoundError
from stratabox.storage.model.ids import is_id, is_id_prefix

OWNED = frozenset({"sandboxes", "snapshots", "volumes", "volume_snapshots", "jobs"})
"""Tables whose rows are each one workspace's, by a column of that name."""
DEFAULT_PAGE = 100
LARGEST_PAGE = 1000


def resolve(tx: Transaction, table: str, noun: str, reference: str, prefer: str = "1") -> str:
    """Turn what a caller wrote into an id.

    An id, else an exact name that only one record has, else the start of one id. Where several
    records share the name, those that satisfy the SQL condition `prefer` come first (a live
    sandbox before a terminated one).

    :raise NotFoundError: NOUN_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME, with the ids in the metadata.
    """
    mine = own(tx, table)
    given = {"reference": reference, "workspace": tx.workspace}
    by_id = f"SELECT id FROM {table} WHERE id = :reference AND {own(tx, table, narrow=True)}"
    if is_id(reference) and tx.row(by_id, given):
        return reference
    if reference:
        for condition in (f"({prefer})", f"NOT ({prefer})"):
            named = tx.rows(
                f"SELECT id FROM {table} WHERE name = :reference AND {mine} AND {condition}"
                " LIMIT 21",
                given,
            )
            if named:
                return _only(named, noun, reference, "are named")
    return resolve_id(tx, table, noun, reference)


def resolve_id(tx: Transaction, table: str, noun: str, reference: str) -> str:
    """Turn an id or the start of one into an id.

    :raise NotFoundError: NOUN_NOT_FOUND.
    :raise DeniedError: AMBIGUOUS_NAME, with the ids in the metadata.
    """
    if is_id_prefix(reference):
        mine = own(tx, table, narrow=True)
        begun = tx.rows(
            f"SELECT id FROM {table} WHERE id >= :begin AND id < :end AND {mine} LIMIT 21",
            {"begin": reference, "end": reference + "~", "workspace": tx.workspace},
        )
        if begun:
            return _only(begun, noun, reference, "have ids that start with")
    raise NotFoundError(
        f"there is no {noun} {reference!r}",
        reason=f"{noun.upper()}_NOT_FOUND".replace(" ", "_"),
        **{noun.replace(" ", "_"): reference},
    )


def _only(rows: Sequence[Row], noun: str, reference: str, how: str) -> str:
    if len(rows) > 1:
        ids = [row["id"] for row in rows]
        raise DeniedError(
            f"{len(ids) if len(ids) <= 20 else 'more than 20'} {noun} records {how} {reference!r}:"
            " use an id",
            reason="AMBIGUOUS_NAME",
            ids=",".join(ids[:20]),
        )
    return str(rows[0]["id"])


def own(tx: Transaction, table: str, *, narrow: bool = False) -> str:
    """The SQL condition that a row is one that may be found; it takes :workspace.

    :param narrow: another condition leaves few rows: SQLite is not to go through the workspace's.
    """
    if tx.workspace is None or table not in OWNED:
        return "1"
    return "+workspace = :workspace" if narrow else "workspace = :workspace"


@dataclass(frozen=True, kw_only=True)
class Page:
    """Which piece of a list is wanted, newest first."""

    size: int = 0
    token: str = ""


FIRST_PAGE = Page()


def list_page(
    tx: Transaction,
    table: str,
    page: Page,
    conditions: Sequence[str],
    values: Mapping[str, Any],
    *,
    narrow: bool = False,
) -> tuple[list[Row], str]:
    """One page of rows that fit all `conditions`, newest first, and the next page's token.

    :param narrow: as of `own`.
    :raise InvalidArgumentError: for a page size out of range or a token that is not ours.
    """
    if not 0 <= page.size <= LARGEST_PAGE:
        raise InvalidArgumentError(f"page_size {page.size} is not within 0-{LARGEST_PAGE}")
    size = page.size or DEFAULT_PAGE
    where = [own(tx, table, narrow=narrow), *conditions]
    bound = {**values, "workspace": tx.workspace}
    if page.token:
        bound["_time"], bound["_id"] = _parse_token(page.token)
        where.append("(created_at, id) < (:_time, :_id)")
    rows = tx.rows(
        f"SELECT * FROM {table} WHERE {' AND '.join(where)}"
        f" ORDER BY created_at DESC, id DESC LIMIT {size + 1}",
        bound,
    )
    if len(rows) <= size:
        return rows, ""
    last = rows[size - 1]
    return rows[:size], _token(last["created_at"], last["id"])


def _token(time: str, row_id: str) -> str:
    return base64.urlsafe_b64encode(f"{time} {row_id}".encode()).decode()


def _parse_token(token: str) -> tuple[str, str]:
    try:
        time, found, row_id = base64.urlsafe_b64decode(token.encode()).decode().partition(" ")
        datetime.fromisoformat(time)
    except (binascii.Error, ValueError) as error:
        raise _bad_token() from error
    if not found or not is_id(row_id) or token != _token(time, row_id):
        raise _bad_token()
    return time, row_id


def _bad_token() -> InvalidArgumentError:
    return InvalidArgumentError(
        "page_token is not one that this daemon gave out", field="page_token"
    )


def entries_condition(column: str, entries: Mapping[str, str], values: dict[str, Any]) -> list[str]:
    """Conditions that a JSON object column holds all of `entries`; their values go in `values`."""
    conditions = []
    for number, (key, value) in enumerate(entries.items()):
        values[f"{column}_k{number}"], values[f"{column}_v{number}"] = key, value
        conditions.append(
            f"EXISTS (SELECT 1 FROM json_each({column})"
            f" WHERE key = :{column}_k{number} AND value = :{column}_v{number})"
        )
    return conditions


def any_of(column: str, options: Sequence[str], values: dict[str, Any]) -> list[str]:
    """The condition that a column is one of `options`; none when there are none."""
    if not options:
        return []
    for number, option in enumerate(options):
        values[f"{column}_{number}"] = option
    marks = ", ".join(f":{column}_{number}" for number in range(len(options)))
    return [f"{column} IN ({marks})"]
