"""Every path under the state folder, in one place.

```
STATE_DIR/                 0700
├── lock                   held with flock by the one daemon that owns this folder
├── catalog.db             SQLite (WAL): the truth about records
├── api.sock               the API, where no other address is configured
├── channel/               keys by which the daemon and its guests know each other; 0600
├── layers/ID.qcow2        one file for each layer; 0600 while active, 0400 once sealed
├── ram/ID.ram, ID.state   saved memory: pages, and the state of devices; 0400
├── blobs/SHA256           kernels, initrds, firmware; 0444
├── firmware/HASH/NAME     hard links to blobs, under the names that QEMU asks for
├── sandboxes/ID/          one folder for each domain: sockets, QEMU's messages; a spare's overlays
├── work/ID/               builds and imports under way; emptied at start
├── backups/               copies of the catalog, made by themselves; 0600
├── audit/                 who did what, as lines of JSON; 0600
├── quarantine/TIME/       what nothing explains, moved out of the way; never removed by us
└── reserve                some room that is given up when the disk is full
```

Paths in records are never absolute: a state folder can be moved while no guest runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.model.ids import LayerId, SandboxId, Sha256


@dataclass(frozen=True)
class Layout:
    """Names below one state folder."""

    root: Path

    @property
    def lock(self) -> Path:
        """The lock of the one daemon."""
        return self.root / "lock"

    @property
    def catalog(self) -> Path:
        """The catalog's database."""
        return self.root / "catalog.db"

    @property
    def channel_keys(self) -> Path:
        """The folder of the keys that channels into guests go by."""
        return self.root / "channel"

    @property
    def layers(self) -> Path:
        """The folder of all layers."""
        return self.root / "layers"

    @property
    def ram(self) -> Path:
        """The folder of saved memory."""
        return self.root / "ram"

    def ram_file(self, ram_id: str) -> Path:
        """One snapshot's pages."""
        return self.ram / f"{ram_id}.ram"

    def state_file(self, ram_id: str) -> Path:
        """The state of one snapshot's devices."""
        return self.ram / f"{ram_id}.state"

    def merging(self, ram_id: str) -> Path:
        """One snapshot's pages while those of others are added to them; removed at start."""
        return self.ram / f"{ram_id}.merging"

    @property
    def blobs(self) -> Path:
        """The folder of all blobs."""
        return self.root / "blobs"

    @property
    def firmware(self) -> Path:
        """The folder of firmware sets."""
        return self.root / "firmware"

    @property
    def sandboxes(self) -> Path:
        """The folder of the domains' folders."""
        return self.root / "sandboxes"

    @property
    def work(self) -> Path:
        """The folder of things under way."""
        return self.root / "work"

    @property
    def backups(self) -> Path:
        """The folder of the catalog's backups."""
        return self.root / "backups"

    @property
    def audit(self) -> Path:
        """The folder of the audit log."""
        return self.root / "audit"

    @property
    def quarantine(self) -> Path:
        """The folder of what nothing explains."""
        return self.root / "quarantine"

    @property
    def reserve(self) -> Path:
        """Room that is given up when the disk is full."""
        return self.root / "reserve"

    def layer(self, layer: LayerId) -> Path:
        """One layer's file."""
        return self.layers / self.layer_name(layer)

    def staged(self, folder: Path, layer: LayerId) -> Path:
        """A layer's file before it is anybody's, in a sandbox's folder."""
        return folder / self.layer_name(layer)

    @staticmethod
    def layer_name(layer: LayerId) -> str:
        """One layer's file name, as its children's headers spell it."""
        return f"{layer}.qcow2"

    def blob(self, digest: Sha256) -> Path:
        """One blob's file."""
        return self.blobs / digest

    def sandbox(self, sandbox: SandboxId) -> Path:
        """The folder of one domain."""
        return self.sandboxes / sandbox

    def folders(self) -> tuple[Path, ...]:
        """Every folder, parents first."""
        return (
            self.root, self.layers, self.ram, self.blobs, self.firmware, self.sandboxes, self.work,
            self.backups, self.quarantine,
        )  # fmt: skip
