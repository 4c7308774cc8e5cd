"""Warm spares: QEMUs that wait for a snapshot to be restored, and what becomes of them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from stratabox.client import (
    DaemonUnavailableError,
    InvalidArgumentError,
    Sandbox,
    SandboxState,
    Snapshot,
)
from stratabox.daemon.hypervisor import process
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]

SPARES = 2
WITH_SPARES = {"STRATABOX_WARM_SPARES": str(SPARES)}


class Scene:
    """A daemon that keeps spares, and a snapshot of a guest with something in its memory."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client = process.start(environment=WITH_SPARES)
        self.client.images.build_tiny()
        box = self.client.sandboxes.create(image="tiny", memory=128)
        box.execute("mount -t tmpfs none /mnt && echo in-memory > /mnt/mark").check()
        self.snapshot = box.snapshot(level="memory")
        box.delete()

    def restart(self, *, environment: dict[str, str] | None = None, failpoints: str = "") -> None:
        self.client.close()
        self.client = self.process.start(
            environment=WITH_SPARES if environment is None else environment, failpoints=failpoints
        )

    def spares(self) -> dict[str, int]:
        """Sandbox id → pid of the QEMUs that no sandbox has."""
        known = {sandbox.id for sandbox in self.client.sandboxes.list()}
        return {id: pid for id, pid in self.process.guests().items() if id not in known}

    def wait_spares(self, count: int) -> dict[str, int]:
        eventually(lambda: self.client.host().warm_spares == count == len(self.spares()))
        return self.spares()

    def told(self, snapshot: str) -> set[int]:
        """Pids of all spares that there were of one snapshot, as the daemon told."""
        told = rf"a spare of snapshot {snapshot} waits, pid (\d+)"
        return {int(pid) for pid in re.findall(told, self.process.log.read_text())}

    def restore(self, **arguments: object) -> Sandbox:
        restored = self.client.snapshots.restore(self.snapshot.id, **arguments)  # type: ignore[arg-type]
        assert restored.execute("cat /mnt/mark").stdout == b"in-memory\n"
        return restored

    def warmed(self) -> dict[str, int]:
        """Have all spares wait for the one snapshot."""
        while (before := self.client.host().warm_spares) < SPARES:
            self.restore().delete()
            eventually(lambda before=before: self.client.host().warm_spares > before)  # type: ignore[misc]
        return self.wait_spares(SPARES)

    def take_another(self) -> Snapshot:
        """One more snapshot, of a sandbox that goes."""
        restored = self.restore()
        snapshot = restored.snapshot(level="memory")
        restored.delete()
        return snapshot

    def files(self) -> set[str]:
        """What lies in the domains' folders."""
        return {
            str(path.relative_to(self.process.state))
            for path in (self.process.state / "sandboxes").rglob("*")
        }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with daemon(tmp_path_factory.mktemp("spares")) as process:
        made = Scene(process)
        yield made
        made.client.close()
        process.stop()
        assert process.guests() == {}
        assert made.files() == set()


def test_a_restore_takes_one_and_it_is_made_again(scene: Scene) -> None:
    spares = scene.warmed()
    layers = scene.process.layers()
    restored = scene.restore(name="of-a-spare", env={"A": "1"}, tags=["t"])
    assert restored.id in spares
    assert scene.process.guests()[restored.id] == spares[restored.id]
    assert (restored.name, restored.env, restored.tags) == ("of-a-spare", {"A": "1"}, ("t",))
    assert restored.state is SandboxState.RUNNING
    # A sandbox like any other: its disk is its own and has its place, and it can be snapshotted.
    restored.execute("echo written > /mine && sync").check()
    assert len(scene.process.layers() - layers) == 1
    again = restored.snapshot(level="memory")
    with scene.client.snapshots.restore(again.id) as grandchild:
        assert grandchild.execute("cat /mine /mnt/mark").stdout == b"written\nin-memory\n"
    restored.stop(force=True)
    restored.start()
    assert restored.execute("cat /mine").stdout == b"written\n"
    restored.delete()
    scene.client.snapshots.delete(again.id)
    assert not scene.wait_spares(SPARES).keys() & {restored.id}


def test_a_spare_of_a_guest_that_had_a_volume_has_none(scene: Scene) -> None:
    volume = scene.client.volumes.create(size_bytes=8 << 20)
    box = scene.restore()
    box.attach_volume(volume.id, "/volume")
    had = box.snapshot(level="memory")
    box.detach_volume(volume.id)
    scene.client.snapshots.restore(had.id).delete()
    eventually(lambda: bool(scene.told(had.id)))
    spares = scene.spares()
    with scene.client.snapshots.restore(had.id, volumes=[f"{volume.id}:/other"]) as copy:
        assert copy.id in spares
        assert copy.left_behind == ()  # it was given the very one
        assert [each.path for each in copy.volumes] == ["/other"]
        mounts = copy.execute("cat /proc/mounts").stdout
        assert (b" /volume " in mounts, b" /other " in mounts) == (False, True)
    box.delete()
    scene.client.snapshots.delete(had.id)
    scene.client.volumes.delete(volume.id)


def test_copies_of_one_spare_each_are_different(scene: Scene) -> None:
    scene.warmed()
    first, second = scene.restore(), scene.restore()
    seen = [
        each.execute("cat /sys/class/net/eth0/address; hostname; head -c 16 /dev/urandom").stdout
        for each in (first, second)
    ]
    assert seen[0] != seen[1]
    first.delete()
    second.delete()


def test_what_is_refused_costs_no_spare(scene: Scene) -> None:
    spares = scene.warmed()
    with pytest.raises(InvalidArgumentError, match="in the past"):
        scene.client.snapshots.restore(
            scene.snapshot.id, expires_at=datetime.now(UTC) - timedelta(hours=1)
        )
    cold = scene.client.snapshots.restore(scene.snapshot.id, cold=True)
    assert cold.id not in spares
    cold.delete()
    assert scene.spares() == spares


def test_other_identity_takes_none(scene: Scene) -> None:
    spares = scene.warmed()
    kept = scene.restore(identity="keep")
    assert kept.id not in spares
    kept.delete()


def test_a_spare_whose_qemu_dies(scene: Scene) -> None:
    spares = scene.warmed()
    for pid in spares.values():
        os.kill(pid, signal.SIGKILL)
    restored = scene.restore()
    assert restored.id not in spares
    restored.delete()
    assert not scene.wait_spares(SPARES).keys() & spares.keys()
    scene.process.rows("SELECT 1")  # the catalog is whole


def test_deleting_the_snapshot_ends_its_spares(scene: Scene) -> None:
    other = scene.take_another()
    for _ in range(SPARES):
        scene.client.snapshots.restore(other.id).delete()
    eventually(lambda: set(scene.wait_spares(SPARES).values()) <= scene.told(other.id))
    folders = {path.split("/")[1] for path in scene.files()}
    spares = scene.spares()
    assert len(spares) == SPARES
    freed = scene.client.snapshots.delete(other.id)
    # At once: what it freed is free when the call has come back. Others may take their place.
    assert not scene.spares().keys() & spares.keys()
    assert all(process.start_time(pid) is None for pid in spares.values())
    assert freed.freed_bytes > 0
    assert not {path.split("/")[1] for path in scene.files()} & folders
    scene.process.check_consistent(spares=True)


def test_the_daemon_ends_them_and_a_killed_one_leaves_none(scene: Scene) -> None:
    scene.warmed()
    scene.client.close()
    scene.process.stop()
    assert scene.process.guests() == {}
    assert scene.files() == set()
    scene.restart()
    assert scene.client.host().warm_spares == 0
    scene.warmed()
    scene.client.close()
    scene.process.kill()
    assert len(scene.process.guests()) == SPARES
    scene.restart(environment={})
    assert scene.process.guests() == {}
    assert scene.files() == set()
    scene.process.check_consistent()
    # Without the setting there are none, ever.
    scene.restore().delete()
    assert scene.client.host().warm_spares == 0
    assert scene.process.guests() == {}
    scene.client.close()
    scene.process.stop()
    scene.restart()


@pytest.mark.parametrize("point", ["spare.overlays-made", "spare.loaded"])
def test_the_daemon_dies_while_it_makes_one(scene: Scene, point: str) -> None:
    scene.client.close()
    scene.process.stop()
    scene.restart(failpoints=f"{point}=kill")
    with suppress(DaemonUnavailableError):  # the guest runs, but whether that is heard is chance
        scene.client.snapshots.restore(scene.snapshot.id)
    scene.process.wait_killed()
    scene.restart()
    (box,) = scene.client.sandboxes.list()
    assert set(scene.process.guests()) == {box.id}
    assert scene.client.sandboxes.get(box.id).state is SandboxState.RUNNING
    scene.process.check_consistent()
    scene.client.sandboxes.delete(box.id)
    assert scene.files() == set()


@pytest.mark.parametrize("point", ["create.row-written", "create.overlays-made"])
def test_the_daemon_dies_while_one_is_taken(scene: Scene, point: str) -> None:
    scene.client.close()
    scene.process.stop()
    # The first restore makes the spare, the second takes it: only that one may die.
    scene.restart(failpoints=f"{point}=kill:2")
    scene.restore().delete()
    scene.wait_spares(1)
    with pytest.raises(DaemonUnavailableError):
        scene.restore()
    scene.process.wait_killed()
    scene.restart()
    assert scene.client.sandboxes.list() == []
    assert scene.process.guests() == {}
    scene.process.check_consistent()
    assert scene.files() == set()
