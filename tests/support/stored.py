"""What a store holds on the disk, record by record: the layers under snapshots and sandboxes."""

from __future__ import annotations

import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support import disks
from support.daemon import DaemonProcess


class Stored:
    """The layers of one daemon's state folder, seen from outside."""

    def __init__(self, process: DaemonProcess) -> None:
        self._process = process
        self._folder = process.state / "layers"

    def of_snapshot(self, snapshot: str, index: int = 0) -> Path:
        """The sealed layer that is one disk of a snapshot."""
        return self._layer("snapshot_disks", "snapshot", snapshot, index)

    def of_sandbox(self, sandbox: str, index: int = 0) -> Path:
        """The active layer that is one disk of a sandbox."""
        return self._layer("disks", "sandbox", sandbox, index)

    def sealed(self) -> dict[str, str]:
        """Name of every sealed layer → SHA-256 of its file, which nobody may write."""
        digests = {}
        for (layer,) in self._process.rows("SELECT id FROM layers WHERE state = 'sealed'"):
            path = self._folder / f"{layer}.qcow2"
            assert stat.S_IMODE(path.stat().st_mode) == 0o400, path
            digests[path.name] = disks.digest(path)
        return digests

    def unneeded(self) -> set[str]:
        """Layers, rows or files, that no record's chain goes through."""
        rows = self._process.rows(
            """
            WITH RECURSIVE needed (id) AS (
                SELECT layer FROM disks
                UNION SELECT layer FROM snapshot_disks
                UNION SELECT layer FROM images WHERE layer IS NOT NULL
                UNION SELECT layers.parent FROM layers JOIN needed USING (id)
            )
            SELECT id || '.qcow2', id IN needed FROM layers
            """
        )
        needed = {str(name) for name, is_needed in rows if is_needed}
        return {str(name) for name, _ in rows} - needed | self._process.layers() - needed

    def bytes_on_disk(self) -> int:
        """What the layers' folder takes."""
        return sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())

    def _layer(self, table: str, column: str, record: str, index: int) -> Path:
        ((layer,),) = self._process.rows(
            f"SELECT layer FROM {table} WHERE {column} = '{record}' AND idx = {index}"
        )
        return self._folder / f"{layer}.qcow2"


def to_raw(layer: Path, target: Path) -> Path:
    """Write the disk that `layer` and its chain are; refused while somebody writes one of them."""
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer, target],
        check=True,
        capture_output=True,
    )
    return target


def ext4_is_clean(raw: Path) -> bool:
    """Whether e2fsck, which writes nothing here, finds nothing to mend."""
    done = subprocess.run(["e2fsck", "-fn", raw], check=False, capture_output=True)
    return done.returncode == 0


def ext4_features(raw: Path) -> set[str]:
    """The features in an ext4's superblock; `needs_recovery` while its journal is not empty."""
    done = subprocess.run(
        ["dumpe2fs", "-h", raw], check=True, capture_output=True, text=True, encoding="utf-8"
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Filesystem features:")]
    return set(line.partition(":")[2].split())


def wait_until(fact: Callable[[], bool], *, seconds: float = 30) -> None:
    """Look until it is so. For what nobody tells, as what a guest writes."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)
