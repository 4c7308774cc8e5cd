"""Records to put into a catalog, none like the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from stratabox.storage.catalog import layers
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.ids import ImageId, LayerId, SandboxId, Sha256, SnapshotId, mint
from stratabox.storage.model.records import (
    GIB,
    Disk,
    Image,
    Layer,
    Machine,
    Sandbox,
    Snapshot,
)
from stratabox.storage.model.states import ImageState, LayerState, SandboxState, SnapshotState
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
BIOS = Sha256("b" * 64)


@dataclass
class Maker:
    """Makes records that differ in their ids and, by one second each, in their age."""

    _made: int = 0

    def when(self) -> datetime:
        self._made += 1
        return EPOCH + timedelta(seconds=self._made)

    def machine(self, **fields: Any) -> Machine:
        given: dict[str, Any] = {
            "machine_type": "pc-q35-7.2",
            "accelerator": "tcg",
            "cpu_model": "max",
            "qemu_version": "7.2.0",
            "firmware": {"bios-256k.bin": BIOS},
            "mac": "52:54:00:00:00:01",
        }
        return Machine(**given | fields)

    def layer(self, parent: LayerId | None = None, **fields: Any) -> Layer:
        given: dict[str, Any] = {
            "id": LayerId(mint()),
            "parent": parent,
            "state": LayerState.ACTIVE,
            "size": GIB,
            "created_at": self.when(),
        }
        return Layer(**given | fields)

    def image(self, **fields: Any) -> Image:
        given: dict[str, Any] = {
            "id": ImageId(mint()),
            "name": f"image-{mint()}",
            "state": ImageState.CREATING,
            "origin": "tiny",
            "created_at": self.when(),
        }
        return Image(**given | fields)

    def sandbox(self, *layers_: LayerId, **fields: Any) -> Sandbox:
        given: dict[str, Any] = {
            "id": SandboxId(mint()),
            "workspace": DEFAULT_WORKSPACE,
            "name": "box",
            "state": SandboxState.CREATING,
            "image": ImageId(mint()),
            "image_name": "tiny",
            "cpus": 1,
            "memory": 128,
            "storage": 1,
            "machine": self.machine(),
            "created_at": self.when(),
            "updated_at": EPOCH,
            "disks": tuple(
                Disk(index=index, layer=layer, size=GIB, serial=f"disk{index}")
                for index, layer in enumerate(layers_)
            ),
        }
        return Sandbox(**given | fields)

    def snapshot(self, *layers_: LayerId, **fields: Any) -> Snapshot:
        given: dict[str, Any] = {
            "id": SnapshotId(mint()),
            "workspace": DEFAULT_WORKSPACE,
            "name": "point",
            "state": SnapshotState.READY,
            "requested_level": None,
            "source_sandbox": SandboxId(mint()),
            "source_sandbox_name": "box",
            "image": ImageId(mint()),
            "image_name": "tiny",
            "cpus": 1,
            "memory": 128,
            "storage": 1,
            "machine": self.machine(),
            "created_at": self.when(),
            "disks": tuple(
                Disk(index=index, layer=layer, size=GIB, serial=f"disk{index}")
                for index, layer in enumerate(layers_)
            ),
        }
        return Snapshot(**given | fields)

    def chain(self, tx: Transaction, length: int) -> list[LayerId]:
        """Rows of a chain, from the image's layer up."""
        made: list[LayerId] = []
        for _ in range(length):
            layer = self.layer(made[-1] if made else None)
            layers.insert(tx, layer)
            made.append(layer.id)
        return made


class _RollBackError(Exception):
    pass


@contextmanager
def scratch(catalog: Catalog) -> Iterator[Transaction]:
    """A transaction that leaves nothing."""
    with suppress(_RollBackError), catalog.transaction() as tx:
        yield tx
        raise _RollBackError
