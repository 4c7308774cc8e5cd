"""Records as JSON for programs, and as tables for people.

JSON: snake_case keys, RFC 3339 times in UTC, enums as words, spans of time as `…_seconds`, null for
what is not there; only ASCII, so that it is the same text in every locale. Tables: whatever came
from a caller or a guest has its control characters escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from stratabox.client.errors import StrataboxError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def jsonable(value: object) -> Any:
    """Turn a record, or anything made of records, into what `json` can write."""
    if is_dataclass(value):
        return dict(_pair(one.name, getattr(value, one.name)) for one in fields(value) if one.repr)
    if isinstance(value, StrataboxError):
        return {"reason": value.reason, "message": value.message, "metadata": value.metadata}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: jsonable(one) for key, one in value.items()}
    if isinstance(value, Iterable):
        return [jsonable(one) for one in value]
    return value


def _pair(name: str, value: object) -> tuple[str, Any]:
    if isinstance(value, timedelta) or name in ("stall", "duration"):
        name = f"{name}_seconds"
    return name, jsonable(value)


def print_json(value: object) -> None:
    """Print a record, or anything made of records, as JSON."""
    click.echo(json.dumps(jsonable(value), indent=2))


def printable(text: str) -> str:
    """Escape what could move a cursor, ring a bell, or turn the text around."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def size(count: int) -> str:
    """Write a number of bytes for people."""
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.0f} {_UNITS[unit]}" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"


def moment(value: datetime | None) -> str:
    """Write a point of time for people; none is "-"."""
    return "-" if value is None else value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in header:
        table.add_column(title, no_wrap=True)
    _fill(table, (map(printable, row) for row in rows))


def print_details(record: object) -> None:
    """Print what one record says, a line for each thing that it does say."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    said = {key: one for key, one in jsonable(record).items() if one not in (None, [], {}, "")}
    _fill(table, ((key, _plain(key, one)) for key, one in said.items()))


def _fill(table: Any, rows: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        table.add_row(*map(Text, row))  # Text: what looks like rich's markup is none
    # As wide as it is: a terminal breaks lines by itself, and an id in pieces is of no use.
    Console(width=10_000, highlight=False).print(table)


def _plain(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(_pairs(value))
    if isinstance(value, list):
        return "\n".join(
            " ".join(_pairs(one)) if isinstance(one, dict) else printable(str(one)) for one in value
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return size(value)
    units = {"memory": " MiB", "storage": " GiB"}
    return f"{printable(str(value))}{units.get(key, '')}"


def _pairs(value: dict[str, Any]) -> list[str]:
    return [f"{printable(key)}={_plain(key, one)}" for key, one in value.items()]
