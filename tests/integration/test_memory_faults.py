"""What can go wrong with a memory snapshot: QEMU, daemon, disk or guest end at a bad moment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratabox.client import (
    DaemonUnavailableError,
    NoSpaceError,
    Sandbox,
    SandboxState,
    SnapshotState,
    StrataboxError,
)
from support import disks
from support.daemon import small_disk
from support.rig import Rig, eventually, rig, standing

LEVEL = "memory"


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("memory-faults")) as made:
        yield made


def victim_of(rig: Rig) -> Sandbox:
    """A guest with something in its memory."""
    victim = rig.create()
    victim.wait_ready(timeout=120)
    assert victim.execute("echo kept > /run/kept", timeout=60).exit_code == 0
    return victim


def remembers(sandbox: Sandbox) -> bool:
    return sandbox.execute("cat /run/kept", timeout=60).stdout == b"kept\n"


@pytest.mark.parametrize(
    "point", ["snapshot.overlays-made", "snapshot.switched", "snapshot.memory-saved"]
)
def test_qemu_is_killed_while_it_is_saved(failing: Rig, point: str) -> None:
    failing.calm()
    victim = victim_of(failing)
    reached = failing.process.folder / "reached"
    failing.restart(f"{point}=hold:{reached}")
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(failing.client.snapshots.create, victim.id, name=point, level=LEVEL)
        with standing(reached):
            failing.process.kill_guest(victim.id)
        error = taking.exception()
    snapshot = failing.snapshot_named(point)
    if point == "snapshot.memory-saved":
        # All of it was on the disk by then.
        assert (error, snapshot.state) == (None, SnapshotState.READY)
        with failing.client.snapshots.restore(snapshot.id) as restored:
            assert remembers(restored)
    else:
        assert isinstance(error, StrataboxError)
        assert snapshot.state is SnapshotState.FAILED
        assert snapshot.failure_reason
    eventually(lambda: failing.client.sandboxes.get(victim.id).state is SandboxState.FAILED)
    failing.check()
    assert failing.client.sandboxes.start(victim.id).ready
    failing.clear()


def test_qemu_is_killed_while_it_is_restored(failing: Rig) -> None:
    failing.calm()
    victim = victim_of(failing)
    snapshot = victim.snapshot(level=LEVEL)
    reached = failing.process.folder / "reached"
    failing.restart(f"boot.started=hold:{reached}")
    known = set(failing.process.guests())
    with ThreadPoolExecutor(1) as pool:
        restoring = pool.submit(failing.client.snapshots.restore, snapshot.id)
        with standing(reached):
            (new,) = set(failing.process.guests()) - known
            failing.process.kill_guest(new)
        assert isinstance(restoring.exception(), StrataboxError)
    failing.restart()
    failing.check()
    with failing.client.snapshots.restore(snapshot.id) as restored:
        assert remembers(restored)
    failing.clear()


def test_the_daemon_is_killed_between_stop_and_cont(failing: Rig) -> None:
    """The guest stands still until the next daemon serves, and no longer."""
    failing.calm()
    victim = victim_of(failing)
    folder = failing.process.state / "sandboxes" / victim.id
    failing.restart("snapshot.switched=kill")
    with pytest.raises(DaemonUnavailableError):
        failing.client.snapshots.create(victim.id, level=LEVEL)
    failing.process.wait_killed()
    assert disks.status(folder) == "paused"
    failing.restart()
    assert disks.status(folder) == "running"
    assert remembers(failing.client.sandboxes.get(victim.id))
    failing.check()
    failing.clear()


@pytest.mark.parametrize(
    "order", ["reboot -f", "halt -f", "poweroff -f", "echo c > /proc/sysrq-trigger"]
)
def test_the_guest_ends_or_resets_at_that_moment(failing: Rig, order: str) -> None:
    """Whichever comes first: a snapshot that is ready restores, one that is not says why."""
    failing.calm()
    for delay in ("0", "0.05", "0.2"):
        victim = victim_of(failing)
        line = f"sync; setsid sh -c 'sleep {delay}; {order}' >/dev/null 2>&1 </dev/null &"
        with contextlib.suppress(StrataboxError):  # it can be quicker than the answer
            victim.execute(line, timeout=60)
        try:
            snapshot = victim.snapshot(level=LEVEL)
        except StrataboxError:
            for failed in failing.client.snapshots.list():
                assert failed.failure_reason
        else:
            assert snapshot.state is SnapshotState.READY
            # Its own end is a part of the instant, so it is not waited for.
            failing.client.snapshots.restore(snapshot.id, wait_for_ready=False).delete()
        victim.delete()  # or it may just be ending while all is compared
        failing.check()
        failing.clear()


def test_no_space_while_memory_is_saved(tmp_path: Path) -> None:
    """Nothing is ready, nothing is left, the guest runs on, and with space it goes well."""
    with small_disk(tmp_path) as process, process.start() as client:
        state = process.state
        client.images.build_tiny()
        victim = client.sandboxes.create(image="tiny", memory=256)
        victim.execute("echo kept > /run/kept", timeout=60)
        free = shutil.disk_usage(state).free
        filler = state / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - (12 << 20))
        with pytest.raises(StrataboxError) as told:
            victim.snapshot(level=LEVEL)
        assert isinstance(told.value, NoSpaceError) or told.value.metadata["cause"] == "NO_SPACE"
        (snapshot,) = client.snapshots.list()
        assert snapshot.state is SnapshotState.FAILED
        assert list((state / "ram").iterdir()) == []
        assert remembers(victim)
        client.snapshots.delete(snapshot.id)
        filler.unlink()
        good = victim.snapshot(level=LEVEL)
        with client.snapshots.restore(good.id) as restored:
            assert remembers(restored)
        process.check_consistent()
        victim.delete()
        client.snapshots.delete(good.id)
        process.stop()


def test_the_daemon_is_another_one_at_every_step(failing: Rig) -> None:
    """No daemon but the first is the parent of any QEMU that it finds."""
    failing.calm()
    victim = victim_of(failing)

    def another() -> Sandbox:
        failing.restart()
        return failing.client.sandboxes.get(victim.id)

    first = another().snapshot(level=LEVEL)
    another()
    restored = failing.client.snapshots.restore(first.id, name="child")
    another()
    restored = failing.client.sandboxes.get(restored.id)
    second = restored.snapshot(level=LEVEL)
    another()
    third = failing.client.sandboxes.get(restored.id).snapshot(level=LEVEL)
    assert max(second.memory_bytes, third.memory_bytes) < first.memory_bytes / 2
    copies = another().clone(count=2)
    another()
    for copy in copies.sandboxes:
        assert remembers(failing.client.sandboxes.get(copy.id))
    back = another().revert(first.id).sandbox
    assert remembers(back)
    fourth = another().snapshot(level=LEVEL)
    another()
    for snapshot in (first, second, third, fourth):
        with failing.client.snapshots.restore(snapshot.id) as last:
            assert remembers(last)
        another()
    failing.check()
    failing.clear()
