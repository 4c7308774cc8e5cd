"""What must be in the store by the catalog: a list of files, and who needs each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stratabox.storage.catalog import images, layers, operations, rams, sandboxes, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.machines import blobs_of
from stratabox.storage.files.layout import Layout
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import MIB
from stratabox.storage.model.states import ImageState, LayerState


class Kind(StrEnum):
    """What is looked at."""

    LAYER = "layer"
    RAM = "ram"
    """A RAM file."""
    STATE = "state"
    """The devices' state that belongs to one."""
    BLOB = "blob"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file that must be there, and what the catalog says of it. Equal: nothing has changed."""

    kind: Kind
    id: str
    sealed: bool = True
    size: int = 0
    """Virtual size of a layer, bytes; of the guest's RAM; 0: not known."""
    parent: str | None = None
    backing: str | None = None
    """What a layer's header names, which rules nothing."""
    digest: str = ""
    """SHA-256 of the whole file, where the catalog has it."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """All that must be there."""

    items: frozenset[Item]
    users: Mapping[Item, tuple[tuple[str, str], ...]]
    """Who needs it: ("snapshot", id), ..."""
    parents: Mapping[str, str | None]
    """RAM files' ids."""
    owners: Mapping[str, tuple[str, str]]
    """Whose saved memory a RAM file's id stands for: ("snapshot", id) or ("sandbox", id)."""
    known: frozenset[str]
    """Names of files that are somebody's, also of what is under way."""


@dataclass
class _Users:
    found: dict[Item, set[tuple[str, str]]] = field(default_factory=dict)

    def add(self, item: Item, kind: str, id: str) -> None:
        self.found.setdefault(item, set()).add((kind, id))


def take_stock(tx: Transaction, layout: Layout) -> Stock:
    """List all that must be there."""
    users = _Users()
    known = set()
    for layer in layers.everything(tx):
        known.add(layout.layer_name(layer.id))
        if layer.state is not LayerState.GARBAGE:
            item = Item(
                kind=Kind.LAYER,
                id=layer.id,
                sealed=layer.state is LayerState.SEALED,
                size=layer.size,
                parent=layer.parent,
                backing=layer.backing,
                digest=layer.sha256 or "",
            )
            users.found.setdefault(item, set())
    _add_users_of_layers(tx, users)
    parents = rams.everything(tx)
    known |= {layout.ram_file(ram).name for ram in parents}
    known |= {layout.state_file(ram).name for ram in parents}
    _add_memories(tx, users, parents)
    _add_blobs(tx, users)
    known |= files_of(under_way(tx))
    return Stock(
        items=frozenset(users.found),
        users={item: tuple(sorted(found)) for item, found in users.found.items()},
        parents=parents,
        owners={
            item.id: min(found) for item, found in users.found.items() if item.kind is Kind.STATE
        },
        known=frozenset(known),
    )


def _add_users_of_layers(tx: Transaction, users: _Users) -> None:
    items = {item.id: item for item in users.found}

    def down(kind: str, id: str, layer: str | None) -> None:
        while layer is not None and layer in items:
            users.add(items[layer], kind, id)
            layer = items[layer].parent

    for sandbox in sandboxes.everything(tx):
        for disk in sandbox.disks:
            down("sandbox", sandbox.id, disk.layer)
    for snapshot in snapshots.everything(tx):
        for disk in snapshot.disks:
            down("snapshot", snapshot.id, disk.layer)
    for image in images.everything(tx):
        down("image", image.id, image.layer)


def _add_memories(tx: Transaction, users: _Users, parents: Mapping[str, str | None]) -> None:
    """RAM files, and the devices' state of those that a guest can go on from."""
    tops: list[tuple[str, str, str, int, str]] = [
        ("snapshot", snapshot.id, str(snapshot.id), snapshot.memory, snapshot.ram.state_sha256)
        for snapshot in snapshots.everything(tx)
        if snapshot.ram is not None
    ]
    for sandbox in sandboxes.everything(tx):
        parked = sandbox.ram_parked
        ram = rams.find(tx, parked) if parked else None
        if parked and ram:
            tops.append(("sandbox", sandbox.id, parked, sandbox.memory, ram.state_sha256))
    needed: dict[str, set[tuple[str, str]]] = {ram: set() for ram in parents}
    sizes: dict[str, int] = {}
    for kind, id, top, memory, digest in tops:
        users.add(Item(kind=Kind.STATE, id=top, digest=digest), kind, id)
        below: str | None = top
        while below is not None and below in needed:
            needed[below].add((kind, id))
            sizes[below] = memory * MIB
            below = parents[below]
    for id, those in needed.items():
        item = Item(kind=Kind.RAM, id=id, parent=parents[id], size=sizes.get(id, 0))
        users.found[item] = those


def _add_blobs(tx: Transaction, users: _Users) -> None:
    def add(blob: Sha256, kind: str, id: str) -> None:
        users.add(Item(kind=Kind.BLOB, id=blob, digest=blob), kind, id)

    for image in images.everything(tx):
        if image.kernel_boot and image.state is ImageState.READY:
            add(image.kernel_boot.kernel, "image", image.id)
            add(image.kernel_boot.initrd, "image", image.id)
    for sandbox in sandboxes.everything(tx):
        if not sandbox.state.is_over:
            for blob in blobs_of(sandbox.machine):
                add(blob, "sandbox", sandbox.id)
    for snapshot in snapshots.everything(tx):
        for blob in blobs_of(snapshot.machine):
            add(blob, "snapshot", snapshot.id)


def under_way(tx: Transaction) -> set[str]:
    """Ids of what is just being made: named in some row before the file is there."""
    ids = {str(row["id"]) for row in tx.rows("SELECT id FROM images WHERE state = 'creating'")}
    ids |= {str(row["id"]) for row in tx.rows("SELECT id FROM volumes WHERE state = 'creating'")}
    ids |= {str(row["target"]) for row in tx.rows("SELECT target FROM jobs")}
    for operation in operations.unfinished(tx):
        ids |= {each for each in (operation.snapshot, *_strings(operation.payload)) if each}
    return ids


def files_of(ids: Iterable[str]) -> set[str]:
    """Names of all files that there can be by those ids."""
    return {f"{id}{kind}" for id in ids for kind in (".qcow2", ".ram", ".state", ".merging")}


def blobs_of_living(tx: Transaction) -> set[str]:
    """Blobs that some sandbox or image needs."""
    wanted: set[str] = set()
    for sandbox in sandboxes.everything(tx):
        if not sandbox.state.is_over:
            wanted |= blobs_of(sandbox.machine)
    for image in images.everything(tx):
        if image.kernel_boot:
            wanted |= {image.kernel_boot.kernel, image.kernel_boot.initrd}
    return wanted


def blobs_of_snapshots(tx: Transaction) -> set[str]:
    """Blobs that some snapshot needs. Takes long where there are very many."""
    wanted: set[str] = set()
    after: int | None = 0
    while after is not None:
        some, after = snapshots.some_blobs(tx, after)
        wanted |= some
    return wanted


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
