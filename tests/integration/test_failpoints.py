"""The daemon dies at every failpoint, and the next one finds its way.

Every scenario is a generator: it prepares, hands out the call that meets its end, and says
afterwards, with a new daemon, what must have come of it. What must hold after every end (nothing
half-made, no guest frozen or lost, no snapshot wrong) is in `Rig.check`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator

import pytest

from stratabox.client import (
    DaemonUnavailableError,
    Sandbox,
    SandboxNotFoundError,
    SandboxState,
    SnapshotLevel,
    SnapshotNotFoundError,
    SnapshotState,
)
from stratabox.storage import failpoints
from support.rig import Rig, rig

Scenario = Generator[Callable[[], object], None, None]

RUNNING, STOPPED, PAUSED = SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.PAUSED


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("failpoints")) as made:
        yield made


def create(rig: Rig, point: str) -> Scenario:
    def call() -> Sandbox:
        return rig.client.sandboxes.create(
            image="tiny", memory=128, name=key, wait_for_ready=False, idempotency_key=key
        )

    key = str(uuid.uuid4())
    yield call
    found = rig.client.sandboxes.list(name=key)
    # The call was never answered; the same key gives what it made, or makes it now.
    again = call()
    assert [each.id for each in found] == ([again.id] if point == "boot.running-written" else [])
    again.delete()


def restore(rig: Rig, point: str) -> Scenario:
    mark = rig.mark()
    snapshot = rig.client.snapshots.create(rig.witness.id, quick=True)
    rig.expect(snapshot.id, mark)
    yield lambda: rig.client.snapshots.restore(snapshot.id, name="copy", wait_for_ready=False)
    found = rig.client.sandboxes.list(name="copy")
    if point == "boot.running-written":
        (copy,) = found
        assert rig.path(rig.parent_of(rig.layer_of(copy.id))) == rig.disks_of(snapshot.id)[0]
        copy.delete()
    else:
        assert found == []
    rig.client.snapshots.delete(snapshot.id)


def start(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    victim.stop(force=True)
    yield lambda: rig.client.sandboxes.start(victim.id, wait_for_ready=False)
    now = rig.client.sandboxes.get(victim.id)
    assert now.state is (RUNNING if point == "boot.running-written" else STOPPED)
    now.delete()


def snapshot_of_running(rig: Rig, point: str, level: SnapshotLevel) -> Scenario:
    name, mark = f"{point} {level}", rig.mark()
    yield lambda: rig.client.snapshots.create(rig.witness.id, name=name, level=level)
    snapshot = rig.snapshot_named(name)
    # Its instant is the switch. Application level takes more: that the freeze held until then,
    # which the next daemon knows by thawing as many file systems as were frozen before.
    switched = ("snapshot.switched", "snapshot.thawed", "snapshot.sealed")
    # Of memory nothing is shown before it is all on the disk.
    provable = {SnapshotLevel.CRASH: switched, SnapshotLevel.APPLICATION: switched[:1]}.get(
        level, ()
    )
    if point in (*provable, "snapshot.ready-written"):
        assert (snapshot.state, snapshot.consistency) == (SnapshotState.READY, level)
        assert bool(snapshot.frozen_filesystems) is (level is SnapshotLevel.APPLICATION)
        rig.expect(snapshot.id, mark)
        rig.check()
    else:
        assert snapshot.state is SnapshotState.FAILED
        rig.client.snapshots.delete(snapshot.id)


def snapshot_crash(rig: Rig, point: str) -> Scenario:
    yield from snapshot_of_running(rig, point, SnapshotLevel.CRASH)


def snapshot_application(rig: Rig, point: str) -> Scenario:
    yield from snapshot_of_running(rig, point, SnapshotLevel.APPLICATION)


def snapshot_memory(rig: Rig, point: str) -> Scenario:
    yield from snapshot_of_running(rig, point, SnapshotLevel.MEMORY)


def snapshot_paused(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    victim.pause()
    yield lambda: rig.client.snapshots.create(victim.id, name="of a paused one")
    snapshot = rig.snapshot_named("of a paused one")
    assert (snapshot.state, snapshot.consistency) == (SnapshotState.READY, SnapshotLevel.CRASH)
    assert rig.client.sandboxes.get(victim.id).state is PAUSED
    assert rig.client.sandboxes.resume(victim.id).state is RUNNING
    rig.client.snapshots.delete(snapshot.id)
    victim_now = rig.client.sandboxes.get(victim.id)
    victim_now.delete()


def snapshot_stopped(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    victim.stop(force=True)
    yield lambda: rig.client.snapshots.create(victim.id, name="of a stopped one")
    snapshot = rig.snapshot_named("of a stopped one")
    assert (snapshot.state, snapshot.consistency) == (SnapshotState.READY, SnapshotLevel.CRASH)
    assert rig.client.sandboxes.get(victim.id).state is STOPPED
    rig.client.snapshots.delete(snapshot.id)
    rig.client.sandboxes.delete(victim.id)


def clone(rig: Rig, point: str) -> Scenario:
    before = {snapshot.id for snapshot in rig.client.snapshots.list()}
    sandboxes = {sandbox.id for sandbox in rig.client.sandboxes.list(include_terminated=True)}
    yield lambda: rig.client.sandboxes.clone(
        rig.witness.id, count=2, quick=True, wait_for_ready=False
    )
    for snapshot in rig.client.snapshots.list(states=[SnapshotState.FAILED]):
        # It failed by itself, and says why, as any failed snapshot does.
        assert point == "snapshot.overlays-made"
        rig.client.snapshots.delete(snapshot.id)
    assert {snapshot.id for snapshot in rig.client.snapshots.list()} == before
    left = {sandbox.id for sandbox in rig.client.sandboxes.list(include_terminated=True)}
    assert left == sandboxes


def delete_snapshot(rig: Rig, point: str) -> Scenario:
    mark = rig.mark()
    older = rig.client.snapshots.create(rig.witness.id, quick=True)
    with rig.client.snapshots.restore(older.id, wait_for_ready=False) as copy:
        first = copy.snapshot(quick=True)
        newer = copy.snapshot(quick=True)
        lonely = copy.snapshot(quick=True)
    for snapshot in (older, first, newer):
        rig.expect(snapshot.id, mark)
    # The first stands below the next, which needs its layer; above the last there is nothing.
    victim = first if point == "delete-snapshot.row-written" else lonely
    files = rig.disks_of(victim.id)
    yield lambda: rig.client.snapshots.delete(victim.id)
    with pytest.raises(SnapshotNotFoundError):
        rig.client.snapshots.get(victim.id)
    assert all(file.exists() is (victim is first) for file in files)
    rig.clear()


def terminate(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    yield lambda: rig.client.sandboxes.terminate(victim.id)
    assert rig.client.sandboxes.get(victim.id).state is SandboxState.TERMINATED
    rig.client.sandboxes.delete(victim.id)


def delete_sandbox(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    yield lambda: rig.client.sandboxes.delete(victim.id)
    if point == "terminate.stopped":
        assert rig.client.sandboxes.get(victim.id).state is SandboxState.TERMINATED
        rig.client.sandboxes.delete(victim.id)
    with pytest.raises(SandboxNotFoundError):
        rig.client.sandboxes.get(victim.id)


def stop(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    yield lambda: rig.client.sandboxes.stop(victim.id, force=True)
    assert rig.client.sandboxes.get(victim.id).state is STOPPED
    rig.client.sandboxes.delete(victim.id)


def pause(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    yield lambda: rig.client.sandboxes.pause(victim.id)
    assert rig.client.sandboxes.get(victim.id).state is RUNNING
    rig.client.sandboxes.delete(victim.id)


def resume(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    victim.pause()
    yield lambda: rig.client.sandboxes.resume(victim.id)
    assert rig.client.sandboxes.get(victim.id).state is RUNNING
    rig.client.sandboxes.delete(victim.id)


def revert(rig: Rig, point: str) -> Scenario:
    victim = rig.create()
    snapshot = victim.snapshot(quick=True)
    target = rig.layer_of(victim.id)
    old = rig.parent_of(target)
    yield lambda: rig.client.sandboxes.revert(victim.id, snapshot.id, wait_for_ready=False)
    now = rig.client.sandboxes.get(victim.id)
    assert now.state is RUNNING
    base = rig.parent_of(rig.layer_of(victim.id))
    if point == "snapshot.switched":
        assert base == target, "the safety snapshot went on top, and nothing else"
    elif point == "revert.row-written":
        assert base == target, "nothing was changed but that there is a safety snapshot"
    else:
        assert base == old, "it stands on what it was put back to"
    for each in rig.client.snapshots.list(sandbox=victim.id):
        assert each.state is SnapshotState.READY
        rig.client.snapshots.delete(each.id)
    rig.client.sandboxes.delete(victim.id)


def build_image(rig: Rig, point: str) -> Scenario:
    yield lambda: rig.client.images.build_tiny(name="another")
    found = rig.client.images.list()
    if point == "image.ready-written":
        assert sorted(image.name for image in found) == ["another", "tiny"]
    else:
        assert [image.name for image in found] == ["tiny"]
        rig.client.images.build_tiny(name="another")
    rig.client.images.delete("another")


def delete_image(rig: Rig, point: str) -> Scenario:
    rig.client.images.build_tiny(name="another")
    yield lambda: rig.client.images.delete("another")
    assert [image.name for image in rig.client.images.list()] == ["tiny"]


BOOT = ("boot.started", "boot.running-written")
CASES: list[tuple[str, Callable[[Rig, str], Scenario]]] = [
    *((point, create) for point in ("create.row-written", "create.overlays-made", *BOOT)),
    *((point, restore) for point in ("create.overlays-made", *BOOT)),
    *((point, start) for point in BOOT),
    *(
        (point, snapshot_application)
        for point in failpoints.NAMES
        if point.startswith("snapshot.") and point != "snapshot.memory-saved"
    ),
    *(
        (f"snapshot.{point}", snapshot_crash)
        for point in ("overlays-made", "switched", "sealed", "ready-written")
    ),
    *(
        (f"snapshot.{point}", snapshot_memory)
        for point in ("overlays-made", "switched", "memory-saved", "ready-written")
    ),
    ("snapshot.switched", snapshot_paused),
    ("snapshot.overlays-made", snapshot_stopped),
    ("snapshot.sealed", snapshot_stopped),
    *(
        (point, clone)
        for point in (
            "snapshot.overlays-made",
            "snapshot.switched",
            "clone.snapshot-taken",
            "boot.started",
            "clone.copies-made",
        )
    ),
    *(
        (point, delete_snapshot)
        for point in ("delete-snapshot.row-written", "sweep.tombstoned", "sweep.unlinked")
    ),
    *((f"terminate.{point}", terminate) for point in ("row-written", "stopped", "disks-released")),
    ("terminate.stopped", delete_sandbox),
    ("delete-sandbox.row-removed", delete_sandbox),
    ("stop.stopped", stop),
    ("pause.stopped", pause),
    ("resume.continued", resume),
    ("snapshot.switched", revert),
    *(
        (f"revert.{point}", revert)
        for point in ("row-written", "stopped", "overlays-made", "disks-switched")
    ),
    *((point, revert) for point in BOOT),
    *(
        (f"image.{point}", build_image)
        for point in ("row-written", "built", "files-stored", "ready-written")
    ),
    ("delete-image.row-written", delete_image),
]


def test_every_failpoint_has_its_case() -> None:
    assert {point for point, _ in CASES} == set(failpoints.NAMES)


def begin(rig: Rig, point: str, scenario: Callable[[Rig, str], Scenario]) -> Scenario:
    """Play a scenario until the daemon is dead."""
    rig.calm()
    steps = scenario(rig, point)
    call = next(steps)
    rig.restart(f"{point}=kill")
    with pytest.raises(DaemonUnavailableError):
        call()
    rig.process.wait_killed()
    return steps


@pytest.mark.parametrize(
    ("point", "scenario"), CASES, ids=[f"{case.__name__}-{point}" for point, case in CASES]
)
def test_killed(failing: Rig, point: str, scenario: Callable[[Rig, str], Scenario]) -> None:
    steps = begin(failing, point, scenario)
    failing.restart()
    failing.check()
    assert next(steps, None) is None


@pytest.mark.parametrize(
    ("point", "again", "scenario"),
    [
        ("snapshot.switched", "snapshot.sealed", snapshot_crash),
        ("snapshot.switched", "snapshot.ready-written", snapshot_application),
        ("revert.stopped", "boot.started", revert),
        ("terminate.row-written", "terminate.stopped", terminate),
        ("clone.copies-made", "delete-snapshot.row-written", clone),
        ("create.overlays-made", "sweep.tombstoned", create),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_killed_again_while_it_recovers(
    failing: Rig, point: str, again: str, scenario: Callable[[Rig, str], Scenario]
) -> None:
    steps = begin(failing, point, scenario)
    with pytest.raises(AssertionError, match="the daemon ended"):
        failing.restart(f"{again}=kill")
    failing.restart()
    failing.check()
    assert next(steps, None) is None


def test_killed_together_with_its_guest(failing: Rig) -> None:
    """What the guest wrote until it died is kept; nobody can say any more what the instant was."""
    failing.calm()
    victim = failing.create()
    layer = failing.layer_of(victim.id)
    failing.restart("snapshot.switched=kill")
    with pytest.raises(DaemonUnavailableError):
        failing.client.snapshots.create(victim.id, name="lost", quick=True)
    failing.process.wait_killed()
    failing.process.kill_guest(victim.id)
    failing.restart()
    failing.check()
    snapshot = failing.snapshot_named("lost")
    assert snapshot.state is SnapshotState.FAILED
    assert "QEMU ended" in str(snapshot.failure_reason)
    assert failing.client.sandboxes.get(victim.id).state is STOPPED
    assert failing.parent_of(failing.layer_of(victim.id)) == layer
    assert failing.client.sandboxes.start(victim.id, wait_for_ready=False).state is RUNNING
    failing.clear()
