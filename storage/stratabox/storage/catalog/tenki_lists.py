"""Sandboxes and volumes as Tenki lists them: by its states, searched, sorted, and counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from stratabox.storage.catalog import keyset, lookup, sandboxes, volumes
from stratabox.storage.catalog.database import Transaction, json_of
from stratabox.storage.catalog.keyset import By
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox, Volume

_PAUSED_AT = "(SELECT paused_at FROM tenki_sessions WHERE sandbox = sandboxes.id)"
_STATE = f"""
    CASE sandboxes.state
        WHEN 'running' THEN CASE
            WHEN id IN (SELECT value FROM json_each(:pausing)) THEN 'PAUSING'
            WHEN ready OR ready_at IS NOT NULL THEN 'RUNNING'
            WHEN {_PAUSED_AT} IS NOT NULL THEN 'RESUMING'
            ELSE 'CREATING' END
        WHEN 'stopped' THEN 'USER_SHUTDOWN'
        WHEN 'failed' THEN 'TERMINATED'
        ELSE upper(sandboxes.state) END
"""
"""Tenki's name of a sandbox's state, as ``tenki.convert`` has it."""

_RANKS = """
    CASE sandboxes.state WHEN 'creating' THEN 0 WHEN 'running' THEN 1 WHEN 'paused' THEN 2
        WHEN 'stopped' THEN 3 ELSE 4 END
"""
_STORED = (
    "(SELECT coalesce(sum(layer_bytes), 0) FROM snapshots WHERE source_sandbox = sandboxes.id)"
)

SESSIONS_BY = {
    "NAME": "sandboxes.name",
    "STATE": _RANKS,
    "CREATED_AT": "sandboxes.created_at",
    "CPU_CORES": "sandboxes.cpus",
    "MEMORY_MB": "sandboxes.memory",
    "DISK_SIZE_GB": "sandboxes.storage",
    "EXPIRATION": "coalesce(sandboxes.expires_at, '9999')",
    "SNAPSHOT_STORAGE": _STORED,
}
VOLUMES_BY = {
    "NAME": "volumes.name",
    "STATE": "volumes.state",
    "SIZE_BYTES": "volumes.size",
    "CREATED_AT": "volumes.created_at",
}
NEWEST = (By("sandboxes.created_at", descending=True),)
ACTIVE_FIRST = (By(_RANKS), *NEWEST)


@dataclass(frozen=True, kw_only=True)
class SessionFilter:
    """Which sessions; everything given must fit."""

    states: Sequence[str] = ()
    """Tenki's names; none: all but those that are over."""
    tags: Sequence[str] = ()
    sticky: bool | None = None
    search: str = ""
    """In its name, or the start of its id."""
    min_cpus: int = 0
    min_memory: int = 0
    min_storage: int = 0
    include_terminated: bool = False
    pausing: Collection[SandboxId] = ()
    """Those whose pause is under way."""


@dataclass(frozen=True, kw_only=True)
class SessionFacets:
    """What there is among the sessions that fit."""

    states: dict[str, int]
    cpus: list[int]
    memory: list[int]
    storage: list[int]


def sessions(
    tx: Transaction, wanted: SessionFilter, page: lookup.Page, order: Sequence[By] = NEWEST
) -> tuple[list[Sandbox], str]:
    """One page, and the next one's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    conditions, values = _of_sessions(wanted)
    rows, token = keyset.list_page(tx, "sandboxes", page, conditions, values, order)
    return [sandboxes.get(tx, SandboxId(row["id"])) for row in rows], token


def session_facets(tx: Transaction, wanted: SessionFilter) -> SessionFacets:
    """What there is among all that fit."""
    conditions, values = _of_sessions(wanted)
    conditions.append(lookup.own(tx, "sandboxes"))
    values["workspace"] = tx.workspace
    rows = tx.rows(
        f"SELECT {_STATE} AS state, cpus, memory, storage, count(*) AS number FROM sandboxes"
        f" WHERE {' AND '.join(conditions)} GROUP BY 1, 2, 3, 4",
        values,
    )
    states: dict[str, int] = {}
    for row in rows:
        states[row["state"]] = states.get(row["state"], 0) + row["number"]
    return SessionFacets(
        states=states,
        cpus=sorted({row["cpus"] for row in rows}),
        memory=sorted({row["memory"] for row in rows}),
        storage=sorted({row["storage"] for row in rows}),
    )


@dataclass(frozen=True, kw_only=True)
class VolumeFilter:
    """Which volumes; everything given must fit."""

    states: Sequence[str] = ()
    """Tenki's names; none: all."""
    search: str = ""


_VOLUME_STATE = """
    CASE WHEN volumes.state = 'deleting' THEN 'DELETING'
         WHEN volumes.state = 'creating' THEN 'UNSPECIFIED'
         WHEN EXISTS (SELECT 1 FROM attachments WHERE volume = volumes.id) THEN 'IN_USE'
         ELSE 'AVAILABLE' END
"""


def volumes_page(
    tx: Transaction, wanted: VolumeFilter, page: lookup.Page, order: Sequence[By]
) -> tuple[list[Volume], str]:
    """One page, and the next one's token ("" on the last).

    :raise InvalidArgumentError: for a page that cannot be.
    """
    conditions, values = _of_volumes(wanted)
    rows, token = keyset.list_page(tx, "volumes", page, conditions, values, order)
    return [volumes.get(tx, row["id"]) for row in rows], token


def volume_states(tx: Transaction, wanted: VolumeFilter) -> dict[str, int]:
    """How many of those that fit are in which of Tenki's states."""
    conditions, values = _of_volumes(wanted)
    conditions.append(lookup.own(tx, "volumes"))
    values["workspace"] = tx.workspace
    rows = tx.rows(
        f"SELECT {_VOLUME_STATE} AS state, count(*) AS number FROM volumes"
        f" WHERE {' AND '.join(conditions)} GROUP BY 1",
        values,
    )
    return {row["state"]: row["number"] for row in rows}


def _of_sessions(wanted: SessionFilter) -> tuple[list[str], dict[str, Any]]:
    values: dict[str, Any] = {
        "pausing": json_of(list(wanted.pausing)),
        "cpus": wanted.min_cpus,
        "memory": wanted.min_memory,
        "storage": wanted.min_storage,
    }
    conditions = ["cpus >= :cpus", "memory >= :memory", "storage >= :storage", ":pausing != ''"]
    if wanted.states:
        values["states"] = json_of(list(wanted.states))
        conditions.append(f"{_STATE} IN (SELECT value FROM json_each(:states))")
    elif not wanted.include_terminated:
        conditions.append("sandboxes.state NOT IN ('terminated', 'failed')")
    for number, tag in enumerate(wanted.tags):
        values[f"tag{number}"] = tag
        conditions.append(f"EXISTS (SELECT 1 FROM json_each(tags) WHERE value = :tag{number})")
    if wanted.sticky is not None:
        values["sticky"] = wanted.sticky
        conditions.append(
            "coalesce((SELECT sticky FROM tenki_sessions WHERE sandbox = sandboxes.id), 0)"
            " = :sticky"
        )
    _search("sandboxes", wanted.search, conditions, values)
    return conditions, values


def _of_volumes(wanted: VolumeFilter) -> tuple[list[str], dict[str, Any]]:
    values: dict[str, Any] = {}
    conditions: list[str] = []
    if wanted.states:
        values["states"] = json_of(list(wanted.states))
        conditions.append(f"{_VOLUME_STATE} IN (SELECT value FROM json_each(:states))")
    _search("volumes", wanted.search, conditions, values)
    return conditions, values


def _search(table: str, text: str, conditions: list[str], values: dict[str, Any]) -> None:
    if text:
        values["search"] = text
        conditions.append(
            f"(instr(lower({table}.name), lower(:search)) OR instr({table}.id, :search) = 1)"
        )
