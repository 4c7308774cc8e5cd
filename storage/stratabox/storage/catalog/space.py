"""What records take on the disk, told truthfully: alone, together with others, and what goes.

*logical*: all that its layers and its saved memory hold. *own*: what comes free when it alone is
deleted, once that is swept; so a layer counts only where nobody else names it and all that stands
on it goes with it. *shared*: the rest.

Asked for a page of records at a time: what the page's chains have in common is read once, and who
needs a layer is asked only of those that may go, from the top of each chain down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stratabox.storage.catalog.database import Transaction, json_of
from stratabox.storage.catalog.known_chains import KnownChains, Node
from stratabox.storage.model.ids import LayerId
from stratabox.storage.model.records import Image, Sandbox, Snapshot, Volume, VolumeSnapshot

Taken = Callable[[LayerId], int]
"""Bytes that the file of an active layer takes now: those grow, and the catalog does not know."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Bytes on the host's disk."""

    logical: int = 0
    own: int = 0

    @property
    def shared(self) -> int:
        """What it stands on together with others, and what stays for others."""
        return self.logical - self.own


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one record stands on."""

    id: str
    layers: tuple[LayerId, ...] = ()
    rams: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Goes:
    """What goes with a record, children before parents."""

    layers: tuple[LayerId, ...]
    rams: tuple[str, ...]


def of_snapshots(
    tx: Transaction, records: Sequence[Snapshot], taken: Taken, known: KnownChains | None = None
) -> list[Space]:
    """Of each, in their order."""
    return of(tx, [holding_of(record) for record in records], taken, known)


def of_sandboxes(
    tx: Transaction, records: Sequence[Sandbox], taken: Taken, known: KnownChains | None = None
) -> list[Space]:
    """Of each, in their order. Saved memory that a guest goes on from is its own, too."""
    holdings = []
    for record in records:
        memories = (record.ram_parked, record.ram_origin, record.ram_since)
        disks = tuple(disk.layer for disk in record.disks)
        holdings.append(
            Holding(id=record.id, layers=disks, rams=tuple(ram for ram in memories if ram))
        )
    return of(tx, holdings, taken, known)


def of_images(tx: Transaction, records: Sequence[Image], taken: Taken) -> list[Space]:
    """Of each, in their order: its disk, without the kernel and initrd that it boots with."""
    return of(tx, [_holding_one(record.id, record.layer) for record in records], taken)


def of_volumes(tx: Transaction, records: Sequence[Volume], taken: Taken) -> list[Space]:
    """Of each, in their order."""
    return of(tx, [_holding_one(record.id, record.layer) for record in records], taken)


def of_volume_snapshots(
    tx: Transaction, records: Sequence[VolumeSnapshot], taken: Taken
) -> list[Space]:
    """Of each, in their order."""
    return of(tx, [_holding_one(record.id, record.layer) for record in records], taken)


def holding_of(record: Snapshot) -> Holding:
    """What a snapshot stands on."""
    disks = tuple(disk.layer for disk in record.disks)
    return Holding(id=record.id, layers=disks, rams=(record.id,) if record.ram else ())


def _holding_one(id: str, layer: LayerId | None) -> Holding:
    return Holding(id=id, layers=(layer,) if layer else ())


def of(
    tx: Transaction,
    holdings: Sequence[Holding],
    taken: Taken,
    known: KnownChains | None = None,
) -> list[Space]:
    """Of each, in their order.

    :param known: where chains are remembered, for who asks again and again.
    """
    tops = (layer for each in holdings for layer in each.layers)
    layers = (known or KnownChains()).below(tx, tops)
    memories = _memories_below(tx, (ram for each in holdings for ram in each.rams))
    for node in layers.values():
        if node.active:
            node.bytes = taken(LayerId(node.id))
    goes = _goes(tx, holdings, layers, memories)
    sums: dict[str, int] = {}
    return [
        Space(
            logical=_sum(layers, each.layers, sums) + _sum(memories, each.rams, sums),
            own=sum(layers[layer].bytes for layer in goes[each.id].layers)
            + sum(memories[ram].bytes for ram in goes[each.id].rams),
        )
        for each in holdings
    ]


def goes_with(tx: Transaction, holding: Holding) -> Goes:
    """What goes when one record is deleted."""
    layers = KnownChains().below(tx, holding.layers)
    memories = _memories_below(tx, holding.rams)
    return _goes(tx, [holding], layers, memories)[holding.id]


def users_above(
    tx: Transaction, tops: Iterable[LayerId], limit: int, workspace: str | None = None
) -> list[str]:
    """Ids of records, but for images, whose chains go through one of some layers.

    :param workspace: only its records: others' stand on images, too.

    The nearest first, at most so many: on a layer near an image there can be all there are.
    """
    found: dict[str, None] = {}
    level = list(dict.fromkeys(tops))
    while level and len(found) < limit:
        given = {"ids": json_of(level), "limit": limit + 1, "workspace": workspace}
        rows = tx.rows(_USERS, given)
        found.update((row["id"], None) for row in rows)
        level = [
            LayerId(row["id"])
            for row in tx.rows(
                "SELECT id FROM layers WHERE parent IN (SELECT value FROM json_each(?)) LIMIT ?",
                (json_of(level), limit + 1),
            )
        ]
    return list(found)[:limit]


_RAMS_BELOW = """
    WITH RECURSIVE below (id, parent, bytes) AS (
        SELECT id, parent, bytes FROM rams WHERE id IN (SELECT value FROM json_each(?))
        UNION SELECT rams.id, rams.parent, rams.bytes
                FROM below JOIN rams ON rams.id = below.parent
    )
    SELECT * FROM below
"""
_PAIRS = """
    WITH pairs (owner, id, gone) AS MATERIALIZED (
        SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]')
          FROM json_each(?)
    )
    SELECT owner, id FROM pairs
"""
_FREE_LAYERS = f"""
    {_PAIRS}
     WHERE NOT EXISTS (SELECT 1 FROM disks WHERE layer = pairs.id AND sandbox != owner)
       AND NOT EXISTS (SELECT 1 FROM snapshot_disks WHERE layer = pairs.id AND snapshot != owner)
       AND NOT EXISTS (SELECT 1 FROM images WHERE layer = pairs.id AND images.id != owner)
       AND NOT EXISTS (SELECT 1 FROM volumes WHERE layer = pairs.id AND volumes.id != owner)
       AND NOT EXISTS (SELECT 1 FROM volume_snapshots AS each
                        WHERE layer = pairs.id AND each.id != owner)
       AND NOT EXISTS (SELECT 1 FROM layers WHERE parent = pairs.id AND state != 'garbage'
                          AND layers.id NOT IN (SELECT value FROM json_each(gone)))
"""
_FREE_RAMS = f"""
    {_PAIRS}
     WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE id = pairs.id AND id != owner)
       AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE ram_origin = pairs.id AND id != owner)
       AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE ram_since = pairs.id AND id != owner)
       AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE ram_parked = pairs.id AND id != owner)
       AND NOT EXISTS (SELECT 1 FROM operations
                        WHERE json_extract(payload, '$.ram_base') = pairs.id)
       AND NOT EXISTS (SELECT 1 FROM rams WHERE parent = pairs.id
                          AND rams.id NOT IN (SELECT value FROM json_each(gone)))
"""
_USERS = """
    WITH these AS MATERIALIZED (SELECT value AS id FROM json_each(:ids))
    SELECT sandbox AS id FROM disks JOIN sandboxes ON sandboxes.id = sandbox
     WHERE layer IN these AND workspace = coalesce(:workspace, workspace)
    UNION SELECT snapshot FROM snapshot_disks JOIN snapshots ON snapshots.id = snapshot
     WHERE layer IN these AND workspace = coalesce(:workspace, workspace)
    UNION SELECT id FROM volumes
     WHERE layer IN these AND workspace = coalesce(:workspace, workspace)
    UNION SELECT id FROM volume_snapshots
     WHERE layer IN these AND workspace = coalesce(:workspace, workspace)
    ORDER BY id LIMIT :limit
"""


def _memories_below(tx: Transaction, tops: Iterable[str]) -> dict[str, Node]:
    """All RAM files that some stand on, themselves included."""
    wanted = list(dict.fromkeys(tops))
    if not wanted:
        return {}
    return {
        row["id"]: Node(row["id"], row["parent"], row["bytes"], active=False)
        for row in tx.rows(_RAMS_BELOW, (json_of(wanted),))
    }


def _goes(
    tx: Transaction,
    holdings: Sequence[Holding],
    layers: Mapping[str, Node],
    memories: Mapping[str, Node],
) -> dict[str, Goes]:
    """What goes with each."""
    gone_layers = _free(tx, _FREE_LAYERS, {each.id: each.layers for each in holdings}, layers)
    gone_rams = _free(tx, _FREE_RAMS, {each.id: each.rams for each in holdings}, memories)
    return {
        each.id: Goes(
            layers=tuple(LayerId(layer) for layer in gone_layers[each.id]),
            rams=tuple(gone_rams[each.id]),
        )
        for each in holdings
    }


def _free(
    tx: Transaction, query: str, tops: Mapping[str, Sequence[str]], nodes: Mapping[str, Node]
) -> dict[str, list[str]]:
    """For each owner what goes with it, a level of all chains at a time.

    :param query: which pairs of an owner and a node go, when those of its children go that it says.
    """
    gone: dict[str, list[str]] = {owner: [] for owner in tops}
    children: dict[tuple[str, str], list[str]] = {}
    level = {(owner, top) for owner, those in tops.items() for top in those if top in nodes}
    while level:
        pairs = [[owner, id, children.get((owner, id), [])] for owner, id in sorted(level)]
        level = set()
        for row in tx.rows(query, (json_of(pairs),)):
            owner, id = row["owner"], row["id"]
            if id in gone[owner]:
                continue
            gone[owner].append(id)
            parent = nodes[id].parent
            if parent is not None and parent in nodes:
                children.setdefault((owner, parent), []).append(id)
                level.add((owner, parent))
    return gone


def _sum(nodes: Mapping[str, Node], tops: Sequence[str], sums: dict[str, int]) -> int:
    """Bytes of all that some stand on, each counted once.

    :param sums: of whole chains, kept from one record to the next.
    """
    if len(tops) == 1:
        chain = list(_chain(nodes, tops[0], sums))
        total = sums.get(nodes[chain[-1]].parent or "", 0) if chain else sums.get(tops[0], 0)
        for id in reversed(chain):
            total += nodes[id].bytes
            sums[id] = total
        return total
    mine = {id for top in tops for id in _chain(nodes, top, {})}
    return sum(nodes[id].bytes for id in mine)


def _chain(nodes: Mapping[str, Node], top: str, known: Mapping[str, int]) -> Iterator[str]:
    """From a top down, as far as it is not known yet."""
    id: str | None = top
    while id is not None and id in nodes and id not in known:
        yield id
        id = nodes[id].parent


def kinds(tx: Transaction) -> dict[str, str]:
    """Whose each layer is: the first of images, snapshots, volume snapshots, sandboxes, volumes.

    Those that are nobody's are left out. Goes through all there are: takes long with very many.
    """
    found: dict[str, str] = {}
    for kind, source in _SOURCES.items():
        query = _EVERYTHING_BELOW.format(source=source)
        for row in tx.connection.execute(query):
            found.setdefault(row["id"], kind)
    return found


_SOURCES = {
    "images": "SELECT layer FROM images WHERE layer IS NOT NULL",
    "snapshots": "SELECT layer FROM snapshot_disks",
    "volume_snapshots": "SELECT layer FROM volume_snapshots",
    "sandboxes": "SELECT layer FROM disks",
    "volumes": "SELECT layer FROM volumes WHERE layer IS NOT NULL",
}
_EVERYTHING_BELOW = """
    WITH RECURSIVE below (id) AS (
        {source}
        UNION SELECT parent FROM layers JOIN below USING (id) WHERE parent IS NOT NULL
    )
    SELECT id FROM below
"""
