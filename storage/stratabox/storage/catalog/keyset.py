"""Pages of rows in a chosen order; nothing is shown twice when rows come or go."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stratabox.storage.catalog.database import Row, Transaction
from stratabox.storage.catalog.lookup import DEFAULT_PAGE, LARGEST_PAGE, Page, own
from stratabox.storage.model.errors import InvalidArgumentError

_TOKEN_LENGTH = 4096


@dataclass(frozen=True)
class By:
    """One thing to sort by."""

    expression: str
    """SQL, ours; never NULL."""
    descending: bool = False


def list_page(
    tx: Transaction,
    table: str,
    page: Page,
    conditions: Sequence[str],
    values: Mapping[str, Any],
    order: Sequence[By],
) -> tuple[list[Row], str]:
    """One page of rows that fit all `conditions`, and the next page's token ("" on the last).

    :param order: rows that are alike in all of it come by their ids.
    :raise InvalidArgumentError: for a page size out of range, or a token that is not of this list.
    """
    if not 0 <= page.size <= LARGEST_PAGE:
        raise InvalidArgumentError(f"page_size {page.size} is not within 0-{LARGEST_PAGE}")
    size = page.size or DEFAULT_PAGE
    order = [*order, By(f"{table}.id", descending=order[-1].descending)]
    where, bound = [own(tx, table), *conditions], {**values, "workspace": tx.workspace}
    if page.token:
        where.append(_after(order, _parse(page.token, order), bound))
    sorted_by = ", ".join(f"{by.expression}{' DESC' if by.descending else ''}" for by in order)
    keys = ", ".join(f"{by.expression} AS _key{number}" for number, by in enumerate(order))
    rows = tx.rows(
        f"SELECT {table}.*, {keys} FROM {table} WHERE {' AND '.join(where)}"
        f" ORDER BY {sorted_by} LIMIT {size + 1}",
        bound,
    )
    if len(rows) <= size:
        return rows, ""
    last = rows[size - 1]
    return rows[:size], _token([last[f"_key{number}"] for number in range(len(order))], order)


def _after(order: Sequence[By], keys: Sequence[Any], bound: dict[str, Any]) -> str:
    """The condition that a row comes behind one with those keys."""
    either = []
    for number, by in enumerate(order):
        bound[f"_key{number}"] = keys[number]
        same = [f"{order[each].expression} = :_key{each}" for each in range(number)]
        behind = f"{by.expression} {'<' if by.descending else '>'} :_key{number}"
        either.append(f"({' AND '.join([*same, behind])})")
    return f"({' OR '.join(either)})"


def _name(order: Sequence[By]) -> str:
    return ",".join(f"{by.expression}{'-' if by.descending else '+'}" for by in order)


def _token(keys: Sequence[Any], order: Sequence[By]) -> str:
    text = json.dumps([_name(order), *keys], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode()


def _parse(token: str, order: Sequence[By]) -> list[Any]:
    try:
        if len(token) > _TOKEN_LENGTH:
            raise ValueError
        name, *keys = json.loads(base64.urlsafe_b64decode(token.encode()).decode())
        kinds = {type(key) for key in keys}
        if name != _name(order) or len(keys) != len(order) or not kinds <= {str, int, float}:
            raise ValueError
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(
            "page_token is not one that this daemon gave out for this list", field="page_token"
        ) from error
    return list(keys)
