"""`stratabox check --repair --deep`: what is found, what is done about it, and what is left alone.

One guest and one snapshot serve all tests; each leaves them as they were.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import (
    Checked,
    Client,
    DeniedError,
    Finding,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotState,
)
from support import disks
from support.agents import agent_alone
from support.daemon import DaemonProcess, daemon
from support.rig import eventually
from support.stored import Stored

STRAY = "00000000-0000-4000-8000-000000000000.qcow2"


@dataclass
class Scene:
    process: DaemonProcess
    client: Client
    box: Sandbox
    snapshot: Snapshot

    @property
    def folder(self) -> Path:
        return self.process.state / "sandboxes" / self.box.id

    @property
    def layer(self) -> Path:
        """Of the snapshot."""
        return Stored(self.process).of_snapshot(self.snapshot.id)

    def again(self) -> None:
        """Another daemon, after a crash of this one."""
        self.client.close()
        self.process.kill()
        self.client = self.process.start()

    def finding(self, *, deep: bool = False) -> Finding:
        """The only one that there is."""
        (found,) = self.client.check(deep=deep).findings
        assert found.repaired == ""
        return found

    def repair(self) -> Finding:
        """The only one that there is, once it was repaired; nothing is left to be found then."""
        checked = self.client.check(repair=True)
        (found,) = checked.findings
        assert found.repaired
        assert checked.left == ()
        assert self.client.check().findings == ()
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with daemon(tmp_path_factory.mktemp("check")) as process:
        client = process.start()
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=128)
        assert box.execute("head -c 3000000 /dev/urandom > /data; sync").exit_code == 0
        yield (scene := Scene(process, client, box, box.snapshot(name="kept")))
        scene.client.close()
        process.stop()


@pytest.fixture
def scene(made: Scene) -> Iterator[Scene]:
    assert made.client.check(deep=True).findings == ()
    yield made
    assert made.client.check(deep=True).findings == ()
    made.client.sandboxes.wait_ready(made.box.id, timeout=120)


# -- files ----------------------------------------------------------------------------------------


def test_what_nothing_explains_is_kept_aside(scene: Scene) -> None:
    (scene.process.state / "layers" / STRAY).write_bytes(b"precious")
    before: Checked = scene.client.check()
    assert [finding.reason for finding in before.findings] == ["STRAY_FILE"]
    assert before.quarantined_files == 0
    words = [sys.executable, "-m", "stratabox.client.cli", "check", "--repair"]
    done = subprocess.run(
        words, env=scene.process.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert "repaired" in done.stdout
    assert "in quarantine: 1 files" in done.stdout
    (kept,) = (scene.process.state / "quarantine").rglob(STRAY)
    assert kept.read_bytes() == b"precious"
    assert scene.client.check(repair=True).quarantined_files == 1
    kept.unlink()


def test_a_daemon_that_starts_keeps_it_aside_too(scene: Scene) -> None:
    (scene.process.state / "layers" / STRAY).write_bytes(b"precious")
    scene.again()
    (kept,) = (scene.process.state / "quarantine").rglob(STRAY)
    assert kept.read_bytes() == b"precious"
    kept.unlink()


def test_a_right_to_write_is_taken_away(scene: Scene) -> None:
    scene.layer.chmod(0o640)
    assert scene.finding().reason == "NOT_SEALED"
    assert scene.repair().reason == "NOT_SEALED"
    assert scene.layer.stat().st_mode & 0o777 == 0o440
    scene.layer.chmod(0o400)


def test_a_lost_layer_is_in_the_record_until_it_is_back(scene: Scene) -> None:
    layer = scene.layer
    aside = layer.rename(scene.process.state / "aside")
    checked = scene.client.check(repair=True)
    assert [finding.reason for finding in checked.left] == ["LAYER_MISSING"]
    lost = scene.client.snapshots.get(scene.snapshot.id)
    assert lost.state is SnapshotState.FAILED
    assert layer.stem in str(lost.failure_reason)
    with pytest.raises(DeniedError, match=layer.stem):
        scene.client.snapshots.restore(lost.id)
    assert scene.client.sandboxes.get(scene.box.id).execute("cat /data | wc -c").exit_code == 0
    scene.again()
    assert scene.client.snapshots.get(lost.id).state is SnapshotState.FAILED
    aside.rename(layer)
    assert scene.client.check(repair=True).findings == ()
    back = scene.client.snapshots.get(lost.id)
    assert (back.state, back.failure_reason) == (SnapshotState.READY, None)
    now = scene.client.sandboxes.get(scene.box.id)
    assert (now.state, now.state_reason) == (SandboxState.RUNNING, None)


@contextlib.contextmanager
def overwritten(path: Path, position: int, content: bytes) -> Iterator[None]:
    """A file with other bytes at one place, until the context ends."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), len(content), position)
        os.pwrite(file.fileno(), content, position)
        path.chmod(mode)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), before, position)


def test_only_a_deep_look_reads_the_layers(scene: Scene) -> None:
    layer = scene.layer
    # The second entry of the refcount table's block: a cluster in use is said to be free.
    table = int.from_bytes(layer.read_bytes()[48:56], "big")
    block = int.from_bytes(layer.read_bytes()[table : table + 8], "big")
    with overwritten(layer, block, bytes(8)):
        assert scene.client.check().findings == ()
        finding = scene.finding(deep=True)
        assert (finding.reason, finding.subject) == ("LAYER_CORRUPT", layer.stem)
        assert "qemu-img" in finding.message
        assert [left.reason for left in scene.client.check(repair=True, deep=True).left] == [
            "LAYER_CORRUPT"
        ]
    # The guest's own data has a checksum where somebody has asked for one.
    with contextlib.closing(sqlite3.connect(scene.process.state / "catalog.db")) as catalog:
        digest = disks.digest(layer)
        catalog.execute("UPDATE layers SET sha256 = ? WHERE id = ?", (digest, layer.stem))
        catalog.commit()
    size = layer.stat().st_size
    with overwritten(layer, size - 70_000, b"other"):
        assert scene.client.check().findings == ()
        finding = scene.finding(deep=True)
        assert (finding.reason, finding.subject) == ("LAYER_CORRUPT", layer.stem)
        assert "SHA-256" in finding.message


# -- guests ---------------------------------------------------------------------------------------


def test_a_guest_that_stands_still_is_let_run(scene: Scene) -> None:
    disks.ask_qemu(scene.folder, "stop")
    finding = scene.finding()
    assert (finding.reason, finding.subject) == ("GUEST_STOPPED", scene.box.id)
    assert scene.repair().reason == "GUEST_STOPPED"
    assert disks.status(scene.folder) == "running"


def test_a_guest_that_runs_although_it_is_paused_is_written_down(scene: Scene) -> None:
    scene.client.sandboxes.pause(scene.box.id)
    disks.ask_qemu(scene.folder, "cont")
    assert scene.finding().reason == "GUEST_RUNS"
    assert scene.repair().reason == "GUEST_RUNS"
    assert scene.client.sandboxes.get(scene.box.id).state is SandboxState.RUNNING


def test_a_guest_that_somebody_froze_is_thawed(scene: Scene) -> None:
    scene.client.close()
    scene.process.kill()
    with agent_alone(scene.folder) as agent:
        assert agent.ask("guest-fsfreeze-freeze")
    scene.client = scene.process.start()
    assert scene.finding().reason == "GUEST_FROZEN"
    assert scene.repair().reason == "GUEST_FROZEN"
    line = "echo written > /thawed; sync"
    assert scene.client.sandboxes.execute(scene.box.id, line, timeout=60).exit_code == 0


def test_a_qemu_that_no_record_has_is_ended(scene: Scene) -> None:
    orphan = scene.client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
    with contextlib.closing(sqlite3.connect(scene.process.state / "catalog.db")) as catalog:
        catalog.execute("PRAGMA foreign_keys = ON")
        catalog.execute("DELETE FROM sandboxes WHERE id = ?", (orphan.id,))
        catalog.commit()
    pid = scene.process.guests()[orphan.id]
    finding = scene.finding()
    assert (finding.reason, finding.subject) == ("ORPHANED_DOMAIN", str(pid))
    assert scene.repair().reason == "ORPHANED_DOMAIN"
    eventually(lambda: orphan.id not in scene.process.guests())
    scene.again()
