"""``strataboxd key``: API keys, made, listed and revoked by whoever may write the state folder.

Works on the catalog itself, with or without a daemon: one that runs sees each change at its next
call (``access.keyring``). Prints, and returns an exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from stratabox.daemon.access.keys import new_token
from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import Duration
from stratabox.daemon.locking import locked
from stratabox.storage.catalog import keys, workspaces
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files.backups import open_catalog
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.model.access import ApiKey, Role
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE

_LONGEST_NAME = 64
_LIFE = Duration(1, 3660 * 86400)


def add_commands(commands: Any) -> Sequence[argparse.ArgumentParser]:
    """Add ``key`` and its verbs to the command line; returns the parsers of the verbs."""
    verbs = commands.add_parser(
        "key", allow_abbrev=False, help="API keys, which every call on a TCP address takes"
    ).add_subparsers(dest="verb", metavar="COMMAND", required=True)
    create = verbs.add_parser("create", allow_abbrev=False, help="make a key, and show it once")
    create.add_argument("--name", metavar="NAME", help="what it is for; without: its id")
    create.add_argument(
        "--role",
        choices=[str(role) for role in Role],
        default=str(Role.USER),
        help="what it may do (default: user)",
    )
    create.add_argument(
        "--workspace", metavar="NAME", default=DEFAULT_WORKSPACE, help="whose things it opens"
    )
    create.add_argument(
        "--expires",
        metavar="WHEN",
        help="after a span of time, as 90d or 12h, or at an RFC 3339 time; without: never",
    )
    listing = verbs.add_parser("list", allow_abbrev=False, help="print all keys, without secrets")
    listing.add_argument("--all", action="store_true", help="those that are revoked, too")
    revoke = verbs.add_parser(
        "revoke", allow_abbrev=False, help="make keys open nothing, and end their calls under way"
    )
    revoke.add_argument("keys", nargs="+", metavar="KEY", help="a key's id or name")
    return create, listing, revoke


def run(config: Config, arguments: argparse.Namespace, *, as_json: bool) -> int:
    """Do what the command line says.

    :raise StrataboxError: when it cannot be done; nothing was changed then.
    """
    match arguments.verb:
        case "create":
            return _create(config, arguments, as_json=as_json)
        case "list":
            return _list(config, revoked=arguments.all, as_json=as_json)
        case _:
            return _revoke(config, arguments.keys, as_json=as_json)


def _create(config: Config, arguments: argparse.Namespace, *, as_json: bool) -> int:
    token = new_token()
    name = arguments.name or token.id
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise InvalidArgumentError(
            f"a key's name has 1 to {_LONGEST_NAME} printable characters, not {name!r:.100}"
        )
    with _catalog(config) as catalog, catalog.transaction() as tx:
        workspaces.get(tx, arguments.workspace)
        key = ApiKey(
            id=token.id,
            name=name,
            role=Role(arguments.role),
            workspace=arguments.workspace,
            hash=token.hash(),
            created_at=tx.now,
            expires_at=_expiry(arguments.expires, tx.now),
        )
        keys.insert(tx, key)
    if as_json:
        print(json.dumps({"key": token.text(), **_row(key, datetime.now(UTC))}, indent=2))
        return 0
    print(token.text())
    sys.stdout.flush()
    until = f", good until {_moment(key.expires_at)}" if key.expires_at else ""
    print(
        f"key {key.name!r} ({key.id}), role {key.role}{until}; it is shown this once and kept"
        " nowhere: give it to clients as STRATABOX_API_KEY",
        file=sys.stderr,
    )
    return 0


def _list(config: Config, *, revoked: bool, as_json: bool) -> int:
    with _catalog(config) as catalog, catalog.transaction() as tx:
        found = [_row(key, tx.now) for key in keys.everything(tx, revoked=revoked)]
    if as_json:
        print(json.dumps({"keys": found}, indent=2))
        return 0
    columns = ("id", "name", "role", "workspace", "state", "created_at", "expires_at")
    _print_table((*columns, "last_used_at"), found)
    return 0


def _revoke(config: Config, references: Sequence[str], *, as_json: bool) -> int:
    with _catalog(config) as catalog, catalog.transaction() as tx:
        found = [_row(keys.revoke(tx, reference), tx.now) for reference in references]
    if as_json:
        print(json.dumps({"keys": found}, indent=2))
        return 0
    for row in found:
        print(f"revoked key {row['name']} ({row['id']})")
    return 0


@contextmanager
def _catalog(config: Config) -> Iterator[Catalog]:
    """The catalog, beside a daemon if one runs; made, or brought up to date, where none does."""
    layout = Layout(config.state_dir)
    try:
        catalog = _join(layout) or _make(layout)
    except PermissionError as error:
        raise DeniedError(
            f"{layout.root} is not for uid {os.geteuid()}: run this as the user that the daemon"
            " runs as, or with sudo",
            reason="STATE_DIR_DENIED",
            state_dir=layout.root,
        ) from error
    try:
        yield catalog
    finally:
        catalog.close()


def _join(layout: Layout) -> Catalog | None:
    """The catalog as it is; None when it is not there, or of an older schema."""
    if not layout.catalog.exists():
        return None
    if not os.access(layout.catalog, os.W_OK):
        raise PermissionError
    try:
        return Catalog(layout.catalog, joining=True)
    except DeniedError as error:
        if error.reason != "CATALOG_TOO_OLD":
            raise
        return None


def _make(layout: Layout) -> Catalog:
    if layout.root.exists() and layout.root.stat().st_uid != os.geteuid():
        raise PermissionError  # what is made here must be the daemon's
    store = Store(layout)
    with locked(store.layout):
        return open_catalog(store.layout)


def _expiry(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text) if "T" in text.upper() else None
        if at is None:
            return now + timedelta(seconds=_LIFE.parse(text))
        if at.tzinfo is not None and at > now:
            return at
    except ValueError:
        pass
    raise InvalidArgumentError(
        f"--expires {text!r:.60}: a span of time as 90d or 12h ({_LIFE.allowed}), or an RFC 3339"
        " time to come, with its zone"
    )


def _row(key: ApiKey, now: datetime) -> dict[str, str | None]:
    state = "revoked" if key.revoked_at else "expired" if key.is_over(now) else "good"
    return {
        "id": key.id,
        "name": key.name,
        "role": str(key.role),
        "workspace": key.workspace,
        "state": state,
        "created_at": _moment(key.created_at),
        "expires_at": _moment(key.expires_at),
        "revoked_at": _moment(key.revoked_at),
        "last_used_at": _moment(key.last_used_at),
    }


def _moment(at: datetime | None) -> str | None:
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _print_table(columns: Sequence[str], rows: Sequence[dict[str, str | None]]) -> None:
    lines = [[name.removesuffix("_at").upper().replace("_", " ") for name in columns]]
    lines += [[row[name] or "-" for name in columns] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        )
