"""Rows of the forwarded ports, and of the keys that may log in to guests.

They are gone with their sandbox: when its row is, and before, when it is terminated (`release`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from stratabox.storage.catalog import lookup
from stratabox.storage.catalog.database import Row, Transaction, json_of, text_of
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import PortId, SandboxId
from stratabox.storage.model.ports import AuthorizedKey, Direction, Endpoint, Port


def insert(tx: Transaction, port: Port) -> None:
    """Add a port. Whether it may be is the caller's to check."""
    tx.insert(
        "ports",
        {
            "id": port.id,
            "sandbox": port.sandbox,
            "direction": port.direction,
            "host": json_of(asdict(port.host)),
            "guest": json_of(asdict(port.guest)),
            "mode": port.mode,
            "created_at": text_of(port.created_at),
        },
    )


def get(tx: Transaction, port: str) -> Port:
    """One port of whom the transaction is for. :raise NotFoundError: PORT_NOT_FOUND."""
    row = tx.row(
        f"SELECT * FROM ports WHERE id = :id AND {_of_own(tx)}",
        {"id": port, "workspace": tx.workspace},
    )
    if row is None:
        raise NotFoundError(f"there is no port {port!r}", reason="PORT_NOT_FOUND", port=port)
    return _port(row)


def delete(tx: Transaction, port: PortId) -> None:
    """Remove one."""
    tx.execute("DELETE FROM ports WHERE id = ?", (port,))


def of_sandbox(tx: Transaction, sandbox: SandboxId) -> list[Port]:
    """A sandbox's ports, oldest first."""
    rows = tx.rows("SELECT * FROM ports WHERE sandbox = ? ORDER BY created_at, id", (sandbox,))
    return [_port(row) for row in rows]


def everything(tx: Transaction) -> list[Port]:
    """All ports of whom the transaction is for, oldest first."""
    rows = tx.rows(
        f"SELECT * FROM ports WHERE {_of_own(tx)} ORDER BY created_at, id",
        {"workspace": tx.workspace},
    )
    return [_port(row) for row in rows]


def release(tx: Transaction, sandbox: SandboxId) -> None:
    """A sandbox is over: it has no ports any more, and nobody may log in to it."""
    tx.execute("DELETE FROM ports WHERE sandbox = ?", (sandbox,))
    tx.execute("DELETE FROM authorized_keys WHERE sandbox = ?", (sandbox,))


def keys_of(tx: Transaction, sandbox: SandboxId, user: str = "") -> list[AuthorizedKey]:
    """The keys of one user of a sandbox's guest, or of all, by user and as they were given."""
    rows = tx.rows(
        "SELECT * FROM authorized_keys WHERE sandbox = ? AND (? = '' OR user = ?)"
        " ORDER BY user, position",
        (sandbox, user, user),
    )
    return [AuthorizedKey(user=row["user"], key=row["key"]) for row in rows]


def replace_keys(tx: Transaction, sandbox: SandboxId, user: str, keys: Sequence[str]) -> None:
    """Let one user of a sandbox's guest log in by these keys and by no other."""
    tx.execute("DELETE FROM authorized_keys WHERE sandbox = ? AND user = ?", (sandbox, user))
    for position, key in enumerate(keys):
        tx.insert(
            "authorized_keys",
            {"sandbox": sandbox, "user": user, "position": position, "key": key},
        )


def _of_own(tx: Transaction) -> str:
    return f"sandbox IN (SELECT id FROM sandboxes WHERE {lookup.own(tx, 'sandboxes')})"


def _port(row: Row) -> Port:
    return Port(
        id=PortId(row["id"]),
        sandbox=SandboxId(row["sandbox"]),
        direction=Direction(row["direction"]),
        host=Endpoint(**json.loads(row["host"])),
        guest=Endpoint(**json.loads(row["guest"])),
        mode=row["mode"],
        created_at=datetime.fromisoformat(row["created_at"]),
    )
