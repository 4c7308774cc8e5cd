"""What a floor's guest is started with: the very machine and the very layers of the daemon's.

Read from the daemon's catalog and files, so that both sides run the same guest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.storage.catalog import layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.memory.sealed import assemble, read_state
from stratabox.storage.files.store import Store
from stratabox.storage.model.ids import LayerId, SandboxId, SnapshotId
from stratabox.storage.model.records import MIB, Machine


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A machine, its size, and the sealed layers that its one disk stands on, newest first."""

    machine: Machine
    cpus: int
    memory: int
    """MiB."""
    disk_bytes: int
    chain: tuple[ChainLayer, ...]
    firmware: Path
    kernel: Path | None
    initrd: Path | None


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A guest's state that can be mapped and read: two sealed files in memory."""

    scene: Scene
    ram: int
    state: int

    def close(self) -> None:
        """Let go of the state; guests that were started from it keep what they need."""
        os.close(self.ram)
        os.close(self.state)


def of_sandbox(state_dir: Path, sandbox: str) -> Scene:
    """The machine of a sandbox and what lies *below* its active layer, to be booted."""
    layout = Layout(state_dir)
    with _catalog(layout) as tx:
        record = sandboxes.get(tx, SandboxId(sandbox))
        (disk,) = record.disks
        chain = _chain(tx, layout, disk.layer)[1:]
    return _scene(layout, record.machine, record.cpus, record.memory, disk.size, chain)


@contextmanager
def of_snapshot(state_dir: Path, snapshot: str) -> Iterator[Frozen]:
    """The saved memory of a snapshot, ready to be mapped."""
    layout = Layout(state_dir)
    with _catalog(layout) as tx:
        record = snapshots.get(tx, SnapshotId(snapshot))
        (disk,) = record.disks
        chain = _chain(tx, layout, disk.layer)
    assert record.ram is not None
    with OpenChain(snapshot, layout.ram_file, record.memory * MIB) as files:
        ram = assemble(files)
    frozen = Frozen(
        scene=_scene(layout, record.machine, record.cpus, record.memory, disk.size, chain),
        ram=ram,
        state=read_state(layout.state_file(snapshot), record.ram.state_sha256),
    )
    with closing(frozen):
        yield frozen


def active_layer(state_dir: Path, sandbox: str) -> Path:
    """The file that a sandbox's root disk is written to."""
    layout = Layout(state_dir)
    with _catalog(layout) as tx:
        return layout.layer(sandboxes.get(tx, SandboxId(sandbox)).disks[0].layer)


def _scene(
    layout: Layout,
    machine: Machine,
    cpus: int,
    memory: int,
    disk_bytes: int,
    chain: tuple[ChainLayer, ...],
) -> Scene:
    boot = machine.kernel_boot
    return Scene(
        machine=machine,
        cpus=cpus,
        memory=memory,
        disk_bytes=disk_bytes,
        chain=chain,
        firmware=Store(layout).firmware_folder(machine.firmware),
        kernel=layout.blob(boot.kernel) if boot else None,
        initrd=layout.blob(boot.initrd) if boot else None,
    )


def _chain(tx: Transaction, layout: Layout, top: LayerId) -> tuple[ChainLayer, ...]:
    return tuple(
        ChainLayer(id=layer.id, path=layout.layer(layer.id)) for layer in layers.chain(tx, top)
    )


@contextmanager
def _catalog(layout: Layout) -> Iterator[Transaction]:
    with closing(Catalog(layout.catalog)) as catalog, catalog.transaction() as tx:
        yield tx
