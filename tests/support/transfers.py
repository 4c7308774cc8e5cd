"""A guest's snapshots, and a daemon elsewhere that knows nothing of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stratabox.client import (
    Client,
    Sandbox,
    Snapshot,
)
from support import disks
from support.daemon import DaemonProcess
from support.stored import Stored, to_raw, wait_until

MIB = 1 << 20

ENV = {"SECRET": "in the environment"}


def sh(sandbox: Sandbox, line: str) -> str:
    result = sandbox.execute(line)
    assert result.exit_code == 0, (line, result)
    return result.stdout.decode().rstrip("\n")


@dataclass
class Scene:
    """Two daemons, and what is to go from one to the other."""

    here: DaemonProcess
    client: Client
    there: DaemonProcess
    other: Client
    folder: Path
    first: Snapshot
    """Application level, of two disks."""
    second: Snapshot
    """Later, with memory."""
    nonce: str
    known: dict[str, list[str]] = field(default_factory=dict)
    """What the snapshots here hold: sealed layers do not change."""

    def content(self, process: DaemonProcess, snapshot: str) -> list[str]:
        """SHA-256 of each disk, as qemu-img reads it through its chain."""
        if snapshot in self.known:
            return self.known[snapshot]
        digests = []
        for index in (0, 1):
            raw = self.folder / "content.raw"
            to_raw(Stored(process).of_snapshot(snapshot, index), raw)
            digests.append(disks.digest(raw))
            raw.unlink()
        if process is self.here:
            self.known[snapshot] = digests
        return digests

    def export(self, snapshot: Snapshot, name: str, **options: object) -> Path:
        """An archive, made once for all who want it."""
        path = self.folder / name
        if not path.exists():
            self.client.snapshots.export(snapshot.id, path, **options)  # type: ignore[arg-type]
        return path

    @property
    def whole(self) -> Path:
        """The first snapshot."""
        return self.export(self.first, "first.sbx")

    @property
    def memory(self) -> Path:
        """The second one, with its memory."""
        return self.export(self.second, "memory.sbx", memory=True, env=True)

    def clear(self) -> None:
        """Remove all that was imported."""
        for sandbox in self.other.sandboxes.list(include_terminated=True):
            sandbox.delete()
        for snapshot in self.other.snapshots.list():
            self.other.snapshots.delete(snapshot.id)
        for image in self.other.images.list():
            self.other.images.delete(image.id)

    def assert_nothing_is_there(self) -> None:
        """The other daemon has nothing, and nothing is left of what it refused."""
        # A job may just be giving up, or an import that its caller has left.
        wait_until(lambda: self.there.layers() == set() and not self._is_at_work())
        self.there.check_consistent()
        assert list((self.there.state / "ram").iterdir()) == []
        assert self.other.snapshots.list() == []

    def _is_at_work(self) -> bool:
        work = self.there.state / "work"
        return any(work.iterdir()) or bool(self.there.rows("SELECT 1 FROM operations"))


def remade(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The same archive with another manifest, and sums that fit it."""
    size = int.from_bytes(content[12:16], "little")
    value = json.loads(content[48 : 48 + size])
    change(value)
    text = json.dumps(value).encode()
    digest = hashlib.sha256(text).digest()
    head = content[:12] + len(text).to_bytes(4, "little") + digest
    return head + text + content[48 + size :]


def set_in(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for each in path[:-1]:
            value = value[each]
        value[path[-1]] = to

    return change
