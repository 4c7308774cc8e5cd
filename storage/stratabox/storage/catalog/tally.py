"""How many records there are in which state, and what they add up to: for who watches a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.states import JobState, SandboxState, SnapshotState, VolumeState


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What there is now. Each state has its number, also where that is 0."""

    sandboxes: Mapping[str, int]
    snapshots: Mapping[str, int]
    volumes: Mapping[str, int]
    jobs: Mapping[str, int]
    images: int
    memory: int
    """MiB that guests with a process have together."""
    layer_bytes: int
    """In sealed layers."""
    memory_bytes: int
    """In saved memory."""
    depths: Sequence[int]
    """Of the backing chain of each sandbox's disk, layers, the image's and its own included."""


def count(tx: Transaction) -> Tally:
    """Go through all there are; some milliseconds for a thousand sandboxes."""
    return Tally(
        sandboxes=_by_state(tx, "sandboxes", SandboxState),
        snapshots=_by_state(tx, "snapshots", SnapshotState),
        volumes=_by_state(tx, "volumes", VolumeState),
        jobs=_by_state(tx, "jobs", JobState),
        images=_number(tx, "SELECT count(*) AS n FROM images"),
        memory=sum(sandboxes.memory_in_use(tx).values()),
        layer_bytes=_number(tx, "SELECT sum(bytes) AS n FROM layers WHERE state = 'sealed'"),
        memory_bytes=_number(tx, "SELECT sum(bytes) AS n FROM rams"),
        depths=[row["depth"] for row in tx.rows(_DEPTHS)],
    )


_DEPTHS = """
    WITH RECURSIVE chain (id, depth) AS (
        SELECT id, 1 FROM layers WHERE parent IS NULL
        UNION ALL SELECT layers.id, depth + 1 FROM chain JOIN layers ON layers.parent = chain.id
    )
    SELECT depth FROM disks JOIN chain ON chain.id = disks.layer
"""


def _by_state(
    tx: Transaction,
    table: str,
    states: type[SandboxState] | type[SnapshotState] | type[VolumeState] | type[JobState],
) -> dict[str, int]:
    found = {str(state): 0 for state in states}
    for row in tx.rows(f"SELECT state, count(*) AS n FROM {table} GROUP BY state"):
        found[row["state"]] = row["n"]
    return found


def _number(tx: Transaction, query: str) -> int:
    row = tx.row(query)
    return 0 if row is None else int(row["n"] or 0)
