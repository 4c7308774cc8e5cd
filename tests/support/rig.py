"""One daemon, one guest that must live through everything, and what must hold after a failure."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stratabox.client import (
    ExecuteResult,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotLevel,
    SnapshotState,
)
from support import disks
from support.daemon import DaemonProcess, daemon


def eventually(fact: Callable[[], bool], seconds: float = 120, *, what: str = "") -> None:
    """Wait for what nobody tells: the state of processes, files and of a QEMU without a daemon."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def age_of(pid: int) -> float:
    """Seconds since a process was started."""
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def standing(mark: Path) -> Iterator[None]:
    """While the daemon stands still at the failpoint that is armed with `hold:MARK`."""
    eventually(mark.exists, what=f"{mark.name} was not reached")
    try:
        yield
    finally:
        mark.unlink()


def wait_idle(process: DaemonProcess) -> None:
    """Wait until no job is due, and nothing that is to be removed is there.

    That an image has one more sandbox is noted, too, and looked at a second later; no job comes of
    that.
    """
    due = (
        "SELECT 1 FROM jobs WHERE state IN ('queued', 'running')"
        " UNION ALL SELECT 1 FROM chain_hints"
        " WHERE layer NOT IN (SELECT layer FROM images WHERE layer IS NOT NULL)"
        " UNION ALL SELECT 1 FROM layers WHERE state = 'garbage'"
    )
    # They yield to everything else, and so may take long on a host that is busy.
    eventually(lambda: not process.rows(due), 400)


class Rig:
    """A daemon that is started again and again, and the *witness*: a guest on its second disk.

    What the witness has written is known (`mark`), so that it can be told what every snapshot of
    it must hold.
    """

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client = process.start()
        self.client.images.build_tiny()
        self.witness = self.create(data_disks=[1])
        self.witness.wait_ready(timeout=120)
        self._armed = False
        self._marks = 0
        self._expected: dict[str, str] = {}
        self._seals: dict[str, str] = {}

    def create(self, *, data_disks: list[int] | None = None) -> Sandbox:
        """A small sandbox that is running; it is not waited for."""
        return self.client.sandboxes.create(
            image="tiny", memory=128, data_disks=data_disks or [], wait_for_ready=False
        )

    def restart(self, failpoints: str = "") -> None:
        """End the daemon as a crash would, if it runs, and start one with these failpoints."""
        self.client.close()
        self.process.kill()
        self._armed = True
        self.client = self.process.start(failpoints=failpoints)
        self._armed = bool(failpoints)

    def calm(self) -> None:
        """See to it that a daemon without failpoints runs, whatever a test before has left."""
        if self._armed or not self.process.runs:
            self.restart()

    def idle(self) -> None:
        """Wait until no job is due: then a daemon that starts has nothing to write."""
        wait_idle(self.process)

    def execute(self, line: str) -> ExecuteResult:
        """Run a line in the witness; one that hangs is ended."""
        return self.client.sandboxes.execute(self.witness.id, line, timeout=120)

    def mark(self) -> str:
        """Let the witness write something new to both its disks, and put it on the disk."""
        self._marks += 1
        mark = f"mark-{self._marks}"
        result = self.execute(
            f"echo {mark} > /marker && sync"
            f" && echo {mark} | dd of=/dev/vdb bs=512 conv=sync,fsync,notrunc 2>/dev/null"
        )
        assert result.exit_code == 0, result
        return mark

    def layer_of(self, sandbox: str, index: int = 0) -> str:
        """Id of the layer that a sandbox writes."""
        ((layer,),) = self.process.rows(
            f"SELECT layer FROM disks WHERE sandbox = '{sandbox}' AND idx = {index}"
        )
        return str(layer)

    def parent_of(self, layer: str) -> str:
        """Id of the layer below."""
        ((parent,),) = self.process.rows(f"SELECT parent FROM layers WHERE id = '{layer}'")
        return str(parent)

    def path(self, layer: str) -> Path:
        """File of a layer."""
        return self.process.state / "layers" / f"{layer}.qcow2"

    def disks_of(self, snapshot: str) -> list[Path]:
        """The layers' files of a snapshot, by disk."""
        rows = self.process.rows(
            f"SELECT layer FROM snapshot_disks WHERE snapshot = '{snapshot}' ORDER BY idx"
        )
        return [self.path(str(row[0])) for row in rows]

    def expect(self, snapshot: str, mark: str) -> None:
        """From now on, every check sees to it that the snapshot holds that mark."""
        self._expected[snapshot] = mark

    def snapshot_named(self, name: str) -> Snapshot:
        """The one snapshot with that name."""
        (snapshot,) = self.client.snapshots.list(name=name)
        return snapshot

    def check(self) -> None:
        """Nothing is half-made, nothing was lost, and every guest does what its record says."""
        self.process.check_consistent()
        for sandbox in self.client.sandboxes.list():
            self._check_sandbox(sandbox)
        while True:
            layers = self.process.rows("SELECT id FROM layers ORDER BY id")
            try:
                for snapshot in self.client.snapshots.list():
                    self._check_snapshot(snapshot)
                self._check_seals()
                break
            except (FileNotFoundError, subprocess.CalledProcessError):
                # A job may just have put another layer in the place of one that was looked at. A
                # file goes before its row does.
                self.idle()
                if layers == self.process.rows("SELECT id FROM layers ORDER BY id"):
                    raise
        self.client.sandboxes.wait_ready(self.witness.id, timeout=120)
        self.mark()

    def _check_sandbox(self, sandbox: Sandbox) -> None:
        folder = self.process.state / "sandboxes" / sandbox.id
        if sandbox.state is SandboxState.RUNNING:
            assert disks.status(folder) == "running"
        else:
            assert sandbox.state_reason
            if sandbox.state is SandboxState.PAUSED and not sandbox.paused_to_disk:
                assert disks.status(folder) == "paused"

    def _check_snapshot(self, snapshot: Snapshot) -> None:
        files = self.disks_of(snapshot.id)
        if snapshot.state is SnapshotState.FAILED:
            assert snapshot.failure_reason
            assert files == []
            return
        assert snapshot.state is SnapshotState.READY
        assert files
        if snapshot.id in self._expected:
            found = disks.marker_of(lambda: self.disks_of(snapshot.id)[1])
            assert found == self._expected[snapshot.id], snapshot
        if snapshot.consistency is SnapshotLevel.APPLICATION and snapshot.frozen_filesystems:
            assert not disks.needs_recovery(files[0])

    def _check_seals(self) -> None:
        seals = {}
        for layer, state in self.process.rows("SELECT id, state FROM layers"):
            file = self.path(str(layer))
            try:
                mode = file.stat().st_mode & 0o777
                seal = disks.digest(file) if state == "sealed" else ""
            except FileNotFoundError:
                # Only a job in the background can have replaced it meanwhile.
                eventually(lambda layer=layer: not self._is_kept(layer))  # type: ignore[misc]
                continue
            assert state == "garbage" or (state, mode) in (("sealed", 0o400), ("active", 0o600)), (
                layer, state, mode,
            )  # fmt: skip
            if seal:
                seals[str(layer)] = seal
        for layer, seal in self._seals.items():
            assert seals.get(layer, seal) == seal, f"sealed layer {layer} was changed"
        self._seals = seals

    def _is_kept(self, layer: object) -> bool:
        return bool(self.process.rows(f"SELECT 1 FROM layers WHERE id = '{layer}'"))

    def clear(self) -> None:
        """Remove every sandbox but the witness, and every snapshot."""
        for sandbox in self.client.sandboxes.list(include_terminated=True):
            if sandbox.id != self.witness.id:
                sandbox.delete()
        for snapshot in self.client.snapshots.list():
            self.client.snapshots.delete(snapshot.id)


@contextlib.contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """A rig whose daemon and guests are gone when the context ends."""
    with daemon(folder) as process:
        made = Rig(process)
        try:
            yield made
        finally:
            made.client.close()
