"""A snapshot on its way in: what is known of it, and what it stands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stratabox.storage.catalog import contents, layers, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.files.transfer.manifest import Manifest, PackedSnapshot
from stratabox.storage.model.errors import ConflictError
from stratabox.storage.model.ids import ImageId, LayerId, Sha256, SnapshotId


@dataclass
class Arriving:
    """A snapshot on its way."""

    manifest: Manifest
    packed: PackedSnapshot
    memory: bool
    """Its memory is taken."""
    work: Path
    id: SnapshotId
    ids: list[LayerId]
    """Of the layers, by their places: new ones, and such as were here."""
    names: list[Sha256 | None]
    """What the layers read as, as far as it is known."""
    backing: dict[int, LayerId | None] = field(default_factory=dict)
    """Places of the layers in the archive → what their files' headers name."""
    fresh: dict[int, Sha256] = field(default_factory=dict)
    """Places of the layers that are new here → what they hold."""
    blobs: list[Path] = field(default_factory=list)
    own_bytes: int = 0
    """Of the pages of its memory, as they are stored."""

    def layer_file(self, place: int) -> Path:
        """Where a layer is received."""
        return self.work / f"{self.ids[place]}.qcow2"

    @property
    def ram_file(self) -> Path:
        """Where its RAM is received."""
        return self.work / "ram"

    @property
    def state_file(self) -> Path:
        """Where its devices' state is received."""
        return self.work / "state"

    def parent(self, place: int) -> LayerId | None:
        """The layer below one of them."""
        below = self.manifest.layers[place].parent
        return None if below is None else self.ids[below]

    def name_below(self, place: int) -> Sha256 | None:
        """What the layer below one of them reads as."""
        below = self.manifest.layers[place].parent
        return None if below is None else self.names[below]


def find_again(tx: Transaction, arriving: Arriving) -> None:
    """See to it that the layers which were here, and are stood on, still are.

    Jobs write layers anew while an archive comes in; who has taken the place of one has its name.

    :raise ConflictError: INTERRUPTED, when nobody has.
    """
    manifest = arriving.manifest
    stood_on = {disk.layer for disk in arriving.packed.disks}
    stood_on |= {
        parent for at in arriving.fresh if (parent := manifest.layers[at].parent) is not None
    }
    here = stood_on - set(arriving.fresh)
    gone = contents.not_sealed(tx, [arriving.ids[place] for place in here])
    for place in here:
        if arriving.ids[place] not in gone:
            continue
        name = arriving.names[place]
        found = contents.reading_as(tx, name, manifest.layers[place].size) if name else None
        if found is None:
            raise ConflictError(
                f"layer {arriving.ids[place]}, which the archive was to stand on, was removed"
                " meanwhile: import it again",
                reason="INTERRUPTED",
                layer=arriving.ids[place],
            )
        arriving.ids[place] = found


def operation_of(arriving: Arriving) -> Operation:
    """What is under way, and every file that it may leave."""
    manifest = arriving.manifest
    new = zip(arriving.ids, manifest.layers, strict=True)
    return Operation(
        kind=Kind.IMPORT,
        snapshot=arriving.id,
        payload={
            "layers": [id for id, layer in new if layer.base is None],
            "blobs": [member.sha256 for member in manifest.members if member.sha256],
        },
    )


def image_of(tx: Transaction, top: LayerId) -> ImageId | None:
    """The image at the bottom of a chain, where that is one's."""
    bottom = layers.chain(tx, top)[-1].id
    row = tx.row("SELECT id FROM images WHERE layer = ? AND state = 'ready' LIMIT 1", (bottom,))
    return None if row is None else ImageId(row["id"])


def snapshot_below(tx: Transaction, parent: LayerId | None) -> SnapshotId | None:
    """The snapshot one of whose disks a layer is, where there is one."""
    return None if parent is None else snapshots.holding(tx, parent, tx.home)
