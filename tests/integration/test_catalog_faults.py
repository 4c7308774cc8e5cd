"""The catalog is damaged, and a backup that is older than files and guests is put back.

What was made since has no record: nothing of it is removed, what runs is taken over as it is, and
whatever is ready is what it was.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Client,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotState,
)
from support import disks
from support.daemon import DaemonProcess, daemon
from support.rig import eventually, wait_idle
from support.stored import Stored


def strataboxd(process: DaemonProcess, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stratabox.daemon", *words],
        env=process.environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(16384))


def write(box: Sandbox, mark: str) -> None:
    line = f"echo {mark} | dd of=/dev/vdb bs=512 conv=sync,fsync,notrunc 2>/dev/null"
    assert box.execute(line, timeout=60).exit_code == 0


def read(box: Sandbox) -> str:
    return box.execute("dd if=/dev/vdb bs=512 count=1 2>/dev/null | head -n 1").stdout.decode()


@dataclass
class Scene:
    """What there was when the backup was made, and what came after it."""

    process: DaemonProcess
    running: Sandbox
    stopped: Sandbox
    parked: Sandbox
    cut: Sandbox
    ended: Sandbox
    older: Snapshot
    """Of the running one, deleted after the backup."""
    kept: Snapshot
    newer: Snapshot
    """After the backup."""


JOBLESS = "jobs.compared=error"
"""No job comes to its end: what one replaces is removed, and a backup is made before."""


def backups(process: DaemonProcess) -> set[str]:
    return {path.name for path in (process.state / "backups").glob("*.db")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """All that can have changed since a backup, with the catalog damaged then."""
    with daemon(tmp_path_factory.mktemp("catalog")) as process:
        client = process.start(failpoints=JOBLESS)
        client.images.build_tiny()
        first = client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
        write(first, "ground")
        ground = first.snapshot(level="memory")
        made = [client.snapshots.restore(ground.id, name=name) for name in "bcde"]
        stopped, parked, cut, ended = made
        older, kept = first.snapshot(quick=True), first.snapshot(quick=True)
        stopped.stop()
        parked.pause(to_disk=True)
        cut.pause(to_disk=True)
        # A start makes a backup, at once and in the background.
        client.close()
        process.kill()
        before = backups(process)
        client = process.start(failpoints=JOBLESS)
        eventually(lambda: bool(backups(process) - before))
        (backup,) = backups(process) - before
        # From here on nothing is in the backup.
        running = client.sandboxes.get(first.id)
        write(running, "after")
        newer = running.snapshot(quick=True)
        write(running, "last")
        client.snapshots.delete(older.id)
        client.sandboxes.get(ended.id).delete()
        restarted = client.sandboxes.start(stopped.id)
        restarted.snapshot(quick=True)
        write(restarted, "lost")
        restarted.stop()
        for each in (parked, cut):
            client.sandboxes.resume(each.id)
            write(client.sandboxes.wait_ready(each.id, timeout=60), "resumed")
        client.close()
        process.kill()
        process.kill_guest(cut.id)
        for newest in sorted(backups(process)):
            if newest > backup:
                (process.state / "backups" / newest).unlink()
        process.store_id()  # who looks last folds the log in
        spoil(process.state / "catalog.db")
        yield Scene(process, running, stopped, parked, cut, ended, older, kept, newer)


def test_restoring_the_last_backup(scene: Scene) -> None:
    process = scene.process
    # Refused, with the way back; nothing is changed by that.
    refused = strataboxd(process)
    assert refused.returncode == 1
    assert "damaged" in refused.stderr
    assert "strataboxd catalog restore" in refused.stderr
    told = json.loads(strataboxd(process, "catalog", "list-backups", "--json").stdout)
    assert told["backups"][0]["sound"]
    done = strataboxd(process, "catalog", "restore", "--json")
    assert done.returncode == 0, done
    assert (Path(json.loads(done.stdout)["kept_aside"]) / "catalog.db").exists()
    layers = process.layers()
    with process.start(failpoints=JOBLESS) as client:
        check_records(scene, client)
        check_files(scene, client, layers)


def check_records(scene: Scene, client: Client) -> None:
    # The one that runs goes on with all that it has written, and with its newest overlays.
    running = client.sandboxes.get(scene.running.id)
    assert running.state is SandboxState.RUNNING
    assert read(running) == "last\n"
    again = running.snapshot(quick=True)
    stored = Stored(scene.process)
    assert disks.marker_of(lambda: stored.of_snapshot(again.id, 1)) == "last"
    # A snapshot that is there is what it was; one whose layer went with it says so.
    assert disks.marker_of(lambda: stored.of_snapshot(scene.kept.id, 1)) == "ground"
    older = client.snapshots.get(scene.older.id)
    assert older.state is SnapshotState.READY, "its layer stayed for the newer ones"
    # The one that was stopped is what its snapshot after the backup is, not a mixture.
    stopped = client.sandboxes.get(scene.stopped.id)
    assert stopped.state is SandboxState.STOPPED
    assert "quarantine" in str(stopped.state_reason)
    assert disks.marker_of(lambda: stored.of_sandbox(stopped.id, 1)) == "ground"
    # The one that was resumed since runs on.
    parked = client.sandboxes.get(scene.parked.id)
    assert (parked.state, parked.paused_to_disk) == (SandboxState.RUNNING, False)
    assert read(parked) == "resumed\n"
    # This one's memory was saved before its disk was written again: that cannot go on.
    cut = client.sandboxes.get(scene.cut.id)
    assert cut.state is SandboxState.STOPPED
    assert "memory was given up" in str(cut.state_reason)
    assert disks.marker_of(lambda: stored.of_sandbox(cut.id, 1)) == "resumed"
    # Deleted since: its files are gone, and its record says so.
    ended = client.sandboxes.get(scene.ended.id)
    assert ended.state is SandboxState.FAILED
    assert "lost" in str(ended.state_reason)
    client.sandboxes.delete(ended.id)
    # Made since: it has no record.
    assert scene.newer.id not in {snapshot.id for snapshot in client.snapshots.list()}


def check_files(scene: Scene, client: Client, before: set[str]) -> None:
    process = scene.process
    process.check_consistent()
    kept = {path.name for path in (process.state / "quarantine").rglob("*.qcow2")}
    assert kept, "what the stopped one wrote after its snapshot"
    assert before <= process.layers() | kept, "nothing was removed"
    checked = client.check(deep=True)
    assert checked.findings == ()
    assert checked.quarantined_files > 0
    started = client.sandboxes.start(scene.stopped.id)
    assert read(started) == "ground\n"
    started.delete()


def test_layers_that_a_job_has_replaced_are_in_the_newest_backup(tmp_path: Path) -> None:
    """Their files are gone: an older backup would need them."""
    with daemon(tmp_path) as process:
        client = process.start()
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
        taken = [box.snapshot(quick=True) for _ in range(4)]
        before = process.layers()
        eventually(lambda: bool(backups(process)))
        for snapshot in taken[1:3]:
            client.snapshots.delete(snapshot.id)
        done = "SELECT 1 FROM jobs WHERE state = 'done'"
        eventually(lambda: bool(process.rows(done)) and not before <= process.layers())
        wait_idle(process)  # the two may have gone one after the other, by a job for each
        client.close()
        process.kill()
        process.store_id()
        spoil(process.state / "catalog.db")
        assert strataboxd(process, "catalog", "restore").returncode == 0
        with process.start() as client:
            assert {each.id for each in client.snapshots.list()} == {taken[0].id, taken[3].id}
            assert {each.state for each in client.snapshots.list()} == {SnapshotState.READY}
            assert client.sandboxes.get(box.id).state is SandboxState.RUNNING
            process.check_consistent()
            checked = client.check(deep=True)
            assert (checked.findings, checked.quarantined_files) == ((), 1)  # the old catalog


def test_a_guest_that_reboots_while_the_catalog_is_locked(tmp_path: Path) -> None:
    """Whether it is ready is written down as soon as that can be."""
    boot = "cat /proc/sys/kernel/random/boot_id"
    with daemon(tmp_path) as process, process.start() as client:
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=128)
        before = box.execute(boot).stdout
        with (
            box.spawn("read line; echo b >/proc/sysrq-trigger", stdin=True) as rebooting,
            closing(sqlite3.connect(process.state / "catalog.db", isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            rebooting.write(b"\n")
            eventually(lambda: "is ready is not written yet" in process.log.read_text())
            other.execute("ROLLBACK")

        def has_rebooted() -> bool:
            with suppress(AgentUnavailableError):
                return box.execute(boot).stdout != before
            return False

        eventually(has_rebooted)
        client.sandboxes.wait_ready(box.id, timeout=120)
