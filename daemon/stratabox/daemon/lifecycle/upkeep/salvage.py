"""After a backup of the catalog was put back: what its records miss, as far as it is sure.

The records are of an earlier moment than the files and the guests. So, for once, these are right:

* A QEMU that runs is its sandbox's, whatever the record says, and stands on what its block graph
  names: overlays that came since are taken into the catalog, by their own headers.
* Saved memory goes on only with the disks that it was saved with: where those were written later,
  it is given up.
* An active layer that was sealed since stays sealed, and its sandbox goes on with a new overlay.
  What it wrote after that snapshot is in the quarantine.

Everything else that came since has no record, and its files go to the quarantine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import layers, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.files.durable import allocated_bytes
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import NewOverlay
from stratabox.storage.model.errors import CorruptError, InvalidArgumentError
from stratabox.storage.model.ids import LayerId, is_id, mint
from stratabox.storage.model.records import Layer, Sandbox
from stratabox.storage.model.states import LayerState, SandboxState
from stratabox.storage.qcow2 import header

log = logging.getLogger(__name__)

GIVEN_UP = (
    "its saved memory was given up: its disks were written later than that, by the time that the"
    " catalog was put back to"
)
SEALED_SINCE = (
    "its disk is that of a snapshot that is newer than the catalog, which was put back; what was"
    " written later is in the quarantine"
)
_UNKNOWN = datetime.fromtimestamp(0, UTC)
_WRITABLE = 0o200
_SUFFIX = ".qcow2"


async def prepare(world: World, record: Sandbox, *, runs: bool) -> Sandbox:
    """Bring a record to what is sure of it, before its domain is taken over or missed.

    :param runs: a QEMU of that sandbox runs.
    :raise NoSpaceError: NO_SPACE.
    """
    if record.state.is_over:
        return record
    if runs:
        if record.has_process:
            return record
        state = SandboxState.PAUSED if record.ram_parked else SandboxState.RUNNING
        return await world.change_sandbox(record.id, state=state, ram_parked=None, state_reason="")
    layout = world.store.layout
    if record.ram_parked is not None and await in_thread(_written_since, layout, record):
        record = await world.change_sandbox(
            record.id, state=SandboxState.STOPPED, state_reason=GIVEN_UP, ready=False
        )
    if await in_thread(_is_sealed, layout, record):
        record = await _put_overlays(world, record)
    return record


async def agree_on_disks(world: World, record: Sandbox, domain: Domain) -> None:
    """Take the overlays into the catalog that a running QEMU writes, and the catalog misses.

    :raise UnavailableError: MONITOR_UNAVAILABLE.
    :raise CorruptError: LAYER_MISSING, when a chain does not come down to a layer that is known.
    """
    layout = world.store.layout
    active = await domain.disks.active_layers()
    known = await world.read(lambda tx: {layer.id: layer for layer in layers.everything(tx)})
    tops: dict[int, LayerId] = {}
    found: dict[LayerId, Layer] = {}
    for disk in record.disks:
        node = active.get(disk.index)
        if node in (None, ChainLayer(id=disk.layer, path=layout.layer(disk.layer)).node):
            continue
        chain = await in_thread(_chain_of, layout, str(node), known)
        tops[disk.index] = chain[0].id
        found |= {layer.id: layer for layer in chain}
    if not tops:
        return

    def write(tx: Transaction) -> Sandbox:
        for layer in reversed(found.values()):  # those below first
            sealed_at = tx.now if layer.sealed_at else None
            layers.insert(tx, replace(layer, created_at=tx.now, sealed_at=sealed_at))
        for layer in found.values():
            below = known.get(layer.parent) if layer.parent else None
            if below is not None and below.state is LayerState.ACTIVE:
                layers.seal(tx, {below.id: allocated_bytes(layout.layer(below.id))})
        disks = tuple(
            replace(disk, layer=tops.get(disk.index, disk.layer)) for disk in record.disks
        )
        return sandboxes.change(tx, record.id, disks=disks)

    await world.write(write)
    log.warning("sandbox %s: %d layers are known again", record.id, len(found))


def _chain_of(layout: Layout, node: str, known: dict[LayerId, Layer]) -> list[Layer]:
    """The layers from the one of that node down to the first known, which is left out."""
    names = {
        ChainLayer(id=LayerId(path.stem), path=path).node: LayerId(path.stem)
        for path in layout.layers.iterdir()
        if path.suffix == _SUFFIX and is_id(path.stem)
    }
    chain: list[Layer] = []
    layer = names.get(node)
    while layer is not None and layer not in known:
        path = layout.layer(layer)
        with path.open("rb") as file:
            try:
                head = header.parse(file.read(header.HEAD_BYTES))
            except InvalidArgumentError as error:
                what = f"{path.name}: {error.message}"
                raise CorruptError(what, reason="LAYER_CORRUPT") from error
        backing = (head.backing_file or b"").decode(errors="replace").removesuffix(_SUFFIX)
        below = LayerId(backing) if is_id(backing) else None
        status = path.stat()
        sealed = not status.st_mode & _WRITABLE
        chain.append(
            Layer(
                id=layer,
                parent=below,
                state=LayerState.SEALED if sealed else LayerState.ACTIVE,
                size=head.virtual_size,
                created_at=_UNKNOWN,
                sealed_at=_UNKNOWN if sealed else None,
                bytes=allocated_bytes(path) if sealed else 0,
            )
        )
        layer = below
    if layer is None or not chain:
        raise CorruptError(
            f"the chain of QEMU's node {node} does not end in a layer that the catalog has",
            reason="LAYER_MISSING",
        )
    return chain


def _written_since(layout: Layout, record: Sandbox) -> bool:
    """A disk was written after the memory was saved that must go on with it."""
    assert record.ram_parked is not None
    state = layout.state_file(record.ram_parked)
    if not state.exists():
        return False  # which is told as a loss
    saved = state.stat().st_mtime_ns
    files = [layout.layer(disk.layer) for disk in record.disks]
    return any(path.exists() and path.stat().st_mtime_ns > saved for path in files)


def _is_sealed(layout: Layout, record: Sandbox) -> bool:
    files = [layout.layer(disk.layer) for disk in record.disks]
    return any(path.exists() and not path.stat().st_mode & _WRITABLE for path in files)


async def _put_overlays(world: World, record: Sandbox) -> Sandbox:
    """On all of its disks, whose layers are sealed from now on."""
    overlays = [NewOverlay(LayerId(mint()), disk.layer, disk.size) for disk in record.disks]
    old: Sequence[LayerId] = [disk.layer for disk in record.disks]
    await in_thread(world.store.make_overlays, overlays)
    sizes = await in_thread(world.store.seal, old)

    def write(tx: Transaction) -> Sandbox:
        for overlay in overlays:
            layers.insert(
                tx,
                Layer(
                    id=overlay.id,
                    parent=overlay.parent,
                    state=LayerState.ACTIVE,
                    size=overlay.size,
                    created_at=tx.now,
                ),
            )
        layers.seal(tx, sizes)
        disks = tuple(
            replace(disk, layer=overlay.id)
            for disk, overlay in zip(record.disks, overlays, strict=True)
        )
        return sandboxes.change(tx, record.id, disks=disks, state_reason=SEALED_SINCE)

    return await world.write(write)
