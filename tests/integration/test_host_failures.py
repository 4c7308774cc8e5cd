"""The host's disk fails or is full at every failpoint; the call says so, and nothing else happens.

The daemon goes on, nothing is half-made, the guests run on and write, and the next try succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from stratabox.client import (
    DaemonUnavailableError,
    FailedError,
    InternalError,
    Sandbox,
    SandboxState,
    SnapshotFailedError,
    StrataboxError,
)
from support.rig import Rig, rig

RUNNING = SandboxState.RUNNING


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("failing")) as made:
        yield made


Prepare = Callable[[Rig], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """An operation that fails once at each of these points, and then succeeds.

    Points behind an operation's last commit are not among them: nothing that follows can fail it.
    """

    prepare: Prepare
    points: tuple[str, ...]


def attempt_create(rig: Rig) -> Callable[[], object]:
    return lambda: rig.client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)


def attempt_start(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    victim.stop(force=True)
    return lambda: rig.client.sandboxes.start(victim.id, wait_for_ready=False)


def attempt_snapshot(level: str) -> Prepare:
    def prepare(rig: Rig) -> Callable[[], object]:
        def take() -> None:
            before = {snapshot.id for snapshot in rig.client.snapshots.list()}
            try:
                snapshot = rig.client.snapshots.create(rig.witness.id, level=level)
            except SnapshotFailedError as error:
                # The record tells the same and is the only thing that is new.
                after = [each for each in rig.client.snapshots.list() if each.id not in before]
                told = [(each.id, str(each.failure_reason) in error.message) for each in after]
                if told == [(error.snapshot_id, True)]:
                    raise
                pytest.fail(f"{told} {error}")
            assert snapshot.consistency == level

        return take

    return prepare


def attempt_stopped_snapshot(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    victim.stop(force=True)
    return lambda: rig.client.snapshots.create(victim.id)


def ids(rig: Rig) -> set[str]:
    """Of all sandboxes and snapshots."""
    return {each.id for each in rig.client.sandboxes.list()} | {
        each.id for each in rig.client.snapshots.list()
    }


def attempt_clone(rig: Rig) -> Callable[[], object]:
    def clone() -> None:
        before = ids(rig)
        try:
            copies = rig.client.sandboxes.clone(
                rig.witness.id, quick=True, count=2, wait_for_ready=False
            )
        except StrataboxError:
            # The source's chain has grown, and nothing else is left.
            rig.process.check_consistent()
            assert ids(rig) == before
            raise
        assert len(copies.sandboxes) == 2

    return clone


def attempt_terminate(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    return lambda: rig.client.sandboxes.terminate(victim.id)


def attempt_stop(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    return lambda: rig.client.sandboxes.stop(victim.id)


def attempt_pause(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    return lambda: rig.client.sandboxes.pause(victim.id)


def from_memory(rig: Rig) -> Sandbox:
    """A guest whose agent has answered, and which did not take a boot."""
    snapshot = rig.client.snapshots.create(rig.witness.id, level="memory")
    victim = rig.client.snapshots.restore(snapshot.id)
    rig.client.snapshots.delete(snapshot.id)
    return victim


def attempt_pause_to_disk(rig: Rig) -> Callable[[], object]:
    victim = from_memory(rig)

    def pause() -> None:
        try:
            rig.client.sandboxes.pause(victim.id, to_disk=True)
        except StrataboxError:
            now = rig.client.sandboxes.get(victim.id)
            assert (now.state, now.ready, now.paused_to_disk) == (RUNNING, True, False)
            raise

    return pause


def attempt_resume_from_disk(rig: Rig) -> Callable[[], object]:
    victim = from_memory(rig)
    victim.pause(to_disk=True)
    return lambda: rig.client.sandboxes.resume(victim.id)


def attempt_resume(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    victim.pause()
    return lambda: rig.client.sandboxes.resume(victim.id)


def attempt_revert(rig: Rig) -> Callable[[], object]:
    victim = rig.create()
    snapshot = victim.snapshot(quick=True)
    return lambda: rig.client.sandboxes.revert(victim.id, snapshot.id, wait_for_ready=False)


def attempt_image(rig: Rig) -> Callable[[], object]:
    return lambda: rig.client.images.build_tiny(name="another")


def points(operation: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{operation}.{name}" for name in names)


ATTEMPTS = {
    "create": Attempt(
        prepare=attempt_create,
        points=(*points("create", "row-written", "overlays-made"), "boot.started"),
    ),
    "start": Attempt(prepare=attempt_start, points=("boot.started",)),
    "snapshot-crash": Attempt(
        prepare=attempt_snapshot("crash"),
        points=points("snapshot", "row-written", "overlays-made", "switched"),
    ),
    "snapshot-application": Attempt(
        prepare=attempt_snapshot("application"),
        points=points(
            "snapshot", "row-written", "overlays-made", "freeze-intended", "frozen",
            "freeze-counted", "switched", "thawed",
        ),
    ),
    "snapshot-seal": Attempt(
        prepare=attempt_snapshot("application"), points=("snapshot.sealed",)
    ),
    "snapshot-stopped": Attempt(
        prepare=attempt_stopped_snapshot, points=points("snapshot", "overlays-made", "sealed")
    ),
    "clone": Attempt(
        prepare=attempt_clone, points=points("clone", "snapshot-taken", "copies-made")
    ),
    "terminate": Attempt(
        prepare=attempt_terminate, points=points("terminate", "row-written", "stopped")
    ),
    "stop": Attempt(prepare=attempt_stop, points=("stop.stopped",)),
    "pause": Attempt(prepare=attempt_pause, points=("pause.stopped",)),
    "pause-to-disk": Attempt(
        prepare=attempt_pause_to_disk, points=points("park", "row-written", "stopped", "saved")
    ),
    "resume-from-disk": Attempt(
        prepare=attempt_resume_from_disk, points=("boot.started", "resume.continued")
    ),
    "resume": Attempt(prepare=attempt_resume, points=("resume.continued",)),
    "revert": Attempt(
        prepare=attempt_revert,
        points=points("revert", "row-written", "stopped", "overlays-made"),
    ),
    "image": Attempt(
        prepare=attempt_image, points=points("image", "row-written", "built", "files-stored")
    ),
}  # fmt: skip


@pytest.mark.parametrize("action", ["error", "nospace"])
@pytest.mark.parametrize("operation", ATTEMPTS)
def test_host_fails(failing: Rig, operation: str, action: str) -> None:
    failing.calm()
    attempt = ATTEMPTS[operation]
    call = attempt.prepare(failing)
    failing.restart(",".join(f"{point}={action}:1" for point in attempt.points))
    reason = "HOST_DISK_FAILED" if action == "error" else "NO_SPACE"
    for point in attempt.points:
        with pytest.raises(StrataboxError) as told:
            call()
        assert not isinstance(told.value, InternalError | DaemonUnavailableError), point
        assert reason in (told.value.reason, told.value.metadata.get("cause")), point
        if operation not in ("terminate", "stop"):  # these are half-way until they are tried again
            failing.check()
    call()
    failing.check()
    failing.clear()
    for image in failing.client.images.list():
        if image.name != "tiny":
            failing.client.images.delete(image.id)


@pytest.mark.parametrize("action", ["error", "nospace"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("operation", ["create", "clone", "terminate"])
def test_the_catalog_cannot_be_written(
    failing: Rig, operation: str, action: str, number: int
) -> None:
    """The first few transactions fail: whatever was answered is so, and nothing is half-made."""
    failing.calm()
    box = failing.create()
    calls: dict[str, Callable[[], object]] = {
        "create": failing.create,
        "clone": lambda: failing.client.sandboxes.clone(
            failing.witness.id, level="application", count=2, wait_for_ready=False
        ),
        "terminate": lambda: failing.client.sandboxes.terminate(box.id),
    }
    failing.idle()  # one that cannot write down what is due when it starts, does not start
    failing.restart(f"catalog.commit={action}:{number}")
    for _ in range(number + 1):
        try:
            calls[operation]()
            break
        except StrataboxError as error:
            if isinstance(error, InternalError | DaemonUnavailableError):
                raise
    else:
        pytest.fail("it never succeeded")
    failing.restart()  # a debt that could not be paid is known to the next daemon, too
    failing.check()
    failing.clear()


def test_a_revert_that_cannot_boot_stays_on_the_snapshot(failing: Rig) -> None:
    failing.calm()
    victim = failing.create()
    base = failing.layer_of(victim.id)
    snapshot = victim.snapshot(quick=True)
    failing.restart("boot.started=error:1")
    with pytest.raises(FailedError, match="disk failed"):
        failing.client.sandboxes.revert(victim.id, snapshot.id)
    failing.check()
    assert failing.parent_of(failing.layer_of(victim.id)) == base
    now = failing.client.sandboxes.start(victim.id, wait_for_ready=False)
    assert (now.state, now.state_reason) == (RUNNING, None)
    failing.clear()


@pytest.mark.parametrize("point", points("sweep", "tombstoned", "unlinked"))
def test_garbage_that_stays_fails_nobody(failing: Rig, point: str) -> None:
    failing.calm()
    failing.idle()  # or the sweep of a job would be the one that fails, or would mend it
    first, second = failing.create(), failing.create()
    failing.restart(f"{point}=error:1")
    failing.client.sandboxes.delete(first.id)
    assert failing.process.rows("SELECT id FROM layers WHERE state = 'garbage'")
    failing.client.sandboxes.delete(second.id)
    failing.check()


def test_a_copy_that_fails_leaves_the_others(failing: Rig) -> None:
    failing.restart("boot.started=error:1")
    copies = failing.client.sandboxes.clone(
        failing.witness.id, quick=True, count=3, wait_for_ready=False
    )
    assert len(copies.sandboxes) == 2
    assert [error.reason for error in copies.errors] == ["HOST_DISK_FAILED"]
    failing.check()
    failing.clear()


def test_everything_that_was_saved_boots(failing: Rig) -> None:
    """After all that, the witness is what it was; its snapshots restore; a cold start works too."""
    failing.calm()
    mark = failing.mark()
    levels = ("crash", "application")
    snapshots = [failing.client.snapshots.create(failing.witness.id, level=each) for each in levels]
    failing.client.sandboxes.stop(failing.witness.id)
    started = failing.client.sandboxes.start(failing.witness.id, wait_for_ready=False)
    copies = [failing.client.snapshots.restore(each.id, wait_for_ready=False) for each in snapshots]
    for sandbox in (started, *copies):
        ready = sandbox.wait_ready(timeout=120)
        assert ready.execute("cat /marker").stdout.decode() == f"{mark}\n"
    failing.check()
