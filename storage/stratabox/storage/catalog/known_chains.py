"""What sealed layers stand on, remembered from one page of a list to the next.

A sealed layer changes its parent or its size only when a background job puts another in its place.
A trigger counts those changes (`store.chains`), and all that is remembered is forgotten with each.
Whether something goes with a record is never remembered: that changes with every delete.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stratabox.storage.catalog.database import Transaction, json_of

LIMIT = 50_000
"""Layers that are remembered at most; some 12 MB."""


@dataclass(slots=True)
class Node:
    """A layer or a RAM file."""

    id: str
    parent: str | None
    bytes: int
    active: bool


class KnownChains:
    """Finds chains; used by one thread at a time, as transactions are."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._changes = -1
        self._sealed: dict[str, Node] = {}

    def below(self, tx: Transaction, tops: Iterable[str]) -> dict[str, Node]:
        """All layers that some stand on, themselves included; who has no row is left out."""
        self._keep_up(tx)
        found: dict[str, Node] = {}
        level = list(dict.fromkeys(tops))
        while level:
            level = self._walk(level, found)
            rows = tx.rows(_SOME, (json_of(level),)) if level else []
            level = []
            for row in rows:
                node = Node(row["id"], row["parent"], row["bytes"], bool(row["active"]))
                found[node.id] = node
                if not node.active and len(self._sealed) < self._limit:
                    self._sealed[node.id] = node
                if node.parent is not None and node.parent not in found:
                    level.append(node.parent)
        return found

    def _walk(self, level: Iterable[str], found: dict[str, Node]) -> list[str]:
        """Follow what is remembered; returns where it ends."""
        unknown: dict[str, None] = {}
        for top in level:
            id: str | None = top
            while id is not None and id not in found:
                node = self._sealed.get(id)
                if node is None:
                    unknown[id] = None
                    break
                found[id] = node
                id = node.parent
        return list(unknown)

    def _keep_up(self, tx: Transaction) -> None:
        row = tx.row("SELECT chains FROM store")
        assert row is not None
        if row["chains"] != self._changes or len(self._sealed) >= self._limit:
            self._sealed.clear()
            self._changes = row["chains"]


_SOME = """
    SELECT id, parent, bytes, state = 'active' AS active FROM layers
     WHERE id IN (SELECT value FROM json_each(?))
"""
