"""What a store holds on the disk, record by record: the layers under snapshots and sandboxes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path

from stratabox.storage.catalog import rams
from stratabox.storage.catalog.database import Transaction
from support import disks
from support.daemon import DaemonProcess
from support.rig import wait_idle


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

    def sealed(self, but: Collection[str] = ()) -> dict[str, str]:
        """Name of every sealed layer → SHA-256 of its file, which nobody may write.

        :param but: not of these, which may be large.
        """
        digests = {}
        for (layer,) in self._process.rows("SELECT id FROM layers WHERE state = 'sealed'"):
            path = self._folder / f"{layer}.qcow2"
            try:
                mode = stat.S_IMODE(path.stat().st_mode)
                digest = disks.digest(path) if path.name not in but else None
            except FileNotFoundError:  # a job in the background has replaced it meanwhile
                wait_until(lambda row=layer: not self._is_kept(row))  # type: ignore[misc]
                continue
            assert mode == 0o400, path
            if digest is not None:
                digests[path.name] = digest
        return digests

    def _is_kept(self, layer: object) -> bool:
        return bool(self._process.rows(f"SELECT 1 FROM layers WHERE id = '{layer}'"))

    def unneeded(self) -> set[str]:
        """Layers, rows or files, that no record's chain goes through, and no job works on."""
        sql = """
            WITH RECURSIVE needed (id) AS (
                SELECT layer FROM disks
                UNION SELECT layer FROM snapshot_disks
                UNION SELECT layer FROM images WHERE layer IS NOT NULL
                UNION SELECT layer FROM jobs WHERE state IN ('running', 'paused')
                UNION SELECT target FROM jobs WHERE state IN ('running', 'paused')
                UNION SELECT layers.parent FROM layers JOIN needed USING (id)
            )
            SELECT id || '.qcow2', id IN needed FROM layers
            UNION ALL SELECT target || '.qcow2', 1 FROM jobs WHERE state IN ('running', 'paused')
            """
        while True:
            rows, files = self._process.rows(sql), self._process.layers()
            if self._process.rows(sql) == rows:  # else a job has begun or ended between the two
                break
        needed = {str(name) for name, is_needed in rows if is_needed}
        return {str(name) for name, _ in rows} - needed | files - needed

    def taken(self) -> dict[Path, int]:
        """Files of layers and saved memory → what they take on the disk."""
        found = {}
        for path in (*self._folder.iterdir(), *(self._process.state / "ram").iterdir()):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[path] = path.stat().st_blocks * 512
        return found

    def bytes_on_disk(self) -> int:
        """What layers and saved memory take."""
        return sum(self.taken().values())

    def wait_settled(self) -> None:
        """Wait until nothing is merged in the background, nor will be unless something changes."""
        wait_idle(self._process)
        wait_until(lambda: not self._merges_memory())

    def _merges_memory(self) -> bool:
        with contextlib.closing(sqlite3.connect(self._process.state / "catalog.db")) as catalog:
            catalog.row_factory = sqlite3.Row
            tx = Transaction(catalog, datetime.now(UTC))
            return bool(rams.merges(tx) or rams.garbage(tx))

    def _layer(self, table: str, column: str, record: str, index: int) -> Path:
        ((layer,),) = self._process.rows(
            f"SELECT layer FROM {table} WHERE {column} = '{record}' AND idx = {index}"
        )
        return self._folder / f"{layer}.qcow2"


def run_tool(*words: str | Path, fine: Collection[int] = (0,)) -> str:
    """Run a tool of the host, as e2fsprogs' of /usr/sbin; what it printed.

    :param fine: exit codes that are none of a failure.
    """
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )
    assert done.returncode in fine, (words, done)
    return done.stdout


def to_raw(layer: Path, target: Path) -> Path:
    """Write the disk that `layer` and its chain are; refused while somebody writes one of them."""
    convert = ("qemu-img", "convert", "-f", "qcow2", "-O", "raw")
    disks.through(layer, lambda source: run_tool(*convert, source, target))
    return target


def assert_ext4_is_clean(raw: Path) -> None:
    """e2fsck, which writes nothing here, finds nothing to mend."""
    run_tool("e2fsck", "-fn", raw)


def ext4_features(raw: Path) -> set[str]:
    """The features in an ext4's superblock; `needs_recovery` while its journal is not empty."""
    lines = run_tool("dumpe2fs", "-h", raw).splitlines()
    (line,) = [line for line in lines if line.startswith("Filesystem features:")]
    return set(line.partition(":")[2].split())


def wait_until(fact: Callable[[], bool], *, seconds: float = 120) -> None:
    """Look until it is so. For what nobody tells, as what a guest writes."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)
