"""The daemon dies at every failpoint, and the next one finds its way.

Every scenario is a generator: it prepares, hands out the call that meets its end, and says
afterwards, with a new daemon, what must have come of it. What must hold after every end (nothing
half-made, no guest frozen or lost, no snapshot wrong) is in `Rig.check`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

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
from support.rig import Rig, eventually, rig

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
        # At one look: a job may be about to put another layer below both.
        below = (
            "SELECT 1 FROM disks JOIN layers ON layers.id = disks.layer"
            " JOIN snapshot_disks ON snapshot_disks.layer = layers.parent"
            f" WHERE disks.sandbox = '{copy.id}' AND disks.idx = 0"
            f" AND snapshot_disks.snapshot = '{snapshot.id}' AND snapshot_disks.idx = 0"
        )
        assert rig.process.rows(below) == [(1,)]
        copy.delete()
    else:
        assert found == []
    rig.client.snapshots.delete(snapshot.id)


def tell(rig: Rig, point: str) -> Scenario:
    """Whoever comes next tells a copy who it is and what time."""
    rig.execute("date -u -s @1000000000")
    snapshot = rig.client.snapshots.create(rig.witness.id, level=SnapshotLevel.MEMORY)
    rig.execute(f"date -u -s @{time.time():.0f}")
    identity = "renew" if point == "identity.told" else "keep"
    yield lambda: rig.client.snapshots.restore(snapshot.id, name="orphan", identity=identity)
    (orphan,) = rig.client.sandboxes.list(name="orphan")
    orphan = rig.client.sandboxes.wait_ready(orphan.id, timeout=60)
    before = time.time()
    year, name = orphan.execute("date +%s; hostname").check().stdout.split()
    assert before - 2 < int(year) < time.time() + 1
    assert name == (b"orphan" if identity == "renew" else b"tiny")
    due = f"SELECT identity_due FROM sandboxes WHERE id = '{orphan.id}'"
    eventually(lambda: rig.process.rows(due) == [(None,)])
    rig.client.sandboxes.delete(orphan.id)
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
    rig.idle()  # or the sweep of a start, or of a job, would be the one that is killed
    files = rig.disks_of(victim.id)
    yield lambda: rig.client.snapshots.delete(victim.id)
    with pytest.raises(SnapshotNotFoundError):
        rig.client.snapshots.get(victim.id)
    # The first one's layer is needed by the next, until a job in the background has merged it.
    assert victim is first or not any(file.exists() for file in files)
    rig.clear()


def merge_memory(rig: Rig, point: str) -> Scenario:
    """A deleted snapshot's memory goes into the next one's, in the background."""
    rig.execute("mkdir -p /ram && mount -t tmpfs none /ram")
    taken = []
    for number in range(3):
        rig.execute(f"head -c 1000000 /dev/urandom > /ram/{number}; echo {point} > /ram/here")
        taken.append(rig.client.snapshots.create(rig.witness.id, level=SnapshotLevel.MEMORY))
    digest = rig.execute("cat /ram/* | sha256sum").stdout
    first, gone, last = taken
    rows = "SELECT id, parent FROM rams"
    # What was deleted before is merged by now: the kill is for what is deleted then.
    rig.client.snapshots.delete(rig.client.snapshots.create(rig.witness.id, quick=True).id)
    chain = {(first.id, None), (gone.id, first.id), (last.id, gone.id)}
    eventually(lambda: set(rig.process.rows(rows)) == chain)

    def call() -> None:
        rig.client.snapshots.delete(gone.id)
        eventually(lambda: not rig.client.host().pid)

    yield call
    eventually(lambda: set(rig.process.rows(rows)) == {(first.id, None), (last.id, first.id)})
    rig.process.check_consistent()
    with rig.client.snapshots.restore(last.id, verify=True) as copy:
        assert copy.execute("cat /ram/* | sha256sum").stdout == digest
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


def from_memory(rig: Rig) -> Sandbox:
    """A guest whose agent has answered, and which did not take a boot."""
    snapshot = rig.client.snapshots.create(rig.witness.id, level=SnapshotLevel.MEMORY)
    victim = rig.client.snapshots.restore(snapshot.id)
    rig.client.snapshots.delete(snapshot.id)
    assert victim.execute("echo kept > /run/kept", timeout=60).exit_code == 0
    return victim


def remembers(rig: Rig, victim: Sandbox) -> bool:
    return rig.client.sandboxes.execute(victim.id, "cat /run/kept").stdout == b"kept\n"


def pause_to_disk(rig: Rig, point: str) -> Scenario:
    victim = from_memory(rig)
    yield lambda: rig.client.sandboxes.pause(victim.id, to_disk=True)
    now = rig.client.sandboxes.get(victim.id)
    if point in ("park.written", "park.ended"):
        assert (now.state, now.paused_to_disk) == (PAUSED, True)
        assert rig.client.sandboxes.resume(victim.id).ready
    else:
        assert (now.state, now.ready) == (RUNNING, True)
    assert remembers(rig, victim)
    rig.client.sandboxes.delete(victim.id)


def paused_to_disk_after_ram(rig: Rig, point: str) -> Scenario:
    victim = from_memory(rig)
    victim.pause()
    yield lambda: rig.client.sandboxes.pause(victim.id, to_disk=True)
    now = rig.client.sandboxes.get(victim.id)
    assert (now.state, now.paused_to_disk) == (PAUSED, False)
    assert rig.client.sandboxes.resume(victim.id).state is RUNNING
    assert remembers(rig, victim)
    rig.client.sandboxes.delete(victim.id)


def resume_from_disk(rig: Rig, point: str) -> Scenario:
    victim = from_memory(rig)
    victim.pause(to_disk=True)
    yield lambda: rig.client.sandboxes.resume(victim.id)
    now = rig.client.sandboxes.get(victim.id)
    # From disk to memory, and only then to running: never two that go on, and never none.
    assert (now.state, now.paused_to_disk) == {
        "boot.started": (PAUSED, True),
        "boot.running-written": (PAUSED, False),
        "resume.continued": (RUNNING, False),
    }[point]
    assert rig.client.sandboxes.resume(victim.id).state is RUNNING
    rig.client.sandboxes.wait_ready(victim.id, timeout=60)
    assert remembers(rig, victim)
    rig.client.sandboxes.delete(victim.id)


def snapshot_paused_to_disk(rig: Rig, point: str) -> Scenario:
    victim = from_memory(rig)
    victim.pause(to_disk=True)
    yield lambda: rig.client.snapshots.create(victim.id, name="of a parked one", level="memory")
    snapshot = rig.snapshot_named("of a parked one")
    assert snapshot.state is SnapshotState.FAILED
    rig.client.snapshots.delete(snapshot.id)
    assert rig.client.sandboxes.resume(victim.id).ready
    assert remembers(rig, victim)
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


TESTS = Path(__file__).resolve().parents[1]

BOOT = ("boot.started", "boot.running-written")
CASES: list[tuple[str, Callable[[Rig, str], Scenario]]] = [
    *((point, create) for point in ("create.row-written", "create.overlays-made", *BOOT)),
    *((point, restore) for point in ("create.overlays-made", *BOOT)),
    *((point, tell) for point in ("boot.running-written", "identity.told")),
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
    *((f"merge.{point}", merge_memory) for point in ("written", "renamed", "recorded")),
    *((f"terminate.{point}", terminate) for point in ("row-written", "stopped", "disks-released")),
    ("terminate.stopped", delete_sandbox),
    ("delete-sandbox.row-removed", delete_sandbox),
    ("stop.stopped", stop),
    ("pause.stopped", pause),
    ("resume.continued", resume),
    *(
        (f"park.{point}", pause_to_disk)
        for point in ("row-written", "stopped", "saved", "written", "ended")
    ),
    ("park.saved", paused_to_disk_after_ram),
    *((point, resume_from_disk) for point in (*BOOT, "resume.continued")),
    ("snapshot.memory-saved", snapshot_paused_to_disk),
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


def named_elsewhere(point: str) -> bool:
    """Another test kills there: it names the point, or its step where it names the operation.

    Volumes, jobs, imports and spares are killed where their tests are.
    """
    operation, _, step = point.partition(".")
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != Path(__file__).name and "kill" in text:
            parts = f"{operation}.{{" in text or f'"{operation}"' in text
            every = f'startswith("{operation}.")' in text
            if every or point in text or (parts and f'"{step}"' in text):
                return True
    return False


def test_every_failpoint_has_its_case() -> None:
    """A new one that no test kills at fails here: give it a case, or a test of its own."""
    cases = {point for point, _ in CASES}
    assert cases <= set(failpoints.NAMES)
    others = [point for point in failpoints.NAMES if point not in cases]
    assert [point for point in others if not named_elsewhere(point)] == []


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
